// The published look-up: product VQ, or a residual of several, then RoPE.
#include <algorithm>
#include <vector>

#include "src/codecs/rope/kernels.h"
#include "src/math/float16.h"
#include "veloxquant/commvq.h"

namespace veloxquant {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

float load(const TensorView& view, int64_t i) {
  if (view.dtype == DType::float32) return static_cast<const float*>(view.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(view.data)[i];
  return view.dtype == DType::float16 ? f16_to_f32(half) : bf16_to_f32(half);
}

void store(const MutableTensorView& view, int64_t i, float value) {
  if (view.dtype == DType::float32) {
    static_cast<float*>(view.data)[i] = value;
  } else {
    static_cast<uint16_t*>(view.data)[i] =
        view.dtype == DType::float16 ? f32_to_f16(value) : f32_to_bf16(value);
  }
}

void check(const TensorView& indices, const TensorView& codebook, const TensorView& positions,
           const TensorView& inv_freq, const MutableTensorView& out) {
  require(codebook.ndim == 4 && is_float(codebook.dtype) && codebook.shape[2] >= 1,
          "[comm_vq_decode] codebook: got ", dtype_name(codebook.dtype), " with ", codebook.ndim,
          " dimensions, wanted floats [stages, n_cb, cb_size, sub_dim] with at least one entry");
  require(indices.ndim == 3 && indices.dtype == DType::int32 &&
              indices.shape[1] == codebook.shape[0] && indices.shape[2] == codebook.shape[1],
          "[comm_vq_decode] indices: got ", dtype_name(indices.dtype), " with ", indices.ndim,
          " dimensions, wanted int32 [n, ", codebook.shape[0], ", ", codebook.shape[1], "]");
  const int64_t n = indices.shape[0], dims = codebook.shape[1] * codebook.shape[3];
  require(dims % 2 == 0, "[comm_vq_decode] n_cb * sub_dim: got ", dims,
          ", which must be even (RoPE rotates dimension pairs)");
  require(positions.ndim == 1 && positions.dtype == DType::int32 && positions.shape[0] == n,
          "[comm_vq_decode] positions: got ", dtype_name(positions.dtype), " of ",
          positions.shape[0], ", wanted int32 [", n, "]");
  require(inv_freq.ndim == 1 && inv_freq.dtype == DType::float32 && inv_freq.shape[0] == dims / 2,
          "[comm_vq_decode] inv_freq: got ", dtype_name(inv_freq.dtype), " of ", inv_freq.shape[0],
          ", wanted float32 [", dims / 2, "]");
  require(out.ndim == 2 && is_float(out.dtype) && out.shape[0] == n && out.shape[1] == dims,
          "[comm_vq_decode] out: got ", dtype_name(out.dtype), " with ", out.ndim,
          " dimensions, wanted floats [", n, ", ", dims, "]");
}

}  // namespace

void comm_vq_decode(Backend backend, const TensorView& indices, const TensorView& codebook,
                    const TensorView& positions, const TensorView& inv_freq,
                    const MutableTensorView& out) {
  check(indices, codebook, positions, inv_freq, out);
  constexpr int kTokens = rope::kTokens;
  const int64_t n_stages = codebook.shape[0], n_books = codebook.shape[1];
  const int64_t size = codebook.shape[2], sub_dim = codebook.shape[3], dims = n_books * sub_dim;
  const int64_t half = dims / 2;
  std::vector<RopePair> pairs;
  for (int64_t j = 0; j < half; ++j) {
    pairs.push_back({static_cast<int>(j), static_cast<int>(j + half)});
  }
  const auto* index = static_cast<const int32_t*>(indices.data);
  const auto* position = static_cast<const int32_t*>(positions.data);
  const rope::Kernels& kernels = rope::kernels_of(backend);

  parallel_ranges(indices.shape[0], kTokens, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(dims * kTokens, 0.0f), tables(dims * kTokens);
    float scaled[kTokens] = {};
    for (int64_t t = begin; t < end; ++t) {
      scaled[t - begin] = static_cast<float>(position[t]);
      for (int64_t r = 0; r < n_stages; ++r) {
        for (int64_t m = 0; m < n_books; ++m) {
          // As unsigned, so that negative ones are clamped to the last entry like all others.
          const uint32_t code = static_cast<uint32_t>(index[(t * n_stages + r) * n_books + m]);
          const int64_t entry = std::min<int64_t>(code, size - 1);
          const int64_t from = ((r * n_books + m) * size + entry) * sub_dim;
          float* to = tile.data() + m * sub_dim * kTokens + (t - begin);
          for (int64_t i = 0; i < sub_dim; ++i) to[i * kTokens] += load(codebook, from + i);
        }
      }
    }
    float* cosines = tables.data();
    float* sines = cosines + half * kTokens;
    kernels.tables(static_cast<const float*>(inv_freq.data), static_cast<int>(half), scaled, 1.0,
                   cosines, sines);
    kernels.turn(pairs.data(), static_cast<int>(half), RopeDirection::forward, cosines, sines,
                 tile.data());
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t d = 0; d < dims; ++d) {
        store(out, t * dims + d, tile[d * kTokens + (t - begin)]);
      }
    }
  });
}

}  // namespace veloxquant
