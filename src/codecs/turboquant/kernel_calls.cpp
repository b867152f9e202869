#include "src/codecs/turboquant/kernel_calls.h"

#include <algorithm>

#include "src/backends/metal/source.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/registry.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/math.h"
#include "src/codecs/turboquant/sketch.h"
#include "veloxquant/words.h"

namespace veloxquant::turboquant {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kRows = "src/codecs/turboquant/metal.h";
const char* const kBlocks = "src/codecs/turboquant/metal_blocks.h";
constexpr int kThreads = 256;

int tile_rows(int dim) { return std::clamp(2048 / dim, 1, 8); }

// One threadgroup a tile of rows.
void set_row_grid(Call& call, int n, int dim) {
  const int tiles = (n + tile_rows(dim) - 1) / tile_rows(dim);
  call.launch.grid = {tiles * kThreads, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
}

void set_element_grid(Call& call, int n) {
  call.launch.grid = {n, 1, 1};
  call.launch.threadgroup = {std::min(n, kThreads), 1, 1};
}

std::vector<metal::TemplateArgument> arguments_of(const BlockKernelShape& s) {
  return {{"DIM", s.dim},
          {"STAGES", s.stages},
          {"BITS", s.bits},
          {"SKETCH", s.prod ? 1 : 0},
          {"BY_TOKEN", s.by_token ? 1 : 0}};
}

// Lloyd-Max of a stage.
ScalarQuantizer quantizer_of(int dim, int bits, int stage) {
  const float* levels = bits == 0    ? nullptr
                        : stage == 0 ? lloyd_max_levels(dim, bits)
                                     : lloyd_max_residual_levels(dim, bits);
  return scalar_quantizer(levels, bits);
}

}  // namespace

std::vector<float> quantizer_numbers(int dim, int bits, int stages) {
  std::vector<float> numbers;
  for (int s = 0; s < stages; ++s) {
    const ScalarQuantizer quantizer = quantizer_of(dim, bits, s);
    numbers.insert(numbers.end(), quantizer.level, quantizer.level + 8);
    numbers.insert(numbers.end(), quantizer.boundary, quantizer.boundary + 8);
  }
  return numbers;
}

std::vector<float> level_numbers(int dim, int bits, int stages) {
  std::vector<float> numbers(16 * stages, 0.0f);
  for (int s = 0; s < stages; ++s) {
    const ScalarQuantizer quantizer = quantizer_of(dim, bits, s);
    for (uint32_t c = 0; bits > 0 && c < 1u << bits; ++c)
      numbers[16 * s + c] = scalar_level(quantizer, c);
  }
  return numbers;
}

std::vector<float> sketched_queries(int dim, uint64_t seed) {
  const size_t n = dim;
  std::vector<float> moved(n * n, 0.0f),
      matrix(2 * n * n);  // row i of moved: R times unit vector i
  for (size_t i = 0; i < n; ++i) moved[i * n + i] = 1.0f;
  Rotation(dim, seed).forward(Backend::reference, moved.data(), dim);
  const auto sketch = gaussian_sketch(dim, seed);
  for (size_t i = 0; i < n; ++i) {
    std::copy_n(&moved[i * n], n, &matrix[i * 2 * n]);
    for (size_t j = 0; j < n; ++j) {
      double sum = 0;
      for (size_t d = 0; d < n; ++d) sum += double(sketch->rows[j * n + d]) * moved[i * n + d];
      matrix[i * 2 * n + n + j] = static_cast<float>(sum);
    }
  }
  return matrix;
}

std::vector<float> rotation_signs(int dim, uint64_t seed) {
  const Rotation rotation(dim, seed);
  return {rotation.signs(), rotation.signs() + 2 * dim};
}

std::optional<std::string> no_kernel_because(const RowShape& s) {
  if (s.dim > kMaxKernelDim)
    return "rows of more than " + std::to_string(kMaxKernelDim) + " values";
  return std::nullopt;
}

std::string row_limits() { return "rows of up to " + std::to_string(kMaxKernelDim); }

Call quantize_call(const RowShape& s) {
  static const Kernel kernel = make_kernel("vq_scalar_quantize", {"x", "signs", "quantizers"},
                                           {"words", "scalars"}, kRows, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup float moved[ROWS * DIM];
  threadgroup uchar codes[ROWS * DIM];
  threadgroup float norms[ROWS];
  threadgroup ushort tile[ROWS];
  veloxquant::scalar_quantize_rows<DIM, BITS, SCALE, ROTATE, ROWS>(
      x, x_shape[0], signs, quantizers, words, scalars, rows, moved, codes, norms, tile,
      threadgroup_position_in_grid.x, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", s.dim},
                           {"BITS", s.bits},
                           {"SCALE", static_cast<int>(s.scale)},
                           {"ROTATE", s.rotate ? 1 : 0},
                           {"ROWS", tile_rows(s.dim)}};
  set_row_grid(call, s.n, s.dim);
  call.launch.outputs = {{Type::uint32, {s.n, words_per_row(s.dim, s.bits)}},
                         {Type::float16, {s.n}}};
  return call;
}

Call dequantize_call(const RowShape& s, Type type) {
  static const Kernel kernel = make_kernel(
      "vq_scalar_dequantize", {"words", "scalars", "signs", "quantizers"}, {"out"}, kRows, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup float moved[ROWS * DIM];
  veloxquant::scalar_dequantize_rows<DIM, BITS, ROTATE, ROWS, OUT>(
      words, scalars, words_shape[0], signs, quantizers, out, rows, moved,
      threadgroup_position_in_grid.x, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", s.dim},
                           {"BITS", s.bits},
                           {"ROTATE", s.rotate ? 1 : 0},
                           {"ROWS", tile_rows(s.dim)},
                           {"OUT", type}};
  set_row_grid(call, s.n, s.dim);
  call.launch.outputs = {{type, {s.n, s.dim}}};
  return call;
}

Call nearest_call(int n, int n_centroids) {
  static const Kernel kernel =
      make_kernel("vq_scalar_nearest", {"x", "centroids"}, {"codes"}, kRows, R"(
  veloxquant::scalar_nearest<C>(x, centroids, codes, thread_position_in_grid.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"C", n_centroids}};
  set_element_grid(call, n);
  call.launch.outputs = {{Type::uint8, {n}}};
  return call;
}

Call hadamard_nearest_call(int rows, int dim, int n_centroids) {
  static const Kernel kernel =
      make_kernel("vq_hadamard_nearest", {"x", "diag", "centroids"}, {"codes"}, kRows, R"(
  threadgroup float rows[ROWS * DIM];
  veloxquant::scalar_nearest_of_hadamard<DIM, C, ROWS>(
      x, x_shape[0], diag, centroids, codes, rows, threadgroup_position_in_grid.x,
      thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"C", n_centroids}, {"ROWS", tile_rows(dim)}};
  set_row_grid(call, rows, dim);
  call.launch.outputs = {{Type::uint8, {rows, dim}}};
  return call;
}

Call centroids_call(int n, int n_centroids) {
  static const Kernel kernel =
      make_kernel("vq_scalar_centroids", {"codes", "centroids"}, {"out"}, kRows, R"(
  const uint i = thread_position_in_grid.x;
  out[i] = veloxquant::Narrow<half>::of(centroids[min((uint)codes[i], (uint)(C - 1))]);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"C", n_centroids}};
  set_element_grid(call, n);
  call.launch.outputs = {{Type::float16, {n}}};
  return call;
}

BlockKernelShape block_shape_of(const CodecSpec& spec) {
  static const CodecTables none;
  SpecReader reader(spec, none);
  BlockKernelShape s;
  s.heads = spec.n_kv_heads;
  s.dim = spec.head_dim;
  s.stages = spec.method == "turboquant" ? 1 : 2;
  s.prod = s.stages == 1 && reader.integer_or("prod", 0, 0, 1) == 1;
  s.bits = static_cast<int>(reader.integer("bits", 1, kMaxScalarBits)) - (s.prod ? 1 : 0);
  s.scale =
      s.prod
          ? ScalarScale::raw
          : static_cast<ScalarScale>(reader.choice("scale", {"norm_corrected", "raw", "unbiased"}));
  s.by_token = spec.side == Side::values;
  return s;
}

std::optional<std::string> no_kernel_because(const BlockKernelShape& s) {
  if (s.dim > 256) return "head_dim above 256";
  return std::nullopt;
}

Call encode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel = make_kernel(
      "vq_scalar_encode_blocks", {"x", "signs", "quantizers", "columns"}, {"blocks"}, kBlocks, R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup uchar codes[(STAGES + SKETCH) * 8 * DIM];
  threadgroup float norms[8];
  threadgroup ushort scalars[16];
  veloxquant::scalar_encode_blocks<DIM, STAGES, BITS, SCALE, SKETCH, BY_TOKEN>(
      x, x_shape[2], (int)threadgroups_per_grid.y, signs, quantizers, columns, blocks, rows, moved,
      codes, norms, scalars, threadgroup_position_in_grid, thread_index_in_threadgroup,
      threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.arguments.push_back({"SCALE", static_cast<int>(s.scale)});
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks(), s.block_bytes());
  return call;
}

Call decode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_scalar_decode_blocks", {"blocks", "quantizers", "sketch"}, {"out"}, kBlocks,
                  R"(
  veloxquant::scalar_decode_blocks<DIM, STAGES, BITS, SKETCH, BY_TOKEN>(
      (const device uint32_t*)blocks, blocks_shape[2], quantizers, sketch, out,
      thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks(), s.dim);
  return call;
}

}  // namespace veloxquant::turboquant
