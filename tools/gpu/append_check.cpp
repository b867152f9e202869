// The device's append, token by token, and decode_blocks, against the CPU's cache: byte for byte.
#include <cstring>

#include "tools/gpu/problem.h"
#include "veloxquant/cache.h"

using namespace veloxquant;

std::string append_problem(const ProblemShape& shape, int n_tokens, int sinks, int window) {
  Problem problem(shape);
  const int64_t b = problem.batch(), h = shape.n_kv_heads, d = shape.head_dim;
  const int64_t slots = sinks + window + kBlockTokens, tokens = 64 * problem.max_blocks;
  const int n_blocks = n_tokens / 64 + 1;
  const DType dtype = shape.bf16 ? DType::bfloat16 : DType::float16;

  KvCacheConfig config;
  config.batch = static_cast<int>(b);
  config.n_kv_heads = shape.n_kv_heads;
  config.head_dim = shape.head_dim;
  config.window = window;
  config.sinks = sinks;
  config.exact_dtype = dtype;
  config.key_codec = problem.keys.codec(0, shape);
  config.value_codec = problem.values.codec(0, shape);
  KvCache cache(config);

  DeviceBuffer lengths(std::vector<int32_t>(4 * b, 0));
  struct Side {
    Problem::SideData* data;
    std::unique_ptr<DeviceBuffer> codes, exact, history;
  };
  Side sides[2] = {{&problem.keys, nullptr, nullptr, nullptr},
                   {&problem.values, nullptr, nullptr, nullptr}};
  for (Side& side : sides) {
    // What no number is must be stored as the CPU stores it.
    side.data->history[5 * d + 3] = shape.bf16 ? 0x7f80 : 0x7c00;
    side.data->history[6 * d + 3] = shape.bf16 ? 0xffc0 : 0xfe00;
    side.codes =
        std::make_unique<DeviceBuffer>(b * h * n_blocks * side.data->prepared.format.block_bytes());
    side.exact = std::make_unique<DeviceBuffer>(b * h * slots * d * 2);
    side.history = std::make_unique<DeviceBuffer>(side.data->history);
  }
  cuda::AppendArgs args;
  args.batch = static_cast<int>(b);
  args.sinks = sinks;
  args.window = window;
  args.lengths = reinterpret_cast<const int32_t*>(lengths.get());
  args.exact_dtype = args.dtype = dtype;
  const auto packed = [&](const Side& side) {
    cuda::PackedSide p;
    p.format = side.data->prepared.format;
    p.tables = side.data->blob->get();
    p.codes = side.codes->get();
    p.head_stride = n_blocks * p.format.block_bytes();
    p.batch_stride = h * p.head_stride;
    return p;
  };
  args.keys = packed(sides[0]);
  args.values = packed(sides[1]);
  args.key_codes = sides[0].codes->get();
  args.value_codes = sides[1].codes->get();
  args.exact_keys = {sides[0].exact->get(), h * slots * d, slots * d, d};
  args.exact_values = {sides[1].exact->get(), h * slots * d, slots * d, d};
  for (int t = 0; t < n_tokens; ++t) {
    const auto on_host = [&](const Side& side) {
      TensorView view(side.data->history.data() + t * d, dtype, {b, h, 1, d});
      view.stride = {h * tokens * d, tokens * d, d, 1};
      return view;
    };
    cache.append(on_host(sides[0]), on_host(sides[1]));
    const auto on_device = [&](const Side& side) {
      return cuda::ExactSide{side.history->get() + 2 * t * d, h * tokens * d, tokens * d, d};
    };
    args.new_keys = on_device(sides[0]);
    args.new_values = on_device(sides[1]);
    cuda::advance_lengths(reinterpret_cast<int32_t*>(lengths.get()), args.batch, sinks, window,
                          nullptr);
    cuda::append_token(args, nullptr);
  }
  cuda_ok(cudaDeviceSynchronize(), "append_token");

  const KeyValueSource source = cache.source();
  const int64_t sealed = source.packed.empty() ? 0 : source.packed[0].n_blocks;
  const std::vector<int32_t> counts = lengths.host<int32_t>();
  for (int64_t row = 0; row < b; ++row) {
    if (counts[2 * b + row] != 64 * sealed || counts[3 * b + row] != n_tokens - 64 * sealed)
      return "lengths differ";
  }
  for (int k = 0; k < 2; ++k) {
    const Side& side = sides[k];
    if (!side.codes->guards_intact() || !side.exact->guards_intact()) return "wrote outside";
    const cuda::PackedSide p = k == 0 ? args.keys : args.values;
    const int64_t bytes = 64 * side.data->n_subvectors;
    DeviceBuffer portable(b * h * n_blocks * bytes);
    cuda::unpack_blocks(p.format, side.codes->get(), b * h, n_blocks, p.head_stride, portable.get(),
                        nullptr);
    const std::vector<uint8_t> blocks = portable.host<uint8_t>();
    const std::vector<uint16_t> exact = side.exact->host<uint16_t>();
    const CodecPtr codec = k == 0 ? config.key_codec : config.value_codec;
    DeviceBuffer y(std::max<int64_t>(b * h * sealed * 64 * d, 1) * 2);
    cuda::decode_blocks(p, args.batch, 0, static_cast<int>(sealed), y.get(), h * sealed * 64 * d,
                        sealed * 64 * d, nullptr);
    const std::vector<uint16_t> decoded = y.host<uint16_t>();
    if (!y.guards_intact()) return "decode_blocks wrote outside";
    for (int64_t pair = 0; pair < b * h; ++pair) {
      if (sealed > 0) {
        const PackedRun& run = source.packed[0];
        const uint8_t* want = (k == 0 ? run.keys : run.values) + pair * sealed * bytes;
        if (std::memcmp(want, blocks.data() + pair * n_blocks * bytes, sealed * bytes) != 0)
          return k == 0 ? "codes of keys differ" : "codes of values differ";
        std::vector<float> rows(64 * d);
        for (int64_t n = 0; n < sealed; ++n) {
          codec->decode_block(default_backend(), {0, static_cast<int>(pair % h), 0},
                              want + n * bytes, 64, rows.data(), d);
          for (int64_t e = 0; e < 64 * d; ++e) {
            if (f16_to_f32(decoded[(pair * sealed + n) * 64 * d + e]) != rows[e])
              return "decode_blocks differs";
          }
        }
      }
      int64_t slot = 0;
      for (const ExactRun& run : source.exact) {
        const TensorView& view = k == 0 ? run.keys : run.values;
        for (int64_t t = 0; t < view.shape[2]; ++t, ++slot) {
          if (std::memcmp(view.at(pair / h, pair % h, t), exact.data() + (pair * slots + slot) * d,
                          2 * d) != 0)
            return "exact tokens differ";
        }
      }
    }
  }
  return {};
}
