#include "src/mlx/codec_ops.h"

#include <algorithm>

#include "src/mlx/function_op.h"
#include "src/mlx/gpu_codec.h"
#include "src/mlx/views.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

// What the codec does on the stream's GPU, if it has one and kernels for it.
std::optional<mx::array> gpu_step(const char* name, const SharedCodec& codec,
                                  GpuCodec::Step GpuCodec::*step, const mx::array& of,
                                  int64_t position, mx::StreamOrDevice s) {
  const std::optional<GpuStream> gpu = gpu_stream(s);
  if (!gpu) return std::nullopt;
  const MaybeGpuCodec& made = gpu_codec(*codec);
  if (const auto* reason = std::get_if<std::string>(&made)) {
    note_cpu(name, s, *reason);
    return std::nullopt;
  }
  return (std::get<GpuCodec>(made).*step)(dense_on(gpu->stream, of, of.dtype()), position, *gpu);
}

void require_shape(const char* name, const CodecSpec& spec, const mx::array& a, int width) {
  require(a.ndim() == 4 && a.size() > 0 && a.shape(1) == spec.n_kv_heads && a.shape(3) == width,
          "[codec] ", name, ": got ", shape_text(a), ", wanted [B, ", spec.n_kv_heads, ", n, ",
          width, "] of at least one token");
}

}  // namespace

mx::array encode_blocks_op(const SharedCodec& codec, const mx::array& x, int64_t position,
                           mx::StreamOrDevice s) {
  require_shape("x", codec->spec, x, codec->spec.head_dim);
  require(mx::issubdtype(x.dtype(), mx::floating), "[codec] x: got ", dtype_text(x.dtype()),
          ", wanted a float");
  require(position >= 0, "[codec] position: got ", position, ", wanted at least 0");
  const std::optional<GpuStream> gpu = gpu_stream(s);
  const mx::array rows = dense_on(gpu ? gpu->stream : cpu_stream(s), x, mx::float32);
  if (auto out = gpu_step("encode_blocks", codec, &GpuCodec::encode, rows, position, s)) {
    return *out;
  }
  const int batch = x.shape(0), heads = x.shape(1), n = x.shape(2);
  const int n_blocks = (n + kBlockTokens - 1) / kBlockTokens;
  const int64_t bytes = codec->core->block_bytes(), dim = x.shape(3);
  return function_op(
      "encode_blocks", {dense(rows, mx::float32, s)},
      {{{batch, heads, n_blocks, static_cast<int>(bytes)}, mx::uint8}},
      [=](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        parallel_for(int64_t{batch} * heads * n_blocks, [&](long item) {
          const int64_t plane = item / n_blocks, start = item % n_blocks * kBlockTokens;
          const BlockPlace place{static_cast<int>(plane / heads), static_cast<int>(plane % heads),
                                 position + start};
          codec->core->encode_block(default_backend(), place,
                                    in[0].data<float>() + (plane * n + start) * dim,
                                    static_cast<int>(std::min<int64_t>(kBlockTokens, n - start)),
                                    out[0].data<uint8_t>() + item * bytes);
        });
      },
      s)[0];
}

mx::array decode_blocks_op(const SharedCodec& codec, const mx::array& blocks, int64_t position,
                           mx::StreamOrDevice s) {
  const int64_t bytes = codec->core->block_bytes(), dim = codec->spec.head_dim;
  require_shape("blocks", codec->spec, blocks, static_cast<int>(bytes));
  require(blocks.dtype() == mx::uint8, "[codec] blocks: got ", dtype_text(blocks.dtype()),
          ", wanted uint8");
  require(position >= 0, "[codec] position: got ", position, ", wanted at least 0");
  if (auto out = gpu_step("decode_blocks", codec, &GpuCodec::decode, blocks, position, s)) {
    return *out;
  }
  const int batch = blocks.shape(0), heads = blocks.shape(1), n_blocks = blocks.shape(2);
  return function_op(
      "decode_blocks", {dense(blocks, mx::uint8, s)},
      {{{batch, heads, kBlockTokens * n_blocks, static_cast<int>(dim)}, mx::float32}},
      [=](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        parallel_for(int64_t{batch} * heads * n_blocks, [&](long item) {
          const int64_t plane = item / n_blocks;
          const BlockPlace place{static_cast<int>(plane / heads), static_cast<int>(plane % heads),
                                 position + item % n_blocks * kBlockTokens};
          codec->core->decode_block(default_backend(), place, in[0].data<uint8_t>() + item * bytes,
                                    kBlockTokens, out[0].data<float>() + item * kBlockTokens * dim,
                                    dim);
        });
      },
      s)[0];
}

}  // namespace veloxquant
