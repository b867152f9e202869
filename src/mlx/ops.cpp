#include "src/mlx/ops.h"

#include <mlx/ops.h>

#include <algorithm>

#include "src/artifacts/manifest.h"
#include "src/mlx/gpu_cache.h"
#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

bool is_core_float(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

void append_all(std::vector<mx::array>& to, const std::vector<mx::array>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

std::pair<mx::array, mx::array> attend_op(const mx::array& q, const Snapshot& keys,
                                          const Snapshot& values, const AttendOptions& options,
                                          mx::StreamOrDevice s) {
  const CodecSpec& codec = keys.codec->spec;
  require(q.ndim() == 4 && is_core_float(q.dtype()) && q.shape(0) == keys.batch &&
              q.shape(3) == codec.head_dim && q.shape(1) % codec.n_kv_heads == 0,
          "[attention] queries: got ", shape_text(q), ", wanted float32, float16 or bfloat16 [",
          keys.batch, ", a multiple of ", codec.n_kv_heads, ", n, ", codec.head_dim, "]");
  require(keys.layout.same_positions(values.layout) && keys.batch == values.batch &&
              values.codec->spec.n_kv_heads == codec.n_kv_heads &&
              values.codec->spec.head_dim == codec.head_dim,
          "[attention] values: got ", values.layout.length,
          " tokens of another cache or shape, "
          "wanted the values that belong to the keys (",
          keys.layout.length, " tokens)");
  // [B, H_q, L_q, length] by strides, in a dtype of the core.
  auto full_mask = [&](const mx::Stream& stream) -> std::optional<mx::array> {
    if (!options.mask) return std::nullopt;
    mx::array mask = *options.mask;
    require(mask.dtype() == mx::bool_ || mx::issubdtype(mask.dtype(), mx::floating),
            "[attention] mask: got ", shape_text(mask), ", wanted a bool or floating point array");
    if (mask.dtype() != mx::bool_ && !is_core_float(mask.dtype())) {
      mask = mx::astype(mask, mx::float32, stream);
    }
    const mx::Shape full{q.shape(0), q.shape(1), q.shape(2), static_cast<int>(keys.layout.length)};
    try {
      return mx::broadcast_to(mask, full, stream);
    } catch (const std::invalid_argument&) {
      fail("[attention] mask: got ", shape_text(*options.mask),
           ", wanted a shape that broadcasts to [", full[0], ", ", full[1], ", ", full[2], ", ",
           full[3], "]");
    }
  };
  require(!options.sinks || (options.sinks->ndim() == 1 && options.sinks->shape(0) == q.shape(1)),
          "[attention] sinks: got ", options.sinks ? shape_text(*options.sinks) : std::string(),
          ", wanted [", q.shape(1), "]");
  if (const auto gpu = gpu_stream(s)) {
    if (auto out = attend_on_gpu(q, keys, values, options, full_mask(gpu->stream), s)) return *out;
  }
  const mx::Stream stream = cpu_stream(s);
  CacheAttend::Spec spec;
  spec.layout = keys.layout;
  spec.keys = keys.codec;
  spec.values = values.codec;
  spec.has_exact = keys.exact.has_value();
  spec.has_chunk = keys.chunk.has_value();
  spec.params.scale = options.scale;
  spec.params.logit_softcap = options.logit_softcap;
  spec.params.mask.causal = options.causal;
  spec.params.mask.sliding_window = options.sliding_window;

  std::vector<mx::array> inputs{q};
  std::vector<mx::array> side = keys.inputs();
  spec.n_key_inputs = static_cast<int64_t>(side.size());
  append_all(inputs, side);
  side = values.inputs();
  spec.n_value_inputs = static_cast<int64_t>(side.size());
  append_all(inputs, side);
  if (const auto mask = full_mask(stream)) {
    spec.has_mask = true;
    inputs.push_back(*mask);
  }
  if (options.sinks) {
    spec.has_sinks = true;
    inputs.push_back(
        mx::contiguous(mx::astype(*options.sinks, mx::float32, stream), false, stream));
  }
  std::vector<mx::array> outputs = mx::array::make_arrays(
      {q.shape(), mx::Shape{q.shape(0), q.shape(1), q.shape(2)}}, {q.dtype(), mx::float32},
      std::make_shared<CacheAttend>(stream, std::move(spec)), inputs);
  return {outputs[0], outputs[1]};
}

mx::array dequantize_op(const Snapshot& snapshot, mx::StreamOrDevice s) {
  const mx::Shape shape{snapshot.batch, snapshot.codec->spec.n_kv_heads,
                        static_cast<int>(snapshot.layout.length), snapshot.codec->spec.head_dim};
  if (auto out = dequantize_on_gpu(snapshot, s)) return *out;
  return mx::array(
      shape, snapshot.dtype,
      std::make_shared<CacheDequantize>(cpu_stream(s), snapshot.layout, snapshot.codec,
                                        snapshot.exact.has_value(), snapshot.chunk.has_value()),
      snapshot.inputs());
}

Snapshot exact_like(const Snapshot& like, const mx::array& x, mx::StreamOrDevice s) {
  const SnapshotLayout& layout = like.layout;
  const int heads = like.codec->spec.n_kv_heads, dim = like.codec->spec.head_dim;
  const int length = static_cast<int>(layout.length);
  require(x.ndim() == 4 && is_core_float(x.dtype()) &&
              x.shape() == mx::Shape{like.batch, heads, length, dim},
          "[attention] values: got ", shape_text(x), ", wanted floats [", like.batch, ", ", heads,
          ", ", length, ", ", dim, "]");
  const std::optional<GpuStream> gpu = gpu_stream(s);
  const mx::Stream stream = gpu ? gpu->stream : cpu_stream(s);
  Snapshot exact;
  exact.codec = exact_codec_arrays(Side::values, heads, dim, layout.exact_dtype);
  exact.layout = layout;
  exact.dtype = x.dtype();
  exact.batch = like.batch;
  const mx::Dtype dtype = mlx_dtype(layout.exact_dtype);
  auto tokens = [&](int64_t start, int64_t end) {
    return mx::astype(mx::slice(x, {0, 0, static_cast<int>(start), 0},
                                {like.batch, heads, static_cast<int>(end), dim}, stream),
                      dtype, stream);
  };
  auto padded = [&](const mx::array& a, int64_t n) {
    return mx::pad(
        a, std::vector<std::pair<int, int>>{{0, 0}, {0, 0}, {0, static_cast<int>(n)}, {0, 0}},
        mx::array(0.0f, dtype), "constant", stream);
  };
  for (const PackedSpan& span : layout.packed) {
    mx::array blocks = padded(tokens(span.start, span.end()), kBlockTokens - span.last_count);
    blocks = mx::reshape(blocks, {like.batch, heads, span.n_blocks, kBlockTokens * dim}, stream);
    exact.spans.push_back(mx::view(blocks, mx::uint8, stream));
  }
  if (like.exact) {
    const int64_t sinks = std::min<int64_t>(layout.exact_length, layout.sinks);
    const int64_t tail_start = std::min(layout.exact_tail_start, layout.exact_length);
    const int64_t tail = layout.exact_length - tail_start;
    exact.exact = mx::concatenate(
        {padded(tokens(0, sinks), layout.sinks - sinks),
         padded(tokens(tail_start, tail_start + tail), like.exact->shape(2) - layout.sinks - tail)},
        2, stream);
  }
  if (like.chunk) exact.chunk = tokens(layout.chunk_start, layout.length);
  return exact;
}

mx::array checksum_op(const std::string& text, const std::vector<mx::array>& arrays,
                      mx::StreamOrDevice s) {
  const mx::Stream stream = cpu_stream(s);
  std::string described = text;
  std::vector<mx::array> inputs;
  for (const mx::array& a : arrays) {
    described += "\n" + shape_text(a);
    inputs.push_back(mx::contiguous(a, false, stream));
  }
  return mx::array({1}, mx::uint32, std::make_shared<Checksum>(stream, crc32_of(described)),
                   std::move(inputs));
}

std::vector<mx::array> append_op(const mx::array& keys, const mx::array& values,
                                 const mx::array& exact_keys, const mx::array& exact_values,
                                 const SharedCodec& key_codec, const SharedCodec& value_codec,
                                 const CacheGeometry& geometry, const AppendPlan& plan,
                                 const Counter& nonfinite, mx::StreamOrDevice s) {
  std::vector<mx::array> inputs{keys, values, exact_keys, exact_values};
  std::vector<mx::Shape> shapes{exact_keys.shape(), exact_values.shape()};
  std::vector<mx::Dtype> dtypes{exact_keys.dtype(), exact_values.dtype()};
  if (plan.n_sealed > 0) {
    for (const SharedCodec& codec : {key_codec, value_codec}) {
      shapes.push_back({keys.shape(0), keys.shape(1), plan.n_sealed,
                        static_cast<int>(codec->core->block_bytes())});
      dtypes.push_back(mx::uint8);
    }
  }
  return mx::array::make_arrays(std::move(shapes), dtypes,
                                std::make_shared<CacheAppend>(cpu_stream(s), key_codec, value_codec,
                                                              geometry, plan, nonfinite),
                                inputs);
}

}  // namespace veloxquant
