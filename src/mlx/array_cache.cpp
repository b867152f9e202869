#include "src/mlx/array_cache.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <limits>

#include "src/mlx/gpu_cache.h"
#include "src/mlx/views.h"
#include "veloxquant/interchange.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

// Both orders of one span: [B, H, blocks, block bytes] <-> [B, H, tokens, token bytes].
mx::array reordered(const Codec& codec, const PackedSpan& span, mx::array from, bool interchange) {
  const mx::Device cpu = mx::Device::cpu;
  mx::eval(from);
  const int64_t n_tokens = span.end() - span.start;
  const int batch = from.shape(0), heads = from.shape(1);
  mx::Shape shape{batch, heads, span.n_blocks, static_cast<int>(codec.block_bytes())};
  if (interchange) {
    shape[2] = static_cast<int>(n_tokens);
    shape[3] = static_cast<int>(codec.token_bytes());
  }
  mx::array to = mx::zeros(shape, mx::uint8, cpu);
  mx::eval(to);
  for (int line = 0; line < batch * heads; ++line) {
    const uint8_t* in = from.data<uint8_t>() + line * (from.nbytes() / (batch * heads));
    uint8_t* out = to.data<uint8_t>() + line * (to.nbytes() / (batch * heads));
    interchange ? to_interchange(codec, in, n_tokens, out)
                : from_interchange(codec, in, n_tokens, out);
  }
  return to;
}

}  // namespace

ArrayCache::ArrayCache(SharedCodec keys, SharedCodec values, int window, int sinks,
                       DType exact_dtype)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      exact_dtype_(exact_dtype),
      geometry_(window, sinks),
      nonfinite_(std::make_shared<std::atomic<int64_t>>(0)) {
  require(keys_->spec.n_kv_heads == values_->spec.n_kv_heads &&
              keys_->spec.head_dim == values_->spec.head_dim,
          "[cache] values: got a codec for ", values_->spec.n_kv_heads, " heads of ",
          values_->spec.head_dim, ", wanted ", keys_->spec.n_kv_heads, " heads of ",
          keys_->spec.head_dim, " as the keys have");
  require(exact_dtype == DType::float16 || exact_dtype == DType::bfloat16,
          "[cache] exact_dtype: got ", dtype_name(exact_dtype), ", wanted float16 or bfloat16");
}

Snapshot ArrayCache::side(const SharedCodec& codec, const std::vector<mx::array>& spans,
                          const std::optional<Exact>& exact, bool keys) const {
  Snapshot snapshot;
  snapshot.codec = codec;
  snapshot.spans = spans;
  if (exact) snapshot.exact = keys ? exact->keys : exact->values;
  snapshot.dtype = keys ? key_dtype_ : value_dtype_;
  snapshot.batch = batch_;
  SnapshotLayout& layout = snapshot.layout;
  layout.packed = geometry_.packed;
  layout.sinks = geometry_.sinks;
  layout.exact_length = geometry_.length;
  layout.exact_tail_start = geometry_.tail_start;
  layout.chunk_start = geometry_.length;
  layout.length = geometry_.length;
  layout.exact_dtype = exact_dtype_;
  layout.visibility.tail_start = geometry_.tail_start;
  layout.visibility.window = geometry_.window;
  layout.visibility.first_query = geometry_.length;
  return snapshot;
}

std::pair<Snapshot, Snapshot> ArrayCache::snapshot() const {
  return {side(keys_, key_spans_, exact_, true), side(values_, value_spans_, exact_, false)};
}

void ArrayCache::store(std::vector<mx::array>& spans, const mx::array& blocks, bool extend,
                       const mx::Stream& stream) {
  if (extend) {
    spans.back() = mx::concatenate({spans.back(), blocks}, 2, stream);
  } else {
    spans.push_back(blocks);
  }
}

// A kernel on a GPU takes few spans: neighbours are joined, the smallest first, so that a token is
// copied some log(length) times. Not behind a block that trim cut short.
void ArrayCache::merge_spans(const mx::Stream& stream) {
  std::vector<PackedSpan>& packed = geometry_.packed;
  while (packed.size() > kGpuSpans) {
    size_t best = packed.size();
    for (size_t i = 0; i + 1 < packed.size(); ++i) {
      if (packed[i].last_count != kBlockTokens) continue;
      const auto together = [&](size_t at) {
        return packed[at].n_blocks + packed[at + 1].n_blocks;
      };
      if (best == packed.size() || together(i) < together(best)) best = i;
    }
    if (best == packed.size()) return;
    const auto at = static_cast<std::ptrdiff_t>(best);
    for (std::vector<mx::array>* spans : {&key_spans_, &value_spans_}) {
      (*spans)[best] = mx::concatenate({(*spans)[best], (*spans)[best + 1]}, 2, stream);
      spans->erase(spans->begin() + at + 1);
    }
    packed[best].n_blocks += packed[best + 1].n_blocks;
    packed[best].last_count = packed[best + 1].last_count;
    packed.erase(packed.begin() + at + 1);
  }
}

int64_t ArrayCache::nonfinite() const {
  int64_t counted = *nonfinite_;
  if (gpu_nonfinite_) {
    mx::array total = mx::sum(*gpu_nonfinite_, false);
    counted += total.item<int>();
  }
  return counted;
}

std::pair<Snapshot, Snapshot> ArrayCache::update(const mx::array& keys, const mx::array& values,
                                                 bool strict, mx::StreamOrDevice s) {
  auto check = [&](const mx::array& a, const char* name) {
    bool ok = a.ndim() == 4 && a.shape(1) == keys_->spec.n_kv_heads &&
              a.shape(3) == keys_->spec.head_dim && a.shape(0) == keys.shape(0) &&
              a.shape(2) == keys.shape(2) && mx::issubdtype(a.dtype(), mx::floating) &&
              (!exact_ || a.shape(0) == batch_);
    std::string got;
    for (int d = 0; d < static_cast<int>(a.ndim()); ++d) {
      got += (d ? ", " : "") + std::to_string(a.shape(d));
    }
    require(ok, "[cache] ", name, ": got ", dtype_text(a.dtype()), " [", got, "], wanted floats [",
            exact_ ? std::to_string(batch_) : "B", ", ", keys_->spec.n_kv_heads, ", n, ",
            keys_->spec.head_dim, "]");
  };
  require(keys.ndim() == 4, "[cache] keys: got ", keys.ndim(), " dimensions, wanted [B, H, n, D]");
  check(keys, "keys");
  check(values, "values");

  // What has no GPU kernel runs on the CPU throughout: an array that both read is moved under MLX's
  // hands (CUDA).
  std::optional<GpuStream> gpu = gpu_stream(s);
  if (gpu) {
    if (const auto reason = no_gpu_cache_because(*keys_, *values_)) {
      note_cpu("append", s, *reason);
      gpu.reset();
    }
  }
  const mx::Stream stream = gpu ? gpu->stream : cpu_stream(s);
  batch_ = keys.shape(0);
  key_dtype_ = keys.dtype();
  value_dtype_ = values.dtype();
  if (!exact_) {
    const mx::Shape shape{batch_, keys_->spec.n_kv_heads,
                          static_cast<int>(geometry_.exact_capacity()), keys_->spec.head_dim};
    const mx::array empty = mx::zeros(shape, mlx_dtype(exact_dtype_), stream);
    exact_ = Exact{empty, empty};
  }
  Snapshot key_side = side(keys_, {}, exact_, true);
  Snapshot value_side = side(values_, {}, exact_, false);

  const AppendPlan plan = geometry_.plan_append(keys.shape(2));
  std::vector<mx::array> next;
  if (gpu && plan.n_new > 0) {
    // The counts are outputs of the same kernel as the exact storage: evaluated with it.
    GpuAppend append = append_on_gpu(keys, values, exact_->keys, exact_->values, gpu_nonfinite_,
                                     *keys_, *values_, geometry_, plan, *gpu);
    next = std::move(append.outputs);
    gpu_nonfinite_ = append.nonfinite;
  } else {
    next = append_op(keys, values, exact_->keys, exact_->values, keys_, values_, geometry_, plan,
                     nonfinite_, stream);
  }
  exact_ = Exact{next[0], next[1]};
  if (plan.n_sealed > 0) {
    store(key_spans_, next[2], plan.extends_last_span, stream);
    store(value_spans_, next[3], plan.extends_last_span, stream);
  }
  geometry_.commit(plan);
  if (gpu) merge_spans(stream);
  if (gpu && plan.n_sealed == 0) {
    // Every token is in one place: the exact storage has the new ones, and they are not read twice.
    return snapshot();
  }

  auto finish = [&](Snapshot& snapshot, const std::vector<mx::array>& spans,
                    const mx::array& chunk) {
    snapshot.spans = spans;
    snapshot.chunk = chunk;
    snapshot.layout.packed = geometry_.packed;
    snapshot.layout.length = geometry_.length;
    snapshot.layout.visibility = {plan.tail_start, plan.n_sealed, geometry_.window, strict,
                                  plan.first};
  };
  finish(key_side, key_spans_, keys);
  finish(value_side, value_spans_, values);
  return {std::move(key_side), std::move(value_side)};
}

int64_t ArrayCache::trim(int64_t n, mx::StreamOrDevice s) {
  const int64_t forgotten = geometry_.trim(n);
  for (std::vector<mx::array>* spans : {&key_spans_, &value_spans_}) {
    spans->erase(spans->begin() + static_cast<long>(geometry_.packed.size()), spans->end());
    if (spans->empty()) continue;
    mx::array& last = spans->back();
    const int kept = geometry_.packed.back().n_blocks;
    if (last.shape(2) == kept) continue;
    // A copy, not a view: the dropped blocks are to leave memory too.
    const std::optional<GpuStream> gpu = gpu_stream(s);
    const mx::Stream stream = gpu ? gpu->stream : cpu_stream(s);
    last = mx::contiguous(
        mx::slice(last, {0, 0, 0, 0}, {last.shape(0), last.shape(1), kept, last.shape(3)}, stream),
        false, stream);
  }
  return forgotten;
}

int64_t ArrayCache::nbytes() const {
  int64_t bytes = 0;
  for (const mx::array& a : arrays()) bytes += static_cast<int64_t>(a.nbytes());
  return bytes;
}

std::vector<mx::array> ArrayCache::arrays() const {
  std::vector<mx::array> all;
  if (!exact_) return all;
  all.push_back(exact_->keys);
  all.push_back(exact_->values);
  all.insert(all.end(), key_spans_.begin(), key_spans_.end());
  all.insert(all.end(), value_spans_.begin(), value_spans_.end());
  return all;
}

std::vector<int64_t> ArrayCache::positions() const {
  std::vector<int64_t> all{geometry_.length, geometry_.tail_start};
  for (const PackedSpan& span : geometry_.packed) {
    all.insert(all.end(), {span.start, span.n_blocks, span.last_count});
  }
  return all;
}

std::vector<mx::array> ArrayCache::interchange_arrays() const {
  std::vector<mx::array> all = arrays();
  for (size_t i = 2; i < all.size(); ++i) {
    const size_t span = (i - 2) % geometry_.packed.size();
    const Codec& codec = i - 2 < geometry_.packed.size() ? *keys_->core : *values_->core;
    all[i] = reordered(codec, geometry_.packed[span], all[i], true);
  }
  return all;
}

void ArrayCache::restore(const std::vector<mx::array>& arrays,
                         const std::vector<int64_t>& positions, bool interchange) {
  require(positions.size() >= 2 && positions.size() % 3 == 2, "[cache] state: got ",
          positions.size(), " positions, wanted 2 and 3 more for each span");
  CacheGeometry geometry(geometry_.window, geometry_.sinks);
  geometry.length = positions[0];
  geometry.tail_start = positions[1];
  int64_t end = geometry.sinks;
  for (size_t i = 2; i < positions.size(); i += 3) {
    const PackedSpan span{positions[i], static_cast<int>(positions[i + 1]),
                          static_cast<int>(positions[i + 2])};
    require(span.start == end && positions[i + 1] >= 1 && positions[i + 1] <= 1 << 24 &&
                positions[i + 2] >= 1 && positions[i + 2] <= kBlockTokens,
            "[cache] state: got a span of ", positions[i + 1], " blocks at ", span.start,
            ", wanted one that starts at ", end);
    end = span.end();
    geometry.packed.push_back(span);
  }
  const bool consistent =
      geometry.length >= 0 && geometry.length <= std::numeric_limits<int>::max() / 2 &&
      geometry.tail_start == end && (geometry.packed.empty() || geometry.length >= end) &&
      geometry.tail_count() <= geometry.window + kBlockTokens;
  require(consistent, "[cache] state: got ", geometry.length, " tokens with a tail at ",
          geometry.tail_start, ", wanted a tail at ", end, " of at most ",
          geometry.window + kBlockTokens, " tokens");

  const size_t n_spans = geometry.packed.size();
  require(arrays.size() == 2 + 2 * n_spans || (arrays.empty() && geometry.length == 0),
          "[cache] state: got ", arrays.size(), " arrays, wanted ", 2 + 2 * n_spans);
  const int batch = arrays.empty() || arrays[0].ndim() != 4 ? 1 : arrays[0].shape(0);
  auto check = [&](const mx::array& a, int64_t n, int64_t width, mx::Dtype dtype) {
    const bool fits = a.ndim() == 4 && a.shape(0) == batch && batch >= 1 &&
                      a.shape(1) == keys_->spec.n_kv_heads && a.shape(2) == n &&
                      a.shape(3) == width;
    require(fits && a.dtype() == dtype, "[cache] state: got an array of ", dtype_text(a.dtype()),
            " and ", a.ndim(), " dimensions, wanted ", dtype_text(dtype), " [", batch, ", ",
            keys_->spec.n_kv_heads, ", ", n, ", ", width, "]");
  };
  std::vector<mx::array> key_spans, value_spans;
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (i < 2) {
      check(arrays[i], geometry.exact_capacity(), keys_->spec.head_dim, mlx_dtype(exact_dtype_));
      continue;
    }
    const bool keys = i < 2 + n_spans;
    const Codec& codec = keys ? *keys_->core : *values_->core;
    const PackedSpan& span = geometry.packed[(i - 2) % n_spans];
    if (interchange) {
      check(arrays[i], span.end() - span.start, codec.token_bytes(), mx::uint8);
    } else {
      check(arrays[i], span.n_blocks, codec.block_bytes(), mx::uint8);
    }
    mx::array blocks = mx::contiguous(arrays[i], false, mx::Device::cpu);
    if (interchange) blocks = reordered(codec, span, blocks, false);
    (keys ? key_spans : value_spans).push_back(std::move(blocks));
  }
  geometry_ = std::move(geometry);
  if (gpu_nonfinite_) {  // counts of another batch's heads
    nonfinite_ = std::make_shared<std::atomic<int64_t>>(nonfinite());
    gpu_nonfinite_.reset();
  }
  batch_ = batch;
  exact_.reset();
  if (!arrays.empty()) {
    exact_ = Exact{mx::contiguous(arrays[0], false, mx::Device::cpu),
                   mx::contiguous(arrays[1], false, mx::Device::cpu)};
  }
  key_spans_ = std::move(key_spans);
  value_spans_ = std::move(value_spans);
}

}  // namespace veloxquant
