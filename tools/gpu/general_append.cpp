// The general append, token by token, against the CPU's cache, byte for byte; and graphs.
#include <cstring>

#include "tools/gpu/general_device.h"
#include "veloxquant/cache.h"

using namespace veloxquant;
using test::CasePtr;

namespace {

struct Stream {
  cudaStream_t stream = nullptr;
  Stream() { cuda_ok(cudaStreamCreate(&stream), "stream"); }
  ~Stream() { cudaStreamDestroy(stream); }
};

// What `body` puts on the stream, launched n times.
template <class Body>
void replay(cudaStream_t stream, int n, const Body& body) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  body();
  cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
  cuda_ok(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  for (int i = 0; i < n; ++i) cuda_ok(cudaGraphLaunch(exec, stream), "launch");
  cuda_ok(cudaStreamSynchronize(stream), "replay");
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

}  // namespace

std::string general_append(const CasePtr& keys, const CasePtr& values, int batch, int n_tokens,
                           int sinks, int window, bool paged, bool captured) {
  const int64_t b = batch, h = keys->codec().n_kv_heads(), d = keys->codec().head_dim();
  const int64_t slots = sinks + window + kBlockTokens;
  const int n_blocks = n_tokens / 64 + 1, pool = batch * n_blocks + 2;
  KvCacheConfig config;
  config.batch = batch;
  config.n_kv_heads = static_cast<int>(h);
  config.head_dim = static_cast<int>(d);
  config.window = window;
  config.sinks = sinks;
  config.exact_dtype = DType::bfloat16;
  config.key_codec = keys->codec_ptr();
  config.value_codec = values->codec_ptr();
  KvCache cache(config);

  std::vector<int32_t> table(b * n_blocks);
  for (size_t i = 0; i < table.size(); ++i) table[i] = pool - 1 - static_cast<int32_t>(i);
  DeviceBuffer numbers(table), lengths(std::vector<int32_t>(4 * b, 0));
  cuda::BlockAppendArgs args;
  args.batch = batch;
  args.sinks = sinks;
  args.window = window;
  args.lengths = reinterpret_cast<const int32_t*>(lengths.get());
  args.exact_dtype = DType::bfloat16;
  args.dtype = captured ? DType::bfloat16 : DType::float32;
  if (paged) args.table = {reinterpret_cast<const int32_t*>(numbers.get()), n_blocks, pool};
  test::ExactRandom random(5);
  struct Side {
    const CasePtr& codec;
    std::vector<float> history;  // [n][B][H][D]
    std::unique_ptr<DeviceBuffer> blob, blocks, exact, tokens, now;
    cuda::BlockSide view;
  };
  Side sides[2] = {{keys, {}, {}, {}, {}, {}, {}, {}}, {values, {}, {}, {}, {}, {}, {}, {}}};
  for (Side& side : sides) {
    side.history = random.values(n_tokens * b * h * d);
    for (float& x : side.history) x = bf16_to_f32(f32_to_bf16(x));
    side.history[5 * b * h * d + 3] = std::numeric_limits<float>::infinity();
    side.history[6 * b * h * d + 3] = std::numeric_limits<float>::quiet_NaN();
    const cuda::GpuCodec codec = cuda::prepare_codec(side.codec->spec(), side.codec->tables());
    const int64_t bytes = codec.block_bytes();
    side.blob = std::make_unique<DeviceBuffer>(codec.blob());
    side.blocks = std::make_unique<DeviceBuffer>(pool * h * bytes);
    side.exact = std::make_unique<DeviceBuffer>(b * h * slots * d * 2);
    std::vector<uint8_t> x(side.history.size() * dtype_bytes(args.dtype));
    for (size_t i = 0; i < side.history.size(); ++i) {
      attention::store_element(x.data(), args.dtype, static_cast<int64_t>(i), side.history[i]);
    }
    side.tokens = std::make_unique<DeviceBuffer>(x);
    side.now = std::make_unique<DeviceBuffer>(b * h * d * dtype_bytes(args.dtype));
    side.view = {codec,
                 side.blob->get(),
                 side.blocks->get(),
                 h * n_blocks * bytes,
                 paged ? bytes : n_blocks * bytes,
                 paged ? h * bytes : bytes};
  }
  args.keys = sides[0].view;
  args.values = sides[1].view;
  args.exact_keys = {sides[0].exact->get(), h * slots * d, slots * d, d};
  args.exact_values = {sides[1].exact->get(), h * slots * d, slots * d, d};
  args.new_keys = {sides[0].now->get(), h * d, d, d};
  args.new_values = {sides[1].now->get(), h * d, d, d};
  const int64_t row = b * h * d * dtype_bytes(args.dtype);
  Stream stream;
  cuda::prepare_append(args);
  const auto step = [&] {
    cuda::advance_lengths(reinterpret_cast<int32_t*>(lengths.get()), batch, sinks, window,
                          stream.stream);
    cuda::append_token(args, stream.stream);
  };
  for (int t = 0; t < n_tokens; ++t) {
    for (Side& side : sides) {
      cuda_ok(cudaMemcpyAsync(side.now->get(), side.tokens->get() + t * row, row,
                              cudaMemcpyDeviceToDevice, stream.stream),
              "copy");
    }
    if (captured && t % 64 == 0) {  // one graph goes on by itself
      replay(stream.stream, 1, step);
    } else {
      step();
    }
    const auto on_host = [&](const Side& side) {
      return TensorView(side.history.data() + t * b * h * d, DType::float32, {b, h, 1, d});
    };
    cache.append(on_host(sides[0]), on_host(sides[1]));
  }
  cuda_ok(cudaStreamSynchronize(stream.stream), "append_token");

  const KeyValueSource source = cache.source();
  const int64_t sealed = source.packed.empty() ? 0 : source.packed[0].n_blocks;
  const std::vector<int32_t> counts = lengths.host<int32_t>();
  for (int64_t i = 0; i < b; ++i) {
    if (counts[2 * b + i] != 64 * sealed || counts[3 * b + i] != n_tokens - 64 * sealed)
      return "lengths differ";
  }
  if (sealed == 0) return "no block was sealed";
  for (int k = 0; k < 2; ++k) {
    const Side& side = sides[k];
    if (!side.blocks->guards_intact() || !side.exact->guards_intact()) return "wrote outside";
    const int64_t bytes = side.view.codec.block_bytes();
    const std::vector<uint8_t> blocks = side.blocks->host<uint8_t>();
    const std::vector<uint16_t> exact = side.exact->host<uint16_t>();
    for (int64_t pair = 0; pair < b * h; ++pair) {
      const int64_t sequence = pair / h, head = pair % h;
      const uint8_t* want =
          (k == 0 ? source.packed[0].keys : source.packed[0].values) + pair * sealed * bytes;
      for (int64_t n = 0; n < sealed; ++n) {
        const int64_t at = paged ? table[sequence * n_blocks + n] * side.view.block_stride
                                 : sequence * side.view.sequence_stride + n * bytes;
        if (std::memcmp(want + n * bytes, blocks.data() + at + head * side.view.head_stride,
                        bytes) != 0)
          return k == 0 ? "codes of keys differ" : "codes of values differ";
      }
      int64_t slot = 0;
      for (const ExactRun& run : source.exact) {
        const TensorView& view = k == 0 ? run.keys : run.values;
        for (int64_t t = 0; t < view.shape[2]; ++t, ++slot) {
          if (std::memcmp(view.at(sequence, head, t), exact.data() + (pair * slots + slot) * d,
                          2 * d) != 0)
            return "exact tokens differ";
        }
      }
    }
  }
  return {};
}

std::string general_graph() {
  test::RaggedCase c;
  c.n_packed = {300, 65};
  c.n_exact = {20, 70};
  c.n_queries = 7;  // a shape of its own: nothing has compiled it
  const test::RaggedProblem p(c, test::ragged_codec("turboquant", "3", Side::keys, 72),
                              test::ragged_codec("turboquant", "3", Side::values, 72));
  DeviceProblem device(p, DType::float16);
  Stream stream;
  std::string refused;
  cudaGraph_t graph;
  cuda_ok(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeThreadLocal), "capture");
  try {
    cuda::attend(device.args, stream.stream);
  } catch (const Error& error) {
    refused = error.what();
  }
  cuda_ok(cudaStreamEndCapture(stream.stream, &graph), "capture");
  cudaGraphDestroy(graph);
  if (refused.find("captured") == std::string::npos) return "compiled while captured: " + refused;
  cuda::prepare_attend(device.args);
  device.poison();
  cuda::attend(device.args, stream.stream);
  cuda_ok(cudaStreamSynchronize(stream.stream), "attend");
  const std::vector<float> want = device.output();
  device.poison();
  replay(stream.stream, 5, [&] { cuda::attend(device.args, stream.stream); });
  return device.output() == want ? "" : "a replay differs";
}
