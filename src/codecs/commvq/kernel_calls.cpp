#include "src/codecs/commvq/kernel_calls.h"

#include <algorithm>

#include "src/backends/metal/source.h"
#include "src/codecs/commvq/kernels.h"
#include "src/codecs/kernel_calls.h"
#include "src/math/float16.h"

namespace veloxquant::commvq {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kHeader = "src/codecs/commvq/metal.h";

}  // namespace

StageProducts stage_products(const TensorView& codebook) {
  const int64_t stages = codebook.shape[0] * codebook.shape[1];
  const int n = static_cast<int>(codebook.shape[2]), pairs = static_cast<int>(codebook.shape[4]);
  const int64_t size = int64_t{n} * 2 * pairs;
  StageProducts products{std::vector<float>(stages * kMaxEntries, 0.0f),
                         std::vector<float>(stages * kMaxEntries * kMaxEntries, 0.0f)};
  std::vector<float> entries(size);
  for (int64_t s = 0; s < stages; ++s) {
    const auto* halves = static_cast<const uint16_t*>(codebook.data) + s * size;
    for (int64_t i = 0; i < size; ++i) entries[i] = f16_to_f32(halves[i]);
    kernels_of(Backend::reference)
        .products(entries.data(), pairs, n, products.norms.data() + s * kMaxEntries,
                  products.cross.data() + s * kMaxEntries * kMaxEntries);
  }
  return products;
}

Call encode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel = make_kernel(
      "vq_commvq_encode_blocks", {"z", "codebook", "norms", "cross"}, {"blocks"}, kHeader, R"(
  threadgroup float rows[8 * 2 * P];
  threadgroup float scores[8 * 64];
  threadgroup ushort codes[8];
  veloxquant::commvq_encode_blocks<P, N>(
      z, z_shape[2], z_shape[1], (int)threadgroups_per_grid.y, codebook, codebook_shape[1], norms,
      cross, blocks, rows, scores, codes, threadgroup_position_in_grid, thread_index_in_threadgroup,
      threads_per_threadgroup.x);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"P", s.dim / 2}, {"N", s.n_entries}};
  metal::set_encode_grid(call, s.batch, s.heads, s.n_blocks(), s.block_bytes());
  return call;
}

Call decode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_commvq_decode_blocks", {"blocks", "codebook"}, {"z"}, kHeader, R"(
  veloxquant::commvq_decode_blocks<P, N>((const device uint32_t*)blocks, blocks_shape[2],
                                         blocks_shape[1], codebook, codebook_shape[1], z,
                                         thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"P", s.dim / 2}, {"N", s.n_entries}};
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks(), s.dim / 2);
  call.launch.outputs[0].shape[3] = s.dim;
  return call;
}

Call look_up_call(int n, int n_books, int sub_dim, Type type) {
  static const Kernel kernel = make_kernel(
      "vq_comm_vq_look_up", {"indices", "codebook", "cosines", "sines"}, {"out"}, kHeader, R"(
  veloxquant::comm_vq_look_up<M, SUB, OUT>(indices, indices_shape[1], codebook, codebook_shape[2],
                                           cosines, sines, out, thread_position_in_grid);)");
  const int pairs = n_books * sub_dim / 2;
  Call call{&kernel, {}};
  call.launch.arguments = {{"M", n_books}, {"SUB", sub_dim}, {"OUT", type}};
  call.launch.grid = {pairs, n, 1};
  call.launch.threadgroup = {std::min(pairs, 256), 1, 1};
  call.launch.outputs = {{type, {n, n_books * sub_dim}}};
  return call;
}

}  // namespace veloxquant::commvq
