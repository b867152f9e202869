// A decode step's append on the device: one token for every sequence, and the block that it seals.
//
// Exact storage of a KV head is [sinks + window + 64][D], slots in the order of positions: sinks,
// then the tail. When the last slot is taken the 64 oldest tokens of the tail become a packed block
// and the others move up. All of it is decided by lengths on the device, so that a captured graph
// goes on by itself.
#include "src/attention/cuda_parts.cuh"
#include "src/backends/cuda/check.h"
#include "src/cache/cuda_append.cuh"

namespace veloxquant::cuda {
namespace {

struct AppendSide {
  SideFormat format;
  const uint8_t* blob;
  uint8_t* codes;
  int64_t batch_stride, head_stride;
  ExactRows exact;
};

struct AppendParams {
  AppendSide sides[2];
  const int32_t* lengths;
  int batch, sinks, capacity, x_type, exact_bf16;
};

__global__ void advance_kernel(int32_t* lengths, int batch, int capacity) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b >= batch) return;
  int packed = lengths[2 * batch + b], exact = lengths[3 * batch + b];
  lengths[b] = packed;
  lengths[batch + b] = exact;
  if (++exact == capacity) {
    exact -= kBlockTokens;
    packed += kBlockTokens;
  }
  lengths[2 * batch + b] = packed;
  lengths[3 * batch + b] = exact;
}

// One CTA a sequence, KV head and side.
__global__ void __launch_bounds__(kEncodeThreads)
    append_kernel(const __grid_constant__ AppendParams p) {
  extern __shared__ __align__(16) float shared[];
  const AppendSide& side = p.sides[blockIdx.y];
  const SideFormat& f = side.format;
  const int D = f.head_dim, t = threadIdx.x;
  const int head = blockIdx.x % f.n_kv_heads, sequence = blockIdx.x / f.n_kv_heads;
  // Attention comes next, and fetches its tables while a token is stored here.
  attention::cuda::let_next_start();
  attention::cuda::wait_for_stream();
  const int n_packed = p.lengths[sequence], n_exact = p.lengths[p.batch + sequence];
  side.exact.store(sequence, head, n_exact, D, p.x_type, p.exact_bf16, kEncodeThreads);
  if (n_exact + 1 < p.capacity) return;

  __syncthreads();
  const int type = p.exact_bf16 ? 2 : 1;
  const int64_t stride = side.exact.exact_token;
  uint16_t* rows = side.exact.rows(sequence, head);
  const uint16_t* oldest = rows + p.sinks * stride;
  const auto load = [&](int token, int d) { return load_clean(oldest, token * stride + d, type); };
  encode_block(f, side.blob, head, sequence, kBlockTokens, load, shared,
               side.codes + sequence * side.batch_stride + head * side.head_stride +
                   static_cast<int64_t>(n_packed / kBlockTokens) * block_stride(f));
  // 64 tokens at a time, so that no token is overwritten before it has moved.
  for (int to = p.sinks; to < p.capacity - kBlockTokens; to += kBlockTokens) {
    const int count = min(kBlockTokens, p.capacity - kBlockTokens - to);
    __syncthreads();
    for (int e = t; e < count * D; e += kEncodeThreads) {
      const int64_t token = to + e / D, d = e % D;
      rows[token * stride + d] = rows[(token + kBlockTokens) * stride + d];
    }
  }
}

}  // namespace

void advance_lengths(int32_t* lengths, int batch, int sinks, int window, Stream stream) {
  backends::current_device();
  require(batch >= 1 && sinks >= 0 && window >= 0, "[advance_lengths] batch, sinks, window: got ",
          batch, ", ", sinks, ", ", window, ", wanted at least 1, 0 and 0");
  advance_kernel<<<(batch + 127) / 128, 128, 0, static_cast<cudaStream_t>(stream)>>>(
      lengths, batch, sinks + window + kBlockTokens);
  backends::check(cudaGetLastError(), "advance_lengths");
}

void append_token(const AppendArgs& args, Stream stream) {
  const backends::Device& device = backends::current_device();
  const SideFormat &k = args.keys.format, &v = args.values.format;
  require(args.batch >= 1 && args.lengths != nullptr && args.sinks >= 0 && args.window >= 0,
          "[append_token] batch, lengths, sinks, window: got ", args.batch, ", ",
          args.lengths == nullptr ? "null" : "a pointer", ", ", args.sinks, ", ", args.window,
          ", wanted at least 1, a device pointer, 0 and 0");
  require(k.side == Side::keys && v.side == Side::values && k.n_kv_heads == v.n_kv_heads &&
              k.head_dim == v.head_dim,
          "[append_token] keys, values: got ", k.n_kv_heads, " heads of ", k.head_dim, " and ",
          v.n_kv_heads, " of ", v.head_dim, ", wanted a format of keys and one of values alike");
  const auto is_float = [](DType t) {
    return t == DType::float32 || t == DType::float16 || t == DType::bfloat16;
  };
  require(is_float(args.dtype) && is_float(args.exact_dtype) && args.exact_dtype != DType::float32,
          "[append_token] dtype, exact_dtype: got ", dtype_name(args.dtype), ", ",
          dtype_name(args.exact_dtype), ", wanted a float and float16 or bfloat16");
  AppendParams p;
  int shared = 0;
  const auto side = [&](const PackedSide& packed, uint8_t* codes, const ExactSide& exact,
                        const ExactSide& x) {
    require(packed.format.n_sequences == 1 || packed.format.n_sequences == args.batch,
            "[append_token] batch: got ", args.batch, ", wanted ", packed.format.n_sequences,
            ", for which there are tables");
    const AppendSide s{packed.format,
                       static_cast<const uint8_t*>(packed.tables),
                       codes,
                       packed.batch_stride,
                       packed.head_stride,
                       exact_rows(exact, x)};
    const int bytes = encode_shared_bytes(packed.format);
    if (bytes > shared) shared = bytes;
    return s;
  };
  p.sides[0] = side(args.keys, args.key_codes, args.exact_keys, args.new_keys);
  p.sides[1] = side(args.values, args.value_codes, args.exact_values, args.new_values);
  p.lengths = args.lengths;
  p.batch = args.batch;
  p.sinks = args.sinks;
  p.capacity = args.sinks + args.window + kBlockTokens;
  p.x_type = args.dtype == DType::float32 ? 0 : args.dtype == DType::float16 ? 1 : 2;
  p.exact_bf16 = args.exact_dtype == DType::bfloat16;
  require(shared <= device.shared_per_block, "[append_token] shared memory: got ",
          device.shared_per_block, " bytes a block, wanted ", shared);
  const auto set = [](cudaFuncAttribute attribute, int value) {
    backends::check(cudaFuncSetAttribute(append_kernel, attribute, value), "append_token");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  // As attention has it: a multiprocessor does not divide its memory anew between the two.
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.batch * k.n_kv_heads, 2);
  config.blockDim = dim3(kEncodeThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  backends::check(cudaLaunchKernelEx(&config, append_kernel, p), "append_token");
}

}  // namespace veloxquant::cuda
