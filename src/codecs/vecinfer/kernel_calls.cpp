#include "src/codecs/vecinfer/kernel_calls.h"

#include <algorithm>

#include "src/backends/metal/source.h"
#include "src/codecs/kernel_calls.h"

namespace veloxquant::vecinfer {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kHeader = "src/codecs/vecinfer/metal.h";
constexpr int kThreads = 256;

// Rows of a tile: a lane keeps a distance for each, and the tile takes 8 KB at most.
int tile_rows(int dim) { return std::clamp(2048 / dim, 1, 8); }

std::vector<metal::TemplateArgument> arguments_of(const RowShape& s) {
  return {{"SUB", s.sub_dim}, {"C", s.n_centroids}, {"TABLES", s.tables}, {"HEADS", s.table_heads}};
}

std::vector<metal::TemplateArgument> tile_arguments(const RowShape& s) {
  auto arguments = arguments_of(s);
  arguments.insert(arguments.begin(), {"DIM", s.dim});
  arguments.push_back({"ROWS", tile_rows(s.dim)});
  return arguments;
}

int tiles(const RowShape& s) { return (s.rows + tile_rows(s.dim) - 1) / tile_rows(s.dim); }

std::vector<int64_t> shape_of(const RowShape& s, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape = {s.planes, s.rows};
  shape.insert(shape.end(), last);
  return shape;
}

std::optional<std::string> above(int dim, int most, int sub_dim) {
  if (dim > most) return "head_dim above " + std::to_string(most);
  if (sub_dim <= kMaxKernelSubDim) return std::nullopt;
  return "sub-vectors of more than " + std::to_string(kMaxKernelSubDim) + " dimensions";
}

}  // namespace

std::optional<std::string> no_kernel_because(const BlockShape& s) {
  return above(s.dim, kMaxBlockKernelDim, s.sub_dim);
}

namespace {
std::vector<metal::TemplateArgument> arguments_of(const BlockShape& s) {
  return {{"DIM", s.dim},
          {"SUB", s.sub_dim},
          {"C", s.n_centroids},
          {"BITS", s.bits},
          {"TABLES", s.tables}};
}
}  // namespace

Call encode_blocks_call(const BlockShape& s) {
  static const Kernel kernel = make_kernel("vq_vecinfer_encode_blocks", {"x", "tables", "forward"},
                                           {"blocks"}, "src/codecs/vecinfer/metal_blocks.h", R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  threadgroup ushort tile[8 * (DIM / SUB)];
  veloxquant::vecinfer_encode_blocks<DIM, SUB, C, BITS, TABLES, TRANSFORM>(
      x, x_shape[2], x_shape[1], tables_shape[0], tables, forward, blocks, rows, moved, tile,
      threadgroup_position_in_grid, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.arguments.push_back({"TRANSFORM", s.transform});
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks, s.block_bytes());
  return call;
}

Call decode_blocks_call(const BlockShape& s) {
  static const Kernel kernel = make_kernel("vq_vecinfer_decode_blocks", {"blocks", "tables"},
                                           {"out"}, "src/codecs/vecinfer/metal_blocks.h", R"(
  veloxquant::vecinfer_decode_blocks<DIM, SUB, C, BITS, TABLES>(
      (const device uint32_t*)blocks, blocks_shape[2], blocks_shape[1], tables_shape[0], tables, out,
      thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks, s.dim);
  return call;
}

std::optional<std::string> no_kernel_because(const RowShape& s) {
  return above(s.dim, kMaxKernelDim, s.sub_dim);
}

std::string row_limits() {
  return "head_dim up to " + std::to_string(kMaxKernelDim) + ", sub-vectors of up to " +
         std::to_string(kMaxKernelSubDim);
}

Call quantize_call(const RowShape& s) {
  static const Kernel kernel =
      make_kernel("vq_vecinfer_quantize", {"x", "codebook"}, {"codes"}, kHeader, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup uint tile[ROWS * (DIM / SUB)];
  veloxquant::vecinfer_quantize<DIM, SUB, C, TABLES, HEADS, ROWS>(
      x, x_shape[1], codebook, codes, rows, tile, threadgroup_position_in_grid,
      thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = tile_arguments(s);
  call.launch.grid = {tiles(s) * kThreads, s.planes, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::int32, shape_of(s, {s.n_subvectors()})}};
  return call;
}

Call dequantize_call(const RowShape& s, Type type) {
  static const Kernel kernel =
      make_kernel("vq_vecinfer_dequantize", {"codes", "codebook"}, {"out"}, kHeader, R"(
  veloxquant::vecinfer_dequantize<SUB, C, TABLES, HEADS>(
      codes, codes_shape[1], codes_shape[2], codebook, out, thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.grid = {s.rows * s.dim, s.planes, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{type, shape_of(s, {s.dim})}};
  return call;
}

Call query_lut_call(const RowShape& s, Type type) {
  static const Kernel kernel =
      make_kernel("vq_vecinfer_query_lut", {"q", "codebook"}, {"lut"}, kHeader, R"(
  veloxquant::vecinfer_query_lut<SUB, C, TABLES, HEADS>(
      q, q_shape[1], q_shape[2] / SUB, codebook, lut, thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = arguments_of(s);
  call.launch.grid = {s.n_centroids, s.rows * s.n_subvectors(), s.planes};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{type, shape_of(s, {s.n_subvectors(), s.n_centroids})}};
  return call;
}

Call is_hadamard_call(int dim) {
  static const Kernel kernel =
      make_kernel("vq_is_walsh_hadamard", {"matrix"}, {"flag"}, kHeader, R"(
  threadgroup uint bad[32];
  veloxquant::is_walsh_hadamard<DIM>(matrix, flag, bad, thread_index_in_threadgroup,
                                     threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}};
  call.launch.grid = {kThreads, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint32, {1}}};
  return call;
}

Call encode_decode_call(const RowShape& s, bool has_matrix, int lambda_rows, Type code_type) {
  static const Kernel kernel =
      make_kernel("vq_vecinfer_encode_decode", {"x", "codebook", "matrix", "hadamard", "lambda"},
                  {"decoded", "codes"}, kHeader, R"(
  threadgroup float rows[ROWS * DIM];
  threadgroup float moved[ROWS * DIM];
  threadgroup uint tile[ROWS * (DIM / SUB)];
  veloxquant::vecinfer_encode_decode<DIM, SUB, C, TABLES, HEADS, ROWS, MATRIX, LAMBDAS>(
      x, x_shape[2], x_shape[1], codebook, matrix, hadamard, lambda, decoded, codes, rows, moved,
      tile, threadgroup_position_in_grid, thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = tile_arguments(s);
  call.launch.arguments.push_back({"MATRIX", has_matrix ? 1 : 0});
  call.launch.arguments.push_back({"LAMBDAS", lambda_rows == 0 ? 0 : lambda_rows == 1 ? 1 : 2});
  call.launch.grid = {tiles(s) * kThreads, s.planes, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  const int64_t batches = s.planes / s.heads;
  call.launch.outputs = {{Type::float16, {batches, s.heads, s.rows, s.dim}},
                         {code_type, {batches, s.heads, s.rows, s.n_subvectors()}}};
  return call;
}

}  // namespace veloxquant::vecinfer
