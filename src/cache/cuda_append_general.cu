// A decode step's append for any codec with GPU kernels: as cuda_append.cu, the block that a step
// seals encoded by the codec's own kernel between two of ours.
#include "src/attention/cuda_general_blocks.h"
#include "src/backends/cuda/check.h"
#include "src/cache/cuda_append.cuh"

namespace veloxquant::cuda {
namespace {

constexpr int kThreads = 128;

struct Params {
  ExactRows sides[2];
  const int32_t* lengths;
  int batch, heads, dim, sinks, x_type, exact_bf16;
};

// One block of threads a sequence, KV head and side.
__global__ void __launch_bounds__(kThreads) store_token(const __grid_constant__ Params p) {
  const int head = blockIdx.x % p.heads, sequence = blockIdx.x / p.heads;
  p.sides[blockIdx.y].store(sequence, head, p.lengths[p.batch + sequence], p.dim, p.x_type,
                            p.exact_bf16, kThreads);
}

// The tail moves up by the block that was sealed. A thread moves its dimensions of every token in
// order: nothing is overwritten before it has moved.
__global__ void __launch_bounds__(kThreads) move_tail(const __grid_constant__ Params p) {
  const ExactRows& side = p.sides[blockIdx.y];
  const int head = blockIdx.x % p.heads, sequence = blockIdx.x / p.heads;
  if (p.lengths[2 * p.batch + sequence] == p.lengths[sequence]) return;
  const int end = p.lengths[3 * p.batch + sequence];
  uint16_t* rows = side.rows(sequence, head);
  for (int d = threadIdx.x; d < p.dim; d += kThreads) {
    for (int64_t t = p.sinks; t < end; ++t) {
      rows[t * side.exact_token + d] = rows[(t + kBlockTokens) * side.exact_token + d];
    }
  }
}

Params params_of(const BlockAppendArgs& args) {
  backends::current_device();
  require(!args.keys.codec.empty() && !args.values.codec.empty(),
          "[append_token] keys, values: got no codec, wanted one of prepare_codec each");
  const attention::DeviceCodec &k = *args.keys.codec, &v = *args.values.codec;
  require(k.side == Side::keys && v.side == Side::values && k.n_kv_heads == v.n_kv_heads &&
              k.head_dim == v.head_dim,
          "[append_token] keys, values: got ", k.n_kv_heads, " heads of ", k.head_dim, " and ",
          v.n_kv_heads, " of ", v.head_dim, ", wanted a codec of keys and one of values alike");
  require(args.batch >= 1 && args.lengths != nullptr && args.sinks >= 0 && args.window >= 0,
          "[append_token] batch, lengths, sinks, window: got ", args.batch, ", ",
          args.lengths == nullptr ? "null" : "a pointer", ", ", args.sinks, ", ", args.window,
          ", wanted at least 1, a device pointer, 0 and 0");
  float_type("append_token", "dtype", args.dtype);
  require(args.exact_dtype == DType::float16 || args.exact_dtype == DType::bfloat16,
          "[append_token] exact_dtype: got ", dtype_name(args.exact_dtype),
          ", wanted float16 or bfloat16");
  Params p;
  p.sides[0] = exact_rows(args.exact_keys, args.new_keys);
  p.sides[1] = exact_rows(args.exact_values, args.new_values);
  for (const ExactRows& rows : p.sides) {
    require(rows.exact != nullptr,
            "[append_token] exact_keys, exact_values: got null, wanted "
            "storage of sinks + window + 64 tokens a head");
  }
  p.lengths = args.lengths;
  p.batch = args.batch;
  p.heads = k.n_kv_heads;
  p.dim = k.head_dim;
  p.sinks = args.sinks;
  p.x_type = args.dtype == DType::float32 ? 0 : args.dtype == DType::float16 ? 1 : 2;
  p.exact_bf16 = args.exact_dtype == DType::bfloat16;
  return p;
}

// The 64 oldest tokens of the tail, where the step took the last slot.
void seal(const BlockAppendArgs& args, Stream stream, bool only_compile) {
  for (const auto& [side, exact] :
       {std::pair{&args.keys, &args.exact_keys}, std::pair{&args.values, &args.exact_values}}) {
    ExactSide oldest = *exact;
    oldest.data = static_cast<const uint16_t*>(exact->data) + args.sinks * exact->token_stride;
    launch_encode(*side, args.table, args.batch, oldest, args.exact_dtype, kBlockTokens, 0,
                  args.lengths, stream, only_compile);
  }
}

}  // namespace

void prepare_append(const BlockAppendArgs& args) {
  params_of(args);
  seal(args, nullptr, true);
}

void append_token(const BlockAppendArgs& args, Stream stream) {
  const Params p = params_of(args);
  require(args.new_keys.data != nullptr && args.new_values.data != nullptr,
          "[append_token] new_keys, new_values: got null, wanted device pointers");
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  const dim3 grid(args.batch * p.heads, 2);
  store_token<<<grid, kThreads, 0, at>>>(p);
  backends::check(cudaGetLastError(), "append_token");
  seal(args, stream, false);
  move_tail<<<grid, kThreads, 0, at>>>(p);
  backends::check(cudaGetLastError(), "append_token");
}

}  // namespace veloxquant::cuda
