#include "veloxquant/dequantize.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/math/float16.h"

namespace veloxquant {
namespace {

std::atomic<int64_t>& counter() {
  static std::atomic<int64_t> calls{0};
  return calls;
}

void store(const float* from, int64_t n, DType dtype, void* to) {
  if (dtype == DType::float32) {
    std::memcpy(to, from, sizeof(float) * n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      static_cast<uint16_t*>(to)[i] =
          dtype == DType::float16 ? f32_to_f16(from[i]) : f32_to_bf16(from[i]);
    }
  }
}

}  // namespace

int64_t dequantize_calls() { return counter(); }
void count_dequantize_call() { ++counter(); }

void dequantize(Backend backend, const KeyValueSource& source, Side side,
                const MutableTensorView& out) {
  count_dequantize_call();
  require(out.ndim == 4 && out.shape[2] == source.length, "[dequantize] out: got ", out.shape[2],
          " tokens, wanted ", source.length);
  const int64_t batch = out.shape[0], heads = out.shape[1], dim = out.shape[3];
  const Codec& codec = side == Side::keys ? *source.key_codec : *source.value_codec;
  const Visibility& visibility = source.visibility;
  const int64_t code_end = visibility.code_end(visibility.first_query);

  parallel_for(batch * heads, [&](long item) {
    const int b = static_cast<int>(item / heads), h = static_cast<int>(item % heads);
    std::memset(out.at(b, h), 0, static_cast<size_t>(source.length) * dim * dtype_bytes(out.dtype));
    std::vector<float> tile(static_cast<size_t>(kBlockTokens) * dim);
    for (const PackedRun& run : source.packed) {
      const bool keys = side == Side::keys;
      const uint8_t* blocks =
          keys ? run.keys + b * run.key_batch_stride + h * run.key_head_stride
               : run.values + b * run.value_batch_stride + h * run.value_head_stride;
      for (int i = 0; i < run.n_blocks; ++i) {
        const int64_t start = run.start + int64_t{kBlockTokens} * i;
        if (start >= code_end) break;
        const int n = i + 1 < run.n_blocks ? kBlockTokens : run.last_count;
        codec.decode_block(backend, {b, h, start}, blocks + i * codec.block_bytes(), n, tile.data(),
                           dim);
        codec.inverse(h, tile.data(), n);
        store(tile.data(), n * dim, out.dtype, out.at(b, h, start));
      }
    }
    std::vector<uint16_t> rounded(dim);
    for (const ExactRun& run : source.exact) {
      const TensorView& view = side == Side::keys ? run.keys : run.values;
      for (int64_t t = 0; t < view.shape[2]; ++t) {
        const int64_t position = run.start + t;
        if (position >= visibility.tail_start && position < code_end) continue;
        for (int64_t d = 0; d < dim; ++d) {
          cpu::to_float(view.dtype, view.at(b, h, t, d), 1, &tile[d]);
        }
        cpu::to_finite_16bit(source.exact_dtype, tile.data(), dim, rounded.data());
        cpu::to_float(source.exact_dtype, rounded.data(), dim, tile.data());
        store(tile.data(), dim, out.dtype, out.at(b, h, position));
      }
    }
  });
}

}  // namespace veloxquant
