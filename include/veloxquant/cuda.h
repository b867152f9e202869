// Decode attention on packed VecInfer codes on NVIDIA GPUs: raw device pointers, the caller's
// stream.
//
// Nothing here allocates device memory or synchronises; every call can be captured in a CUDA graph.
// The header needs no CUDA: a stream is a cudaStream_t passed as void*. In a library built without
// CUDA the functions that launch throw Error; what runs on the host (tables, layout) is there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "veloxquant/codec.h"
#include "veloxquant/tensor_view.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant::cuda {

using Stream = void*;

bool built();  // the kernels are in this library
std::string
device_name();  // of the current device, with its compute capability; throws Error without one

// How a table entry, one code, is kept in shared memory: an operand register.
enum class Entry : int32_t { int8x4 = 0, half2 = 1 };
// by_lane: a table for each lane of a warp, free of bank conflicts: sub-vector m uses table
// m % lane_tables(side) of a head; one table a head is the case of equal ones.
// by_subvector: any tables, one copy each; look-ups of a warp then meet in the banks.
enum class Lookup : int32_t { by_lane = 0, by_subvector = 1 };

constexpr int lane_tables(Side side) { return side == Side::keys ? 4 : 8; }

// One side of one layer as the kernels see it. Made by prepare_side.
struct SideFormat {
  Side side = Side::keys;
  int32_t n_kv_heads = 0, head_dim = 0, sub_dim = 0, n_subvectors = 0, n_chunks = 0;
  int32_t n_centroids = 0, n_sequences = 1, n_tables = 1;
  Entry entry = Entry::int8x4;
  Lookup lookup = Lookup::by_lane;
  TransformKind transform = TransformKind::none;
  bool has_scale = false;
  // Byte offsets in the blob; see cuda_tables.cpp.
  int64_t entries = 0, entries_stride = 0;  // one [sequence][head] after the other
  int64_t scales = 0;          // fp32 [sequence][head][8 n_chunks]: dimensions = entry * scale
  int64_t read_matrix = 0;     // fp32 [head][D][D]: q' = q F, or x = y F^T as [y][x]
  int64_t read_fragments = 0;  // the same as two terms in bf16, in operand order
  int64_t encode_matrix = 0;   // fp32 [head][D][D]
  int64_t lambda = 0, inverse_lambda = 0;  // fp32 [head][D]
  int64_t tables = 0;                      // fp16 [sequence][head][n_tables][C][d], for encode
  // Bytes of a block of 64 tokens of one KV head in fragment order.
  int64_t block_bytes() const { return int64_t{512} * n_chunks; }
};

// A blob that the caller copies to the device (16-byte aligned) and passes to the kernels.
struct PreparedSide {
  SideFormat format;
  std::vector<uint8_t> blob;
};

// tables, transform: as for make_vecinfer_codec, on the host. Takes 8-bit codes of sub-vectors of 2
// or 4 dimensions, head_dim up to 256. Tables of 4 dimensions must be int8 times a power of two
// each (round_tables_to_int8 makes them so). Throws Error for anything else.
PreparedSide prepare_side(Side side, int n_kv_heads, int head_dim, int n_subvectors,
                          const TensorView& tables, const Transform& transform);

// Rounds fp16 tables [..., C, d] in place, each table to int8 times its own power of two, which
// fp16 holds exactly: the rounded tables are the format. Returns the mean squared change over the
// mean square of the entries.
double round_tables_to_int8(const MutableTensorView& tables);

// Packed tokens of a batch in fragment order: block n of sequence b, head h begins at
// codes + b * batch_stride + h * head_stride + n * block_bytes(). Device pointers; strides in
// bytes.
struct PackedSide {
  SideFormat format;
  const void* tables = nullptr;  // the blob on the device
  const uint8_t* codes = nullptr;
  int64_t batch_stride = 0, head_stride = 0;
};

// Exact tokens [b][h][n][D], last stride 1; strides in elements. float16 or bfloat16.
struct ExactSide {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

struct DecodeArgs {
  int batch = 0, n_q_heads = 0;
  float scale = 1.0f;
  PackedSide keys, values;
  const int32_t* n_packed = nullptr;  // device [batch]: packed tokens of each sequence
  ExactSide exact_keys, exact_values;
  DType exact_dtype = DType::float16;
  const int32_t* n_exact = nullptr;  // device [batch]; null: none
  const void* q = nullptr;  // [batch][n_q_heads][D], fp32, fp16 or bf16, row-major; on 2 elements
  DType q_dtype = DType::float16;
  void* out = nullptr;  // [batch][n_q_heads][D]; on 2 elements
  DType out_dtype = DType::float16;
  float* lse = nullptr;  // [batch][n_q_heads], or null
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Bytes of scratch for decode_attention on the current device, in any state. One stream at a time
// may use it.
int64_t decode_workspace_bytes(const DecodeArgs& args);

// out = softmax(scale q K^T) V over every packed and exact token of each sequence; one query token
// a sequence. GQA up to 16 query heads a KV head, head_dim 64, 80, 96, 128, 256. A sequence without
// tokens gives out = 0, lse = -inf. q must be finite: what a row of another gives is not said.
// Bitwise deterministic for a device and a shape.
void decode_attention(const DecodeArgs& args, Stream stream);

// Portable blocks (src/codecs/vecinfer/format.h) -> fragment order and back, n_blocks of every
// [batch][head]; contiguous portable blocks, both on the device.
void pack_blocks(const SideFormat& format, const uint8_t* portable, int64_t n_pairs, int n_blocks,
                 uint8_t* fragments, int64_t pair_stride, Stream stream);
void unpack_blocks(const SideFormat& format, const uint8_t* fragments, int64_t n_pairs,
                   int n_blocks, int64_t pair_stride, uint8_t* portable, Stream stream);

// Encodes x [batch][heads][n][D] (last stride 1, strides in elements; fp32, fp16, bf16) into blocks
// first_block .. of a packed side; n a multiple of 64 or the rest of the last block. Equal codes to
// the CPU's, bit for bit. `codes` of `packed` is written.
void encode_blocks(const PackedSide& packed, uint8_t* codes, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, Stream stream);

// Blocks first_block .. of every [batch][head] -> codec coordinates, fp16 (the entries of the
// tables): y [batch][head][64 n_blocks][D], strides in elements. For attention of many queries, on
// keys with queries times F, on values with F^T applied to the result.
void decode_blocks(const PackedSide& packed, int batch, int first_block, int n_blocks, void* y,
                   int64_t y_batch_stride, int64_t y_head_stride, Stream stream);

// A decode step's append, all decided on the device. `lengths`: device int32 [4][batch]: packed and
// exact tokens of each sequence before the step, packed and exact ones after it. Exact storage is
// [batch][head][sinks + window + 64][D], in 16 bits: the sinks, then the tail in order.
//
// advance_lengths: what was after the last step is before this one; a sequence has one token more,
// and where that takes the last slot, 64 become packed. Once a step, for all layers.
void advance_lengths(int32_t* lengths, int batch, int sinks, int window, Stream stream);

struct AppendArgs {
  int batch = 0, sinks = 0, window = 0;
  const int32_t* lengths = nullptr;
  PackedSide keys, values;
  uint8_t *key_codes = nullptr, *value_codes = nullptr;  // as keys.codes, writable
  ExactSide exact_keys, exact_values;                    // written
  DType exact_dtype = DType::float16;
  ExactSide new_keys, new_values;  // [batch][head][1][D]; fp32, fp16, bf16
  DType dtype = DType::float16;
};

// Stores the token in 16 bits (NaN as 0, infinity as the largest), and where advance_lengths sealed
// a block, encodes the 64 oldest tokens of the tail and moves the others up. The codes are the
// CPU's, bit for bit. There must be room for the block.
void append_token(const AppendArgs& args, Stream stream);

}  // namespace veloxquant::cuda
