#include "src/mlx/gpu_cache.h"

#include <mlx/backend/metal/metal.h>
#include <mlx/device.h>
#include <mlx/ops.h>

#include <algorithm>
#include <limits>
#include <string>
#include <variant>

#include "src/cache/kernel_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_codec.h"
#include "src/mlx/shared_numbers.h"
#include "src/mlx/views.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::DecodeShape;
using attention::Item;

// Threadgroups are cut for so many cores, into so many blocks at least.
constexpr int kCudaCores = 128, kCudaBlocks = 4;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What MLX says of a Mac: not how many cores it has, but its architecture.
int mac_cores() {
  static const int cores = [] {
    if (!mx::metal::is_available()) return attention::metal_cores("");
    const auto& info = mx::device_info(mx::Device::gpu);
    const auto found = info.find("architecture");
    const auto* name = found == info.end() ? nullptr : std::get_if<std::string>(&found->second);
    return attention::metal_cores(name == nullptr ? "" : *name);
  }();
  return cores;
}

void set_codecs(DecodeShape& shape, const GpuCodec& keys, const GpuCodec& values) {
  shape.keys = keys.format;
  shape.values = values.format;
  shape.key_transform = keys.transform;
  shape.value_transform = values.transform;
}

std::vector<Item> stretches_of(const Snapshot& keys) {
  const SnapshotLayout& layout = keys.layout;
  std::vector<Item> stretches;
  for (size_t i = 0; i < layout.packed.size(); ++i) {
    const PackedSpan& span = layout.packed[i];
    stretches.push_back({true, static_cast<int>(i), 0, static_cast<int>(span.end() - span.start),
                         static_cast<int>(span.start), keys.spans[i].shape(2)});
  }
  auto exact = [&](int source, int64_t first, int64_t count, int64_t position) {
    if (count <= 0) return;
    stretches.push_back({false, source, static_cast<int>(first), static_cast<int>(count),
                         static_cast<int>(position), 0});
  };
  if (keys.exact) {
    exact(0, 0, std::min<int64_t>(layout.exact_length, layout.sinks), 0);
    exact(0, layout.sinks, layout.exact_length - layout.exact_tail_start, layout.exact_tail_start);
  }
  if (keys.chunk) {
    exact(keys.exact ? 1 : 0, 0, layout.length - layout.chunk_start, layout.chunk_start);
  }
  return stretches;
}

// One call of attention, less its queries: what every part of them is given.
struct Attention {
  DecodeShape shape;
  const GpuCodec *keys = nullptr, *values = nullptr;  // with spans
  SnapshotLayout layout;
  AttentionMask visible;
  std::vector<Item> stretches;
  std::vector<mx::array> stored;  // the arrays of spans and exact tokens
  mx::array params, sinks;
  GpuStream gpu;
};

// Queries `first` .. of all: (out, log-sum-exp).
std::pair<mx::array, mx::array> attend_part(Attention& a, const mx::array& queries, int64_t first,
                                            const std::optional<mx::array>& mask) {
  DecodeShape& shape = a.shape;
  shape.n_queries = queries.shape(2);
  const std::vector<int32_t> seen = attention::seen_numbers(a.layout.visibility, a.visible, first,
                                                            shape.n_queries, a.layout.length);
  std::vector<Item> stretches;
  for (const Item& stretch : a.stretches) {
    const Item part = attention::seen_part(stretch, seen);
    if (part.count > 0) stretches.push_back(part);
  }
  std::vector<Item> items = planned(shape, stretches, a.gpu.gpu);
  if (items.empty()) {  // nothing is seen: an item without tokens
    items.push_back(a.stretches.front());
    items[0].count = 0;
  }
  const int packed = static_cast<int>(
      std::count_if(items.begin(), items.end(), [](const Item& item) { return item.packed; }));

  const mx::array q = dense_on(a.gpu.stream, queries, queries.dtype());
  std::vector<mx::array> inputs{q};
  if (a.keys != nullptr && shape.key_transform == 2) {
    const mx::array& matrix = *a.keys->query_matrix;
    inputs.push_back(
        launch(attention::turn_queries_call(shape, matrix.shape(0)), {q, matrix}, a.gpu)[0]);
  }
  inputs.insert(inputs.end(),
                {shared_ints(plan_numbers(items), 6), shared_ints(seen, 4), a.params});
  if (a.keys != nullptr) {
    inputs.insert(inputs.end(), {a.keys->smooth, a.keys->tables, a.values->tables});
  }
  inputs.insert(inputs.end(), a.stored.begin(), a.stored.end());
  if (mask) {
    inputs.push_back(mask->dtype() == mx::bool_
                         ? mx::where(*mask, mx::array(0.0f), mx::array(kNone), a.gpu.stream)
                         : *mask);
  }
  const int n_items = static_cast<int>(items.size());
  const std::vector<mx::array> parts =
      launch(attention::first_pass_call(shape, n_items), inputs, a.gpu);
  const std::vector<mx::array> out =
      launch(attention::second_pass_call(shape),
             {parts[0], parts[1], shared_ints({n_items, packed, shape.group}), a.sinks,
              a.values != nullptr ? a.values->inverse : a.params},
             a.gpu);
  return {out[0], out[1]};
}

}  // namespace

std::vector<Item> planned(const DecodeShape& shape, const std::vector<Item>& stretches, Gpu gpu) {
  const bool metal = gpu == Gpu::metal;
  return attention::plan_items(shape, stretches, metal ? mac_cores() : kCudaCores,
                               metal ? 1 : kCudaBlocks);
}

std::vector<int32_t> plan_numbers(const std::vector<Item>& items) {
  std::vector<int32_t> plan;
  for (const Item& item : items) {
    plan.insert(plan.end(), {item.packed ? 0 : 1, item.source, item.first, item.count,
                             item.position, item.capacity});
  }
  if (items.size() < 2) plan.resize(12, 0);  // at least two rows: see first_pass_call
  return plan;
}

std::optional<std::string> no_gpu_cache_because(const CodecArrays& keys,
                                                const CodecArrays& values) {
  for (const CodecArrays* codec : {&keys, &values}) {
    if (const auto* reason = std::get_if<std::string>(&gpu_codec(*codec))) return *reason;
  }
  DecodeShape shape;
  shape.n_kv_heads = keys.spec.n_kv_heads;
  shape.head_dim = keys.spec.head_dim;
  set_codecs(shape, std::get<GpuCodec>(gpu_codec(keys)), std::get<GpuCodec>(gpu_codec(values)));
  shape.n_spans = shape.n_exact = 1;
  return attention::no_decode_kernel_because(shape);
}

GpuAppend append_on_gpu(const mx::array& keys, const mx::array& values, const mx::array& exact_keys,
                        const mx::array& exact_values, const std::optional<mx::array>& nonfinite,
                        const CodecArrays& key_codec, const CodecArrays& value_codec,
                        const CacheGeometry& geometry, const AppendPlan& plan,
                        const GpuStream& gpu) {
  const int batch = keys.shape(0), heads = keys.shape(1);
  for (const CodecArrays* codec : {&key_codec, &value_codec}) {
    const int64_t sequences = codec->core->n_sequences();
    require(sequences == 1 || sequences == batch, "[append] keys: got ", batch,
            " sequences, wanted ", sequences, " as the tables of the codec have");
  }
  auto floats = [&](const mx::array& a) {
    return a.dtype() == core_float(a.dtype()) ? a : mx::astype(a, mx::float32, gpu.stream);
  };
  const mx::array counts =
      nonfinite ? *nonfinite
                : shared_ints(std::vector<int32_t>(2 * batch * heads, 0), batch * heads);
  const AppendShape shape{batch, heads, keys.shape(3), metal_type(exact_keys.dtype())};
  const std::vector<mx::array> out = launch(append_call(shape, geometry, plan),
                                            {floats(keys), floats(values), exact_keys, exact_values,
                                             counts, shared_ints(append_numbers(geometry, plan))},
                                            gpu);
  if (debug_enabled()) log_once("append: on the GPU, caches of " + key_codec.spec.method);
  GpuAppend append{{out[0], out[1]}, out[2]};
  for (int side = 0; side < 2 && plan.n_sealed > 0; ++side) {
    const auto& codec = std::get<GpuCodec>(gpu_codec(side == 0 ? key_codec : value_codec));
    append.outputs.push_back(codec.encode(out[3 + side], plan.tail_start, gpu));
  }
  return append;
}

std::optional<std::pair<mx::array, mx::array>> attend_on_gpu(
    const mx::array& q, const Snapshot& keys, const Snapshot& values, const AttendOptions& options,
    const std::optional<mx::array>& mask, mx::StreamOrDevice s) {
  const std::optional<GpuStream> gpu = gpu_stream(s);
  if (!gpu) return std::nullopt;
  const mx::Stream& stream = gpu->stream;
  auto on_cpu = [&](const std::string& because) {
    note_cpu("attend", s, because);
    return std::nullopt;
  };
  Attention a{{},
              nullptr,
              nullptr,
              keys.layout,
              {options.causal, options.sliding_window, {}},
              stretches_of(keys),
              {},
              shared_floats({options.scale, options.logit_softcap}),
              options.sinks ? dense_on(stream, *options.sinks, mx::float32)
                            : shared_floats(std::vector<float>(q.shape(1), kNone)),
              *gpu};
  const int n_queries = q.shape(2), n_spans = static_cast<int>(keys.spans.size());
  if (n_spans > 0) {
    if (auto reason = no_gpu_cache_because(*keys.codec, *values.codec)) return on_cpu(*reason);
    a.keys = &std::get<GpuCodec>(gpu_codec(*keys.codec));
    a.values = &std::get<GpuCodec>(gpu_codec(*values.codec));
    set_codecs(a.shape, *a.keys, *a.values);
  }
  DecodeShape& shape = a.shape;
  shape.batch = q.shape(0);
  shape.n_kv_heads = keys.codec->spec.n_kv_heads;
  shape.group = q.shape(1) / shape.n_kv_heads;
  shape.n_queries = std::min(n_queries, attention::kMaxDecodeQueries);
  shape.head_dim = q.shape(3);
  shape.n_spans = n_spans;
  shape.n_exact = (keys.exact ? 1 : 0) + (keys.chunk ? 1 : 0);
  shape.bfloat_cache = keys.layout.exact_dtype == DType::bfloat16;
  shape.softcap = options.logit_softcap > 0;
  shape.mask = mask.has_value();
  shape.out = metal_type(q.dtype());
  if (n_queries < 1 || shape.n_rows() < 1 || a.stretches.empty()) return std::nullopt;
  if (auto reason = attention::no_decode_kernel_because(shape)) return on_cpu(*reason);

  if (debug_enabled()) log_once("attend: on the GPU, caches of " + keys.codec->spec.method);
  // Spans are written by kernels and concatenations, exact tokens go in by their strides.
  for (int i = 0; i < n_spans; ++i) {
    a.stored.insert(a.stored.end(), {keys.spans[i], values.spans[i]});
  }
  if (keys.exact) a.stored.insert(a.stored.end(), {*keys.exact, *values.exact});
  if (keys.chunk) {
    for (const Snapshot* side : {&keys, &values}) {
      a.stored.push_back(dense_on(stream, *side->chunk, core_float(side->chunk->dtype())));
    }
  }
  std::vector<mx::array> outs, sums;
  for (int begin = 0; begin < n_queries; begin += attention::kMaxDecodeQueries) {
    const int end = std::min(n_queries, begin + attention::kMaxDecodeQueries);
    auto part_of = [&](const mx::array& of) {
      if (end - begin == n_queries) return of;
      return mx::slice(of, {0, 0, begin, 0}, {of.shape(0), of.shape(1), end, of.shape(3)}, stream);
    };
    const auto [out, sum] =
        attend_part(a, part_of(q), keys.layout.length - n_queries + begin,
                    mask ? std::optional<mx::array>(part_of(*mask)) : std::nullopt);
    outs.push_back(out);
    sums.push_back(sum);
  }
  if (outs.size() == 1) return std::make_pair(outs[0], sums[0]);
  return std::make_pair(mx::concatenate(outs, 2, stream), mx::concatenate(sums, 2, stream));
}

}  // namespace veloxquant
