#include "src/codecs/kernel_calls.h"

#include "src/backends/metal/source.h"
#include "veloxquant/words.h"

namespace veloxquant::metal {
namespace {

constexpr int kThreads = 256;

}  // namespace

Call pack_words_call(int rows, int n_codes, int bits) {
  static const Kernel kernel =
      make_kernel("vq_pack_words", {"codes"}, {"words"}, "src/codecs/metal_words.h", R"(
  veloxquant::pack_words<BITS>(codes, codes_shape[1], threads_per_grid.x, words,
                               thread_position_in_grid);)");
  const int n_words = static_cast<int>(words_per_row(n_codes, bits));
  Call call{&kernel, {}};
  call.launch.arguments = {{"BITS", bits}};
  call.launch.grid = {n_words, rows, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint32, {rows, n_words}}};
  return call;
}

Call unpack_words_call(int rows, int n_codes, int bits) {
  static const Kernel kernel =
      make_kernel("vq_unpack_words", {"words"}, {"codes"}, "src/codecs/metal_words.h", R"(
  veloxquant::unpack_words<BITS>(words, words_shape[1], codes, threads_per_grid.x,
                                 thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"BITS", bits}};
  call.launch.grid = {n_codes, rows, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::int32, {rows, n_codes}}};
  return call;
}

Call hamming_score_call(int n, int n_dims) {
  static const Kernel kernel =
      make_kernel("vq_hamming_score", {"query", "codes", "offset", "scale"}, {"scores"},
                  "src/codecs/rabitq/metal.h", R"(
  veloxquant::hamming_scan<N_DIMS>(query, codes, offset, scale, scores, thread_position_in_grid.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"N_DIMS", n_dims}};
  call.launch.grid = {n, 1, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::float32, {n}}};
  return call;
}

Call inverse_rows_call(int batch, int heads, int n, int dim, int transform, Type out) {
  static const Kernel kernel =
      make_kernel("vq_inverse_rows", {"y", "numbers"}, {"out"}, "src/codecs/metal_inverse.h", R"(
  threadgroup float rows[8 * DIM];
  threadgroup float moved[8 * DIM];
  const int64_t plane = threadgroup_position_in_grid.y, n = y_shape[2];
  const int64_t head = plane % y_shape[1];
  veloxquant::inverse_rows<DIM, 8, TRANSFORM, OUT>(
      y + plane * n * DIM, (int)n,
      numbers + (TRANSFORM == 1 ? head * DIM : TRANSFORM == 2 ? head * DIM * DIM : 0),
      out + plane * n * DIM, rows, moved, threadgroup_position_in_grid.x,
      thread_index_in_threadgroup, threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", dim}, {"TRANSFORM", transform}, {"OUT", out}};
  call.launch.grid = {(n + 7) / 8 * kThreads, batch * heads, 1};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{out, {batch, heads, n, dim}}};
  return call;
}

void set_encode_grid(Call& call, int batch, int heads, int n_blocks, int64_t block_bytes) {
  call.launch.grid = {8 * kThreads, n_blocks, batch * heads};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::uint8, {batch, heads, n_blocks, block_bytes}}};
}

void set_decode_grid(Call& call, int batch, int heads, int n_blocks, int dim) {
  call.launch.grid = {64 * dim, n_blocks, batch * heads};
  call.launch.threadgroup = {kThreads, 1, 1};
  call.launch.outputs = {{Type::float32, {batch, heads, int64_t{64} * n_blocks, dim}}};
}

}  // namespace veloxquant::metal
