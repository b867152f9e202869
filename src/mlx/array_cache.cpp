#include "src/mlx/array_cache.h"

#include <mlx/ops.h>

#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;

ArrayCache::ArrayCache(CodecArrays keys, CodecArrays values, int window, int sinks,
                       DType exact_dtype)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      exact_dtype_(exact_dtype),
      geometry_(window, sinks),
      nonfinite_(std::make_shared<std::atomic<int64_t>>(0)) {
  require(keys_.n_kv_heads == values_.n_kv_heads && keys_.head_dim == values_.head_dim,
          "[cache] values: got a codec for ", values_.n_kv_heads, " heads of ", values_.head_dim,
          ", wanted ", keys_.n_kv_heads, " heads of ", keys_.head_dim, " as the keys have");
  require(exact_dtype == DType::float16 || exact_dtype == DType::bfloat16,
          "[cache] exact_dtype: got ", dtype_name(exact_dtype), ", wanted float16 or bfloat16");
}

Snapshot ArrayCache::side(const CodecArrays& codec, const std::vector<mx::array>& spans,
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

std::pair<Snapshot, Snapshot> ArrayCache::update(const mx::array& keys, const mx::array& values,
                                                 bool strict, mx::StreamOrDevice s) {
  auto check = [&](const mx::array& a, const char* name) {
    bool ok = a.ndim() == 4 && a.shape(1) == keys_.n_kv_heads && a.shape(3) == keys_.head_dim &&
              a.shape(0) == keys.shape(0) && a.shape(2) == keys.shape(2) &&
              mx::issubdtype(a.dtype(), mx::floating) && (!exact_ || a.shape(0) == batch_);
    std::string got;
    for (int d = 0; d < static_cast<int>(a.ndim()); ++d) {
      got += (d ? ", " : "") + std::to_string(a.shape(d));
    }
    require(ok, "[cache] ", name, ": got ", mx::dtype_to_string(a.dtype()), " [", got,
            "], wanted floats [", exact_ ? std::to_string(batch_) : "B", ", ", keys_.n_kv_heads,
            ", n, ", keys_.head_dim, "]");
  };
  require(keys.ndim() == 4, "[cache] keys: got ", keys.ndim(), " dimensions, wanted [B, H, n, D]");
  check(keys, "keys");
  check(values, "values");

  const mx::Stream stream = cpu_stream(s);
  batch_ = keys.shape(0);
  key_dtype_ = keys.dtype();
  value_dtype_ = values.dtype();
  if (!exact_) {
    const mx::Shape shape{batch_, keys_.n_kv_heads, static_cast<int>(geometry_.exact_capacity()),
                          keys_.head_dim};
    const mx::array empty = mx::zeros(shape, mlx_dtype(exact_dtype_), stream);
    exact_ = Exact{empty, empty};
  }
  Snapshot key_side = side(keys_, {}, exact_, true);
  Snapshot value_side = side(values_, {}, exact_, false);

  const AppendPlan plan = geometry_.plan_append(keys.shape(2));
  const std::vector<mx::array> next = append_op(keys, values, exact_->keys, exact_->values, keys_,
                                                values_, geometry_, plan, nonfinite_, stream);
  exact_ = Exact{next[0], next[1]};
  if (plan.n_sealed > 0) {
    store(key_spans_, next[2], plan.extends_last_span, stream);
    store(value_spans_, next[3], plan.extends_last_span, stream);
  }
  geometry_.commit(plan);

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
    const mx::Stream stream = cpu_stream(s);
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

}  // namespace veloxquant
