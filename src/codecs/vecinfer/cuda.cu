// VecInfer on the device: encode into fragment order, decode, and portable blocks to fragment order
// and back.
#include <cuda_fp16.h>

#include "src/backends/cuda/check.h"
#include "src/codecs/vecinfer/cuda_encode.cuh"

namespace veloxquant::cuda {
namespace {

constexpr int kThreads = 256;

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

// One CTA a block of 64 tokens of one sequence and head.
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(const __grid_constant__ EncodeParams p) {
  extern __shared__ __align__(16) float shared[];
  const SideFormat& f = p.format;
  const int head = blockIdx.y % f.n_kv_heads, sequence = blockIdx.y / f.n_kv_heads;
  const int first = blockIdx.x * kBlockTokens;
  const auto load = [&](int token, int d) {
    return load_clean(p.x, sequence * p.x_batch + head * p.x_head + (first + token) * p.x_token + d,
                      p.type);
  };
  encode_block(f, p.blob, head, sequence, min(kBlockTokens, p.n_tokens - first), load, shared,
               p.codes + sequence * p.batch_stride + head * p.head_stride +
                   static_cast<int64_t>(p.first_block + blockIdx.x) * block_stride(f));
}

struct DecodeBlocksParams {
  const uint8_t* blob;
  SideFormat format;
  const uint8_t* codes;
  int64_t batch_stride, head_stride, y_batch, y_head;
  uint16_t* y;
  int first_block;
};

// One CTA a block of 64 tokens of one sequence and head: codes -> fp16 entries, token by token.
__global__ void __launch_bounds__(kThreads)
    decode_blocks_kernel(const __grid_constant__ DecodeBlocksParams p) {
  const SideFormat& f = p.format;
  const int head = blockIdx.y % f.n_kv_heads, sequence = blockIdx.y / f.n_kv_heads;
  const int words = f.sub_dim / 2;  // of 4 bytes, a sub-vector
  const uint8_t* codes = p.codes + sequence * p.batch_stride + head * p.head_stride +
                         static_cast<int64_t>(p.first_block + blockIdx.x) * block_stride(f);
  const uint32_t* tables =
      reinterpret_cast<const uint32_t*>(p.blob + f.tables) +
      (static_cast<int64_t>(f.n_sequences == 1 ? 0 : sequence) * f.n_kv_heads + head) * f.n_tables *
          f.n_centroids * words;
  uint32_t* y =
      reinterpret_cast<uint32_t*>(p.y + sequence * p.y_batch + head * p.y_head +
                                  static_cast<int64_t>(blockIdx.x) * kBlockTokens * f.head_dim);
  const int row_words = f.head_dim / 2;
  for (int e = threadIdx.x; e < kBlockTokens * row_words; e += kThreads) {
    const int token = e / row_words, word = e % row_words, m = word / words;
    const int code =
        min(static_cast<int>(codes[code_offset(f.side == Side::keys, f.n_chunks, token, m)]),
            f.n_centroids - 1);
    y[e] =
        __ldg(tables + ((f.n_tables == 1 ? 0 : m) * f.n_centroids + code) * words + word % words);
  }
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
  const int shared = encode_shared_bytes(f);
  require(shared <= device.shared_per_block, "[encode_blocks] shared memory: got ",
          device.shared_per_block, " bytes a block, wanted ", shared);
  backends::check(
      cudaFuncSetAttribute(encode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
      "encode_blocks");
  const int n_blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
  encode_kernel<<<dim3(n_blocks, static_cast<unsigned>(pairs)), kEncodeThreads, shared,
                  static_cast<cudaStream_t>(stream)>>>(p);
  backends::check(cudaGetLastError(), "encode_blocks");
}

void decode_blocks(const PackedSide& packed, int batch, int first_block, int n_blocks, void* y,
                   int64_t y_batch_stride, int64_t y_head_stride, Stream stream) {
  backends::current_device();
  const SideFormat& f = packed.format;
  if (batch == 0 || n_blocks == 0) return;
  const int64_t pairs = int64_t{batch} * f.n_kv_heads;
  require(pairs <= 65535, "[decode_blocks] batch: got ", pairs,
          " sequences times heads, wanted at most 65535");
  require(f.n_sequences == 1 || f.n_sequences == batch, "[decode_blocks] batch: got ", batch,
          ", wanted ", f.n_sequences, ", for which there are tables");
  require(
      reinterpret_cast<uintptr_t>(y) % 4 == 0 && y_batch_stride % 2 == 0 && y_head_stride % 2 == 0,
      "[decode_blocks] y: got an address or strides off 4 bytes, wanted multiples of 4");
  DecodeBlocksParams p;
  p.blob = static_cast<const uint8_t*>(packed.tables);
  p.format = f;
  p.codes = packed.codes;
  p.batch_stride = packed.batch_stride;
  p.head_stride = packed.head_stride;
  p.y = static_cast<uint16_t*>(y);
  p.y_batch = y_batch_stride;
  p.y_head = y_head_stride;
  p.first_block = first_block;
  decode_blocks_kernel<<<dim3(n_blocks, static_cast<unsigned>(pairs)), kThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(p);
  backends::check(cudaGetLastError(), "decode_blocks");
}

}  // namespace veloxquant::cuda
