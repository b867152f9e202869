// The general path on NVIDIA GPUs: encode, decode, append and attention for every codec that
// has GPU kernels (vecinfer of any width, turboquant, turboquant_rvq, rabitq, qjl), on portable
// blocks or on the fragment order of cuda.h; masks, windows, any number of queries (decode, prefill
// over packed history), lengths of each sequence, paged blocks.
//
// The kernels are compiled by NVRTC when first needed (libnvrtc is loaded then; 0.5 to 3 s each)
// and kept for the process. After that a call allocates nothing, waits for nothing and can be
// captured in a CUDA graph; prepare_attend() compiles ahead. Errors as in cuda.h.
#pragma once

#include <memory>

#include "veloxquant/codec_spec.h"
#include "veloxquant/cuda.h"

namespace veloxquant::attention {
struct DeviceCodec;
}

namespace veloxquant::cuda {

// A codec for the device: made on the host, without a GPU. The caller copies the blob there,
// 16-byte aligned.
class GpuCodec {
 public:
  GpuCodec() = default;
  explicit GpuCodec(std::shared_ptr<const attention::DeviceCodec> codec)
      : codec_(std::move(codec)) {}
  bool empty() const { return codec_ == nullptr; }
  const attention::DeviceCodec& operator*() const { return *codec_; }
  const attention::DeviceCodec* operator->() const { return codec_.get(); }

  int64_t block_bytes() const;
  const std::vector<uint8_t>& blob() const;

 private:
  std::shared_ptr<const attention::DeviceCodec> codec_;
};

// Portable blocks of a codec (src/codecs/<name>/format.h). Throws Error for a method without GPU
// kernels.
GpuCodec prepare_codec(const CodecSpec& spec, const CodecTables& tables);
// The fragment order that cuda.h packs and encodes into; its blob is that of prepare_side. attend()
// runs decode_attention on such sides where that covers the call.
GpuCodec prepare_codec(const SideFormat& format);

// Packed tokens of a side: block n of sequence b and head h begins at
//   blocks + b sequence_stride + h head_stride + n block_stride                   or, with a table,
//   blocks + table[b][n] block_stride + h head_stride                 (bytes, multiples of 4)
struct BlockSide {
  GpuCodec codec;
  const void* blob = nullptr;  // on the device
  uint8_t* blocks = nullptr;   // written by encode_blocks and append_token alone
  int64_t sequence_stride = 0, head_stride = 0, block_stride = 0;
};

// int32 [batch][stride] on the device: which block of the pool is a sequence's n-th. Numbers
// outside [0, pool) are never followed out of the pool. Keys and values share it.
struct BlockTable {
  const int32_t* blocks = nullptr;
  int64_t stride = 0;
  int pool = 0;
};

// A sequence is, in order of positions: its first `sinks` exact tokens, its packed tokens, its
// other exact tokens (finite, as append_token() stores them). Its queries are its last positions,
// their own tokens included.
struct AttendArgs {
  int batch = 0, n_q_heads = 0, n_queries = 1;  // at most 65535 query rows of a KV head
  float scale = 1.0f;
  bool causal = true;
  int sliding_window = 0;      // > 0: a query at t sees positions > t - sliding_window
  float logit_softcap = 0.0f;  // > 0: scores become cap tanh(score / cap)
  BlockSide keys, values;
  BlockTable table;
  const int32_t* n_packed = nullptr;  // device [batch]; null: no packed tokens
  int64_t max_packed = 0;             // room for packed tokens: longer ones count as this
  ExactSide exact_keys, exact_values;
  DType exact_dtype = DType::float16;  // or bfloat16
  const int32_t* n_exact = nullptr;    // device [batch]; null: no exact tokens
  int64_t max_exact = 0;
  int sinks = 0;
  const void* q = nullptr;  // [batch][n_q_heads][n_queries][D], fp32, fp16 or bf16, row-major
  DType q_dtype = DType::float16;
  // Added to the scaled scores: fp32 [batch][n_q_heads][n_queries][position], strides in elements
  // (0 broadcasts), as long as the longest sequence. Null: none.
  const float* mask = nullptr;
  int64_t mask_strides[4] = {0, 0, 0, 1};
  const float* sink_logits = nullptr;  // device [n_q_heads]; null: none
  void* out = nullptr;                 // as q
  DType out_dtype = DType::float16;
  float* lse = nullptr;  // [batch][n_q_heads][n_queries]
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Bytes of scratch on the current device, in any state of the lengths. One stream at a time may use
// it.
int64_t attend_workspace_bytes(const AttendArgs& args);
// Compiles what attend() launches, so that it can be captured.
void prepare_attend(const AttendArgs& args);
// Which kernel attend() runs, and why not the faster one: "fast", or "general: ...".
std::string attend_kernel(const AttendArgs& args);
// out = softmax(scale q K^T + mask) V. Rows that see nothing: 0 and -inf (or the sink's logit).
// Bitwise deterministic for a device and a shape.
void attend(const AttendArgs& args, Stream stream);

// x [batch][heads][n][D] (last stride 1, finite; fp32, fp16, bf16) into blocks first_block .. of
// every sequence; n a multiple of 64 or the rest of the last block. The CPU's bytes.
void encode_blocks(const BlockSide& side, const BlockTable& table, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, Stream stream);
// Blocks first_block .. of every sequence -> codec coordinates, fp32: y [batch][heads]
// [64 n_blocks][D], strides in elements. The CPU's bits.
void decode_blocks(const BlockSide& side, const BlockTable& table, int batch, int first_block,
                   int n_blocks, float* y, int64_t y_batch_stride, int64_t y_head_stride,
                   Stream stream);

// As AppendArgs of cuda.h, with advance_lengths() before it once a step.
struct BlockAppendArgs {
  int batch = 0, sinks = 0, window = 0;
  const int32_t* lengths = nullptr;
  BlockSide keys, values;
  BlockTable table;
  ExactSide exact_keys, exact_values;  // written
  DType exact_dtype = DType::float16;
  ExactSide new_keys, new_values;  // [batch][head][1][D]; fp32, fp16, bf16
  DType dtype = DType::float16;
};
void prepare_append(const BlockAppendArgs& args);
void append_token(const BlockAppendArgs& args, Stream stream);

}  // namespace veloxquant::cuda
