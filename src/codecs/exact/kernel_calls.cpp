#include "src/codecs/exact/kernel_calls.h"

#include "src/backends/metal/source.h"
#include "src/codecs/kernel_calls.h"

namespace veloxquant::exact {
namespace {

using metal::Call;
using metal::Kernel;
using metal::make_kernel;
using metal::Type;

const char* const kHeader = "src/codecs/exact/metal.h";

}  // namespace

Call encode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel = make_kernel("vq_exact_encode_blocks", {"x"}, {"blocks"}, kHeader, R"(
  veloxquant::exact_encode_blocks<DIM, T>(x, x_shape[2], (x_shape[2] + 63) / 64, blocks,
                                          thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", s.dim}, {"T", s.bfloat ? Type::bfloat16 : Type::float16}};
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks(), s.dim);
  call.launch.outputs = {{Type::uint8, {s.batch, s.heads, s.n_blocks(), s.block_bytes()}}};
  return call;
}

Call decode_blocks_call(const BlockKernelShape& s) {
  static const Kernel kernel =
      make_kernel("vq_exact_decode_blocks", {"blocks"}, {"out"}, kHeader, R"(
  veloxquant::exact_decode_blocks<DIM, BFLOAT>((const device uint32_t*)blocks, blocks_shape[2], out,
                                               thread_position_in_grid);)");
  Call call{&kernel, {}};
  call.launch.arguments = {{"DIM", s.dim}, {"BFLOAT", s.bfloat ? 1 : 0}};
  metal::set_decode_grid(call, s.batch, s.heads, s.n_blocks(), s.dim);
  return call;
}

}  // namespace veloxquant::exact
