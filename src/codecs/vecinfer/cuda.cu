// VecInfer on the device: encode into fragment order, and portable blocks to fragment order and
// back. Element arithmetic is src/math, as on the CPU, so the codes are equal bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/backends/cuda/check.h"
#include "src/codecs/vecinfer/cuda_layout.h"
#include "src/codecs/vecinfer/format.h"
#include "src/math/centroids.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"
#include "veloxquant/cuda.h"

namespace veloxquant::cuda {
namespace {

using vecinfer::kStepTokens;

constexpr int kThreads = 256;
constexpr int kCentroids = 256;                  // of 8-bit codes, at most
constexpr int kGroup = kThreads / kBlockTokens;  // sub-vectors that are encoded side by side

__device__ int code_offset(bool keys, int n_chunks, int token, int m) {
  const int step = token / kStepTokens * vecinfer::fragment_step_bytes(n_chunks);
  return step + (keys ? vecinfer::key_offset(n_chunks, token % kStepTokens, m)
                      : vecinfer::value_offset(n_chunks, token % kStepTokens, m));
}

// One CTA a block of 64 tokens. Portable: row m holds the codes of 64 tokens.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* portable, uint8_t* fragments, int64_t pair_stride, int n_blocks,
                int n_subvectors, int n_chunks, bool keys, bool unpack, uint8_t* portable_out) {
  const int64_t pair = blockIdx.y;
  const int block = blockIdx.x;
  const int64_t at = (pair * n_blocks + block) * n_subvectors * kBlockTokens;
  uint8_t* to = fragments + pair * pair_stride + static_cast<int64_t>(block) * 512 * n_chunks;
  for (int e = threadIdx.x; e < 512 * n_chunks; e += kThreads) {
    const int m = e / kBlockTokens, token = e % kBlockTokens;
    const int offset = code_offset(keys, n_chunks, token, m);
    if (unpack) {
      if (m < n_subvectors) portable_out[at + e] = to[offset];
    } else {
      to[offset] = m < n_subvectors ? portable[at + e] : 0;
    }
  }
}

struct EncodeParams {
  const uint8_t* blob;
  SideFormat format;
  const void* x;
  int64_t x_batch, x_head, x_token;
  uint8_t* codes;
  int64_t batch_stride, head_stride;
  int n_tokens, first_block, type;  // 0 fp32, 1 fp16, 2 bf16
};

// NaN becomes 0, infinity the largest finite value, as in the cache's append.
__device__ float load_clean(const void* data, int64_t at, int type) {
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

// One CTA a block of 64 tokens of one sequence and head. Shared: x and y [D][64], tables
// [kGroup][256][d].
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ EncodeParams p) {
  extern __shared__ float shared[];
  const SideFormat& f = p.format;
  const int D = f.head_dim, t = threadIdx.x;
  const int head = blockIdx.y % f.n_kv_heads, sequence = blockIdx.y / f.n_kv_heads;
  const int first = blockIdx.x * kBlockTokens, count = min(kBlockTokens, p.n_tokens - first);
  float* x = shared;
  float* y = x + D * kBlockTokens;
  float* tables = y + D * kBlockTokens;
  uint8_t* codes = reinterpret_cast<uint8_t*>(tables + kGroup * kCentroids * f.sub_dim);

  for (int e = t; e < D * kBlockTokens; e += kThreads) {
    const int token = e / D, d = e % D;
    float value = 0.0f;
    if (token < count) {
      value = load_clean(
          p.x, sequence * p.x_batch + head * p.x_head + (first + token) * p.x_token + d, p.type);
    }
    if (f.has_scale) {
      value = mul(value, reinterpret_cast<const float*>(p.blob + f.inverse_lambda)[head * D + d]);
    }
    x[d * kBlockTokens + token] = value;
  }
  for (int e = t; e < 512 * f.n_chunks; e += kThreads) codes[e] = 0;
  __syncthreads();

  if (f.transform == TransformKind::hadamard) {
    for (int start = 0; start < D;) {
      const int block = hadamard_block(D - start);
      for (int stride = 1; stride < block; stride *= 2) {
        for (int e = t; e < block / 2 * kBlockTokens; e += kThreads) {
          const int k = e / kBlockTokens, token = e % kBlockTokens;
          float* low = x + (start + 2 * stride * (k / stride) + k % stride) * kBlockTokens + token;
          const float a = low[0], b = low[stride * kBlockTokens];
          low[0] = a + b;
          low[stride * kBlockTokens] = a - b;
        }
        __syncthreads();
      }
      const float scale = hadamard_scale(block);
      for (int e = t; e < block * kBlockTokens; e += kThreads) {
        x[start * kBlockTokens + e] = mul(x[start * kBlockTokens + e], scale);
      }
      __syncthreads();
      start += block;
    }
  } else if (f.transform == TransformKind::dense) {
    const float* matrix = reinterpret_cast<const float*>(p.blob + f.encode_matrix) +
                          static_cast<int64_t>(head) * D * D;
    // A thread: one output dimension of 16 tokens.
    constexpr int kTokens = 16;
    for (int e = t; e < D * (kBlockTokens / kTokens); e += kThreads) {
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
      reinterpret_cast<const uint16_t*>(p.blob + f.tables) +
      (static_cast<int64_t>(f.n_sequences == 1 ? 0 : sequence) * f.n_kv_heads + head) * f.n_tables *
          table_floats;
  for (int m0 = 0; m0 < f.n_subvectors; m0 += kGroup) {
    __syncthreads();
    if (m0 == 0 || f.n_tables > 1) {
      for (int e = t; e < kGroup * table_floats; e += kThreads) {
        const int m = m0 + static_cast<int>(e / table_floats);
        const int source = f.n_tables == 1 ? 0 : min(m, f.n_subvectors - 1);
        tables[e] = f16_to_f32(head_tables[source * table_floats + e % table_floats]);
      }
      __syncthreads();
    }
    const int m = m0 + t / kBlockTokens, token = t % kBlockTokens;
    if (m < f.n_subvectors) {
      float distance;
      const uint32_t code = nearest_centroid(x + m * f.sub_dim * kBlockTokens + token, kBlockTokens,
                                             tables + t / kBlockTokens * table_floats,
                                             f.n_centroids, f.sub_dim, &distance);
      codes[code_offset(f.side == Side::keys, f.n_chunks, token, m)] = static_cast<uint8_t>(code);
    }
  }
  __syncthreads();
  uint4* to =
      reinterpret_cast<uint4*>(p.codes + sequence * p.batch_stride + head * p.head_stride +
                               static_cast<int64_t>(p.first_block + blockIdx.x) * 512 * f.n_chunks);
  for (int e = t; e < 32 * f.n_chunks; e += kThreads)
    to[e] = reinterpret_cast<const uint4*>(codes)[e];
}

void launch_pack(const SideFormat& format, const uint8_t* portable, int64_t n_pairs, int n_blocks,
                 uint8_t* fragments, int64_t pair_stride, bool unpack, uint8_t* portable_out,
                 Stream stream) {
  backends::current_device();
  if (n_pairs == 0 || n_blocks == 0) return;
  require(n_pairs <= 65535, "[pack_blocks] n_pairs: got ", n_pairs, ", wanted at most 65535");
  pack_kernel<<<dim3(n_blocks, static_cast<unsigned>(n_pairs)), kThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(
      portable, fragments, pair_stride, n_blocks, format.n_subvectors, format.n_chunks,
      format.side == Side::keys, unpack, portable_out);
  backends::check(cudaGetLastError(), "pack_blocks");
}

}  // namespace

void pack_blocks(const SideFormat& format, const uint8_t* portable, int64_t n_pairs, int n_blocks,
                 uint8_t* fragments, int64_t pair_stride, Stream stream) {
  launch_pack(format, portable, n_pairs, n_blocks, fragments, pair_stride, false, nullptr, stream);
}

void unpack_blocks(const SideFormat& format, const uint8_t* fragments, int64_t n_pairs,
                   int n_blocks, int64_t pair_stride, uint8_t* portable, Stream stream) {
  launch_pack(format, nullptr, n_pairs, n_blocks, const_cast<uint8_t*>(fragments), pair_stride,
              true, portable, stream);
}

void encode_blocks(const PackedSide& packed, uint8_t* codes, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, Stream stream) {
  const backends::Device& device = backends::current_device();
  const SideFormat& f = packed.format;
  if (batch == 0 || n_tokens == 0) return;
  const int64_t pairs = int64_t{batch} * f.n_kv_heads;
  require(pairs <= 65535, "[encode_blocks] batch: got ", pairs,
          " sequences times heads, wanted at most 65535");
  require(f.n_sequences == 1 || f.n_sequences == batch, "[encode_blocks] batch: got ", batch,
          ", wanted ", f.n_sequences, ", for which there are tables");
  EncodeParams p;
  p.blob = static_cast<const uint8_t*>(packed.tables);
  p.format = f;
  p.x = x.data;
  p.x_batch = x.batch_stride;
  p.x_head = x.head_stride;
  p.x_token = x.token_stride;
  p.codes = codes;
  p.batch_stride = packed.batch_stride;
  p.head_stride = packed.head_stride;
  p.n_tokens = n_tokens;
  p.first_block = first_block;
  require(dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16,
          "[encode_blocks] dtype: got ", dtype_name(dtype),
          ", wanted float32, float16 or bfloat16");
  p.type = dtype == DType::float32 ? 0 : dtype == DType::float16 ? 1 : 2;
  const int shared =
      4 * (2 * f.head_dim * kBlockTokens + kGroup * kCentroids * f.sub_dim) + 512 * f.n_chunks;
  require(shared <= device.shared_per_block, "[encode_blocks] shared memory: got ",
          device.shared_per_block, " bytes a block, wanted ", shared);
  backends::check(
      cudaFuncSetAttribute(encode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
      "encode_blocks");
  const int n_blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
  encode_kernel<<<dim3(n_blocks, static_cast<unsigned>(pairs)), kThreads, shared,
                  static_cast<cudaStream_t>(stream)>>>(p);
  backends::check(cudaGetLastError(), "encode_blocks");
}

}  // namespace veloxquant::cuda
