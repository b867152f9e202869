// One block of 64 tokens of one KV head -> codes in fragment order, by one CTA. The arithmetic is
// src/math, as on the CPU, so the codes are equal bit for bit (compile with --fmad=false).
#pragma once

#include <cuda_runtime_api.h>

#include "src/codecs/vecinfer/cuda_layout.h"
#include "src/codecs/vecinfer/format.h"
#include "src/math/centroids.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"
#include "veloxquant/cuda.h"

namespace veloxquant::cuda {

constexpr int kEncodeThreads = 256;
constexpr int kEncodeCentroids = 256;                        // of 8-bit codes, at most
constexpr int kEncodeGroup = kEncodeThreads / kBlockTokens;  // sub-vectors side by side

__host__ __device__ inline int encode_shared_bytes(const SideFormat& f) {
  return 4 * (2 * f.head_dim * kBlockTokens + kEncodeGroup * kEncodeCentroids * f.sub_dim) +
         512 * f.n_chunks;
}

__device__ __forceinline__ int64_t block_stride(const SideFormat& f) { return 512 * f.n_chunks; }

__device__ __forceinline__ int code_offset(bool keys, int n_chunks, int token, int m) {
  const int step = token / vecinfer::kStepTokens * vecinfer::fragment_step_bytes(n_chunks);
  return step + (keys ? vecinfer::key_offset(n_chunks, token % vecinfer::kStepTokens, m)
                      : vecinfer::value_offset(n_chunks, token % vecinfer::kStepTokens, m));
}

// NaN becomes 0, infinity the largest finite value, as in the cache's append. type: 0 fp32,
// 1 fp16, 2 bf16.
__device__ __forceinline__ float load_clean(const void* data, int64_t at, int type) {
  float x, largest;
  if (type == 0) {
    x = static_cast<const float*>(data)[at];
    largest = float_of(0x7f7fffffu);
  } else if (type == 1) {
    x = f16_to_f32(static_cast<const uint16_t*>(data)[at]);
    largest = 65504.0f;
  } else {
    x = bf16_to_f32(static_cast<const uint16_t*>(data)[at]);
    largest = float_of(0x7f7f0000u);
  }
  const uint32_t bits = bits_of(x);
  if (is_finite_bits(bits)) return x;
  if ((bits & 0x7fffffu) != 0) return 0.0f;
  return bits >> 31 ? -largest : largest;
}

// nearest_centroid of src/math for d = 4 or 2, a table entry a load. table: 16-byte aligned.
template <int d>
__device__ __forceinline__ uint32_t nearest_entry(const float* x, const float* table,
                                                  int n_centroids) {
  float value[d];
#pragma unroll
  for (int i = 0; i < d; ++i) value[i] = x[i * kBlockTokens];
  uint32_t best = 0;
  float distance = float_of(0x7f800000u);
#pragma unroll 8
  for (int c = 0; c < n_centroids; ++c) {
    float entry[d];
    if constexpr (d == 4) {
      *reinterpret_cast<float4*>(entry) = reinterpret_cast<const float4*>(table)[c];
    } else {
      *reinterpret_cast<float2*>(entry) = reinterpret_cast<const float2*>(table)[c];
    }
    const float sum = squared_distance(value, 1, entry, d);
    if (sum < distance) {
      distance = sum;
      best = static_cast<uint32_t>(c);
    }
  }
  return best;
}

// load(token, d): element d of token `token` < count. to: block_bytes() bytes, 16-byte aligned.
// shared: encode_shared_bytes(). All threads; ends without a barrier.
template <class Load>
__device__ __forceinline__ void encode_block(const SideFormat& f, const uint8_t* blob, int head,
                                             int sequence, int count, const Load& load,
                                             float* shared, uint8_t* to_bytes) {
  const int D = f.head_dim, t = threadIdx.x;
  float* x = shared;  // [D][64]
  float* y = x + D * kBlockTokens;
  float* tables = y + D * kBlockTokens;  // [kEncodeGroup][256][d]
  uint8_t* codes = reinterpret_cast<uint8_t*>(tables + kEncodeGroup * kEncodeCentroids * f.sub_dim);

  for (int e = t; e < D * kBlockTokens; e += kEncodeThreads) {
    const int token = e / D, d = e % D;
    float value = token < count ? load(token, d) : 0.0f;
    if (f.has_scale) {
      value = mul(value, reinterpret_cast<const float*>(blob + f.inverse_lambda)[head * D + d]);
    }
    x[d * kBlockTokens + token] = value;
  }
  for (int e = t; e < 512 * f.n_chunks; e += kEncodeThreads) codes[e] = 0;
  __syncthreads();

  if (f.transform == TransformKind::hadamard) {
    for (int start = 0; start < D;) {
      const int block = hadamard_block(D - start);
      for (int stride = 1; stride < block; stride *= 2) {
        for (int e = t; e < block / 2 * kBlockTokens; e += kEncodeThreads) {
          const int k = e / kBlockTokens, token = e % kBlockTokens;
          float* low = x + (start + 2 * stride * (k / stride) + k % stride) * kBlockTokens + token;
          const float a = low[0], b = low[stride * kBlockTokens];
          low[0] = a + b;
          low[stride * kBlockTokens] = a - b;
        }
        __syncthreads();
      }
      const float scale = hadamard_scale(block);
      for (int e = t; e < block * kBlockTokens; e += kEncodeThreads) {
        x[start * kBlockTokens + e] = mul(x[start * kBlockTokens + e], scale);
      }
      __syncthreads();
      start += block;
    }
  } else if (f.transform == TransformKind::dense) {
    const float* matrix =
        reinterpret_cast<const float*>(blob + f.encode_matrix) + static_cast<int64_t>(head) * D * D;
    // A thread: one output dimension of 16 tokens.
    constexpr int kTokens = 16;
    for (int e = t; e < D * (kBlockTokens / kTokens); e += kEncodeThreads) {
      const int d = e % D, token = e / D * kTokens;
      float sum[kTokens];
      for (int i = 0; i < D; ++i) {
        const float m = __ldg(matrix + i * D + d);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
          const float product = mul(x[i * kBlockTokens + token + k], m);
          sum[k] = i == 0 ? product : __fadd_rn(sum[k], product);
        }
      }
#pragma unroll
      for (int k = 0; k < kTokens; ++k) y[d * kBlockTokens + token + k] = sum[k];
    }
    __syncthreads();
    float* other = x;
    x = y;
    y = other;
  }

  const int64_t table_floats = static_cast<int64_t>(f.n_centroids) * f.sub_dim;
  const uint16_t* head_tables =
      reinterpret_cast<const uint16_t*>(blob + f.tables) +
      (static_cast<int64_t>(f.n_sequences == 1 ? 0 : sequence) * f.n_kv_heads + head) * f.n_tables *
          table_floats;
  for (int m0 = 0; m0 < f.n_subvectors; m0 += kEncodeGroup) {
    __syncthreads();
    if (m0 == 0 || f.n_tables > 1) {
      for (int e = t; e < kEncodeGroup * table_floats; e += kEncodeThreads) {
        const int m = m0 + static_cast<int>(e / table_floats);
        const int source = f.n_tables == 1 ? 0 : min(m, f.n_subvectors - 1);
        tables[e] = f16_to_f32(head_tables[source * table_floats + e % table_floats]);
      }
      __syncthreads();
    }
    const int m = m0 + t / kBlockTokens, token = t % kBlockTokens;
    if (m < f.n_subvectors) {
      const float* from = x + m * f.sub_dim * kBlockTokens + token;
      const float* table = tables + t / kBlockTokens * table_floats;
      const uint32_t code = f.sub_dim == 4 ? nearest_entry<4>(from, table, f.n_centroids)
                                           : nearest_entry<2>(from, table, f.n_centroids);
      codes[code_offset(f.side == Side::keys, f.n_chunks, token, m)] = static_cast<uint8_t>(code);
    }
  }
  __syncthreads();
  uint4* to = reinterpret_cast<uint4*>(to_bytes);
  for (int e = t; e < 32 * f.n_chunks; e += kEncodeThreads)
    to[e] = reinterpret_cast<const uint4*>(codes)[e];
}

}  // namespace veloxquant::cuda
