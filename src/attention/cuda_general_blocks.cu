// Encode and decode of blocks of any codec on CUDA (veloxquant/cuda_general.h).
#include <functional>
#include <map>
#include <mutex>

#include "src/attention/cuda_general_blocks.h"
#include "src/backends/cuda/check.h"

namespace veloxquant::cuda {
namespace {

using backends::CudaKernel;
using metal::Type;

struct Ready {
  const CudaKernel* kernel = nullptr;
  metal::Launch launch;
};

// Codes are exact: no fused multiply-add.
const Ready& ready(std::vector<int64_t> key, const Inputs& in, Stream stream,
                   const std::function<metal::Call()>& make) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Ready> known;
  int device = 0;
  backends::check(cudaGetDevice(&device), "cuda");
  key.push_back(device);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto it = known.find(key);
    if (it != known.end()) return it->second;
  }
  const metal::Call call = make();
  Ready made{&CudaKernel::get(call, in.types(), false, stream), call.launch};
  const std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(std::move(key), std::move(made)).first->second;
}

PlacedShape shape_of(const BlockSide& side, const BlockTable& table, int batch) {
  const attention::DeviceCodec& codec = *side.codec;
  PlacedShape s;
  s.kernels = codec.kernels;
  s.batch = batch;
  s.heads = codec.n_kv_heads;
  s.n_sequences = codec.n_sequences;
  s.paged = table.blocks != nullptr;
  return s;
}

// What the texts of blocks follow from; numbers of the launch apart.
std::vector<int64_t> key_of(const PlacedShape& s, int n_blocks, int what, Type type) {
  std::vector<int64_t> key = {
      what,    static_cast<int>(type), n_blocks, s.batch,
      s.heads, s.n_sequences,          s.paged,  static_cast<int64_t>(s.kernels.index())};
  if (const auto* k = std::get_if<vecinfer::BlockShape>(&s.kernels)) {
    key.insert(key.end(), {k->dim, k->sub_dim, k->n_centroids, k->bits, k->tables, k->transform});
  } else if (const auto* k = std::get_if<turboquant::BlockKernelShape>(&s.kernels)) {
    key.insert(key.end(),
               {k->dim, k->stages, k->bits, static_cast<int>(k->scale), k->prod, k->by_token});
  } else if (const auto* k = std::get_if<rabitq::BlockKernelShape>(&s.kernels)) {
    key.insert(key.end(), {k->dim, k->bits, static_cast<int>(k->scale), k->mean});
  } else if (const auto* k = std::get_if<qjl::BlockKernelShape>(&s.kernels)) {
    key.insert(key.end(),
               {k->dim, k->layout.m, k->layout.m_out, k->layout.n_channels, k->outliers, k->dense});
  }
  return key;
}

struct Places {
  std::array<int64_t, 3> steps;
  std::array<int32_t, kRangeNumbers> range;
};

Places places_of(const BlockSide& side, const BlockTable& table, int n_tokens, int first_block) {
  return {{side.sequence_stride, side.head_stride, side.block_stride},
          {n_tokens, first_block, table.pool, static_cast<int32_t>(table.stride)}};
}

void check_call(const char* function, const BlockSide& side, const BlockTable& table, int batch,
                int n, int first_block) {
  backends::current_device();
  require(!side.codec.empty(), "[", function, "] side: got no codec, wanted one of prepare_codec");
  require(side.codec->no_blocks.empty(), "[", function, "] side: got ", side.codec->name, ", but ",
          side.codec->no_blocks, ", wanted a codec whose blocks the general kernels make");
  check_blocks(function, "side", side, table);
  require(batch >= 1 && n >= 1 && first_block >= 0, "[", function, "] batch, n, first_block: got ",
          batch, ", ", n, ", ", first_block, ", wanted at least 1, 1 and 0");
  require(side.codec->n_sequences == 1 || side.codec->n_sequences == batch, "[", function,
          "] batch: got ", batch, ", wanted ", side.codec->n_sequences,
          ", for which there are tables");
  require(int64_t{batch} * side.codec->n_kv_heads <= 65535, "[", function, "] batch: got ", batch,
          " of ", side.codec->n_kv_heads, " KV heads, wanted at most 65535 in all");
}

}  // namespace

void launch_encode(const BlockSide& side, const BlockTable& table, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, const int32_t* seal, Stream stream,
                   bool only_compile) {
  check_call("encode_blocks", side, table, batch, n_tokens, first_block);
  const Type type = float_type("encode_blocks", "dtype", dtype);
  const int n_blocks = (n_tokens + 63) / 64;
  require(n_blocks <= 65535, "[encode_blocks] n_tokens: got ", n_tokens,
          ", wanted at most 65535 blocks in one call");
  PlacedShape s = shape_of(side, table, batch);
  s.seal = seal != nullptr;
  const Places places = places_of(side, table, n_tokens, first_block);
  const std::array<int64_t, 3> x_steps = {x.batch_stride, x.head_stride, x.token_stride};
  Inputs in;
  in.add(type, x.data, {});
  in.add_numbers(Type::int64, x_steps.data(), 3);
  in.add_numbers(Type::int64, places.steps.data(), 3);
  in.add_numbers(Type::int32, places.range.data(), kRangeNumbers);
  if (s.paged) in.add(Type::int32, table.blocks, {});
  if (s.seal) in.add(Type::int32, seal, {4, batch});
  for (const auto& array : side.codec->encode_arrays) in.add_blob(side, array);
  const Ready& made = ready(key_of(s, n_blocks, s.seal ? 1 : 0, type), in, stream,
                            [&] { return placed_encode_call(s, n_blocks); });
  if (only_compile) return;
  void* const out[] = {side.blocks};
  made.kernel->launch(made.launch, in.arguments(), out, stream);
}

void encode_blocks(const BlockSide& side, const BlockTable& table, int batch, const ExactSide& x,
                   DType dtype, int n_tokens, int first_block, Stream stream) {
  require(x.data != nullptr, "[encode_blocks] x: got null, wanted a device pointer");
  launch_encode(side, table, batch, x, dtype, n_tokens, first_block, nullptr, stream, false);
}

void decode_blocks(const BlockSide& side, const BlockTable& table, int batch, int first_block,
                   int n_blocks, float* y, int64_t y_batch_stride, int64_t y_head_stride,
                   Stream stream) {
  check_call("decode_blocks", side, table, batch, n_blocks, first_block);
  require(y != nullptr, "[decode_blocks] y: got null, wanted a device pointer");
  const PlacedShape s = shape_of(side, table, batch);
  const Places places = places_of(side, table, 64 * n_blocks, first_block);
  const std::array<int64_t, 2> out_steps = {y_batch_stride, y_head_stride};
  Inputs in;
  in.add(Type::uint8, side.blocks, {});
  in.add_numbers(Type::int64, out_steps.data(), 2);
  in.add_numbers(Type::int64, places.steps.data(), 3);
  in.add_numbers(Type::int32, places.range.data(), kRangeNumbers);
  if (s.paged) in.add(Type::int32, table.blocks, {});
  for (const auto& array : side.codec->decode_arrays) in.add_blob(side, array);
  const Ready& made = ready(key_of(s, n_blocks, 2, Type::uint8), in, stream,
                            [&] { return placed_decode_call(s, n_blocks); });
  void* const out[] = {y};
  made.kernel->launch(made.launch, in.arguments(), out, stream);
}

}  // namespace veloxquant::cuda
