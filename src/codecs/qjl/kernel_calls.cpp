#include "src/codecs/qjl/kernel_calls.h"

#include <algorithm>
#include <cmath>

#include "src/backends/metal/source.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/qjl/kernels.h"
#include "src/codecs/qjl/sketch.h"
#include "src/codecs/registry.h"

namespace veloxquant::qjl {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kBlocks = "src/codecs/qjl/metal_blocks.h";
const char* const kRows = "src/codecs/qjl/metal.h";
constexpr int kThreads = 256;

std::vector<metal::TemplateArgument> arguments_of(const BlockKernelShape& s) {
  return {{"DIM", s.dim},
          {"M", s.layout.m},
          {"M_OUT", s.layout.m_out},
          {"DENSE", s.dense ? 1 : 0},
          {"OUTLIERS", s.outliers},
          {"FIXED", s.outliers > 0 && s.layout.n_channels == 0 ? 1 : 0}};
}

}  // namespace

BlockKernelShape block_shape_of(const CodecSpec& spec, int given_rows, bool has_channels) {
  static const CodecTables none;
  SpecReader reader(spec, none);
  BlockKernelShape s;
  s.heads = spec.n_kv_heads;
  s.dim = spec.head_dim;
  s.outliers = static_cast<int>(reader.integer_or("outliers", 0, 0, kMaxOutliers));
  s.dense = given_rows > 0;
  s.layout.m = s.dense ? given_rows
                       : static_cast<int>(reader.integer_or("sketch_bits", 0, 0, kMaxSketchBits));
  const int bits = static_cast<int>(reader.integer_or("outlier_bits", 0, 0, kMaxSketchBits));
  s.layout.m_out = s.outliers == 0 ? 0 : bits == 0 ? s.dim : bits;
  if (s.dense) s.layout.m_out = std::min(s.layout.m_out, s.layout.m);
  s.layout.n_channels = has_channels ? 0 : s.outliers;
  return s;
}

std::vector<float> sketch_signs(const BlockKernelShape& s, uint64_t seed) {
  std::vector<float> signs;
  for (int block = 0; block < (s.layout.m + s.layout.m_out) / s.dim; ++block) {
    const Rotation rotation = sketch_rotation(s.dim, seed, block);
    signs.insert(signs.end(), rotation.signs(), rotation.signs() + 2 * s.dim);
  }
  return signs;
}

std::vector<float> score_constants(const BlockKernelShape& s) {
  const double length = s.dense ? 1.0 : std::sqrt(double(s.dim));  // of a row of the sketch
  std::vector<float> constants;
  for (int m : {s.layout.m, std::max(1, s.layout.m_out)}) {
    constants.push_back(static_cast<float>(kRootHalfPi / m * length));
  }
  return constants;
}

namespace {

// [dim][rows] of the main sketch, or of the outliers'.
std::vector<float> columns_of(const BlockKernelShape& s, const float* given, uint64_t seed,
                              bool outliers) {
  const int rows = outliers ? s.layout.m_out : s.layout.m,
            first = outliers ? s.layout.m / s.dim : 0;
  const Sketch sketch =
      s.dense ? Sketch::dense(s.dim, rows, given) : Sketch::structured(s.dim, rows, seed, first);
  const size_t dim = s.dim;
  std::vector<float> units(dim * dim, 0.0f), columns(dim * rows);
  for (size_t d = 0; d < dim; ++d) units[d * dim + d] = 1.0f;
  sketch.project(units.data(), s.dim, columns.data());
  return columns;
}

}  // namespace

std::vector<float> query_matrix(const BlockKernelShape& s, const float* sketch, uint64_t seed) {
  std::vector<float> columns = columns_of(s, sketch, seed, false);
  if (s.outliers == 0) return columns;
  std::vector<float> matrix;
  for (int d = 0; d < s.dim; ++d) {
    const auto row = columns.begin() + int64_t{d} * s.layout.m;
    matrix.insert(matrix.end(), row, row + s.layout.m);
    matrix.resize(matrix.size() + s.dim, 0.0f);
    matrix[matrix.size() - s.dim + d] = 1.0f;
  }
  return matrix;
}

std::vector<float> outlier_numbers(const BlockKernelShape& s, const float* sketch, uint64_t seed,
                                   const std::vector<int32_t>& channels) {
  std::vector<float> numbers = score_constants(s);
  for (bool outliers : {false, true}) {
    const std::vector<float> columns = columns_of(s, sketch, seed, outliers);
    numbers.insert(numbers.end(), columns.begin(), columns.end());
  }
  numbers.insert(numbers.end(), channels.begin(), channels.end());
  return numbers;
}

float score_constant(int m) { return static_cast<float>(kRootHalfPi / m); }

std::optional<std::string> no_kernel_because(const BlockKernelShape& s) {
  if (s.dim > kMaxHeadDim) return "head_dim above " + std::to_string(kMaxHeadDim);
  return std::nullopt;
}

Call encode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_qjl_encode_blocks", {"x", "sketch", "channels"}, {"blocks"}, kBlocks, R"(
  threadgroup float whole[8 * DIM];
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup float energy[DIM];
  threadgroup uchar chosen[DIM];
  veloxquant::qjl_encode_blocks<DIM, M, M_OUT, DENSE, OUTLIERS, FIXED>(
      x, x_shape[2], x_shape[1], (int)threadgroups_per_grid.y, sketch, channels, blocks, whole,
      rows, moved, energy, chosen, threadgroup_position_in_grid, thread_index_in_threadgroup,
      threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks(), s.layout.bytes());
  return call;
}

Call decode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel = make_kernel(
      "vq_qjl_decode_blocks", {"blocks", "sketch", "channels", "constants"}, {"out"}, kBlocks, R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup float total[8 * DIM];
  veloxquant::qjl_decode_blocks<DIM, M, M_OUT, DENSE, OUTLIERS, FIXED, SKETCHED>(
      blocks, blocks_shape[2], blocks_shape[1], sketch, channels, constants, out, rows, moved, total,
      threadgroup_position_in_grid, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.arguments.push_back({"SKETCHED", s.sketched() ? 1 : 0});
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks(), 0);
  call.launch.outputs = {
      {Type::float32, {s.batch, s.heads, int64_t{kBlockTokens} * s.n_blocks(), s.dim}}};
  return call;
}

std::optional<std::string> no_rows_kernel_because(int dim) {
  if (dim <= kMaxKernelDim) return std::nullopt;
  return "rows of more than " + std::to_string(kMaxKernelDim) + " values";
}
std::string row_limits() { return "rows of up to " + std::to_string(kMaxKernelDim); }

Call encode_rows_call(int n, int dim, int m) {
  static const Kernel kernel =
      make_kernel("vq_qjl_encode_rows", {"x", "sketch"}, {"signs", "norms"}, kRows, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup uchar bits[ROWS * 256];
  veloxquant::qjl_encode_rows<DIM, ROWS>(
      x, x_shape[0], sketch, sketch_shape[0], signs, norms, rows, bits,
      threadgroup_position_in_grid.x, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  const int rows = std::clamp(2048 / dim, 1, 8);
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"ROWS", rows}};
  call.launch.grid = {(n + rows - 1) / rows * kThreads, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint8, {n, m / 8}}, {Type::float16, {n}}};
  return call;
}

Call inner_product_call(int batches, int q_heads, int heads, int n) {
  static const Kernel kernel =
      make_kernel("vq_qjl_inner_product", {"q", "signs", "norms", "factor"}, {"scores"}, kRows, R"(
  threadgroup float table[16 * 256];
  veloxquant::qjl_scores(q, q_shape[2], q_shape[1], HEADS, signs, norms, signs_shape[1],
                         (float)factor[0], scores, table, threadgroup_position_in_grid,
                         thread_index_in_threadgroup);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"HEADS", heads}};
  call.launch.grid = {(n + kThreads - 1) / kThreads * kThreads, q_heads, batches};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::float16, {batches, q_heads, n}}};
  return call;
}

}  // namespace veloxquant::qjl
