// KvCache: geometry and run_append over memory of its own.
#include <algorithm>
#include <cstring>
#include <vector>

#include "veloxquant/cache.h"

namespace veloxquant {
namespace {

using Bytes = std::vector<uint8_t>;

// [lines][n_old] + [lines][n_new] -> [lines][n_old + n_new], lines of bytes.
Bytes join_lines(const Bytes& old_bytes, const Bytes& new_bytes, int64_t lines) {
  const size_t old_line = old_bytes.size() / lines, new_line = new_bytes.size() / lines;
  Bytes joined(old_bytes.size() + new_bytes.size());
  for (int64_t i = 0; i < lines; ++i) {
    uint8_t* to = joined.data() + i * (old_line + new_line);
    std::memcpy(to, old_bytes.data() + i * old_line, old_line);
    std::memcpy(to + old_line, new_bytes.data() + i * new_line, new_line);
  }
  return joined;
}

}  // namespace

struct KvCache::State {
  KvCacheConfig config;
  CacheGeometry geometry;
  std::vector<uint16_t> exact_keys, exact_values;  // [B][H][capacity][D]
  struct Span {
    Bytes keys, values;  // [B][H][n_blocks][block bytes]
    int n_blocks;        // as stored: trim may have made fewer of them visible
  };
  std::vector<Span> spans;
  int64_t nonfinite = 0;

  int64_t lines() const { return int64_t{config.batch} * config.n_kv_heads; }

  template <class View, class Data>
  View exact_view(Data* data) const {
    return View(data, config.exact_dtype,
                {config.batch, config.n_kv_heads, geometry.exact_capacity(), config.head_dim});
  }

  // Tokens [first, first + n) of exact storage, from slot `slot` on.
  ExactRun exact_run(int64_t start, int64_t slot, int64_t n) const {
    ExactRun run;
    run.start = start;
    run.keys = exact_view<TensorView>(exact_keys.data());
    run.values = exact_view<TensorView>(exact_values.data());
    for (TensorView* view : {&run.keys, &run.values}) {
      view->data = view->at(0, 0, slot);
      view->shape[2] = n;
    }
    return run;
  }

  void add_spans(KeyValueSource& source, const std::vector<PackedSpan>& packed) const {
    for (size_t i = 0; i < packed.size(); ++i) {
      PackedRun run;
      run.keys = spans[i].keys.data();
      run.values = spans[i].values.data();
      run.key_head_stride = spans[i].n_blocks * config.key_codec->block_bytes();
      run.value_head_stride = spans[i].n_blocks * config.value_codec->block_bytes();
      run.key_batch_stride = run.key_head_stride * config.n_kv_heads;
      run.value_batch_stride = run.value_head_stride * config.n_kv_heads;
      run.n_blocks = packed[i].n_blocks;
      run.last_count = packed[i].last_count;
      run.start = packed[i].start;
      source.packed.push_back(run);
    }
  }

  KeyValueSource source() const {
    KeyValueSource source;
    source.key_codec = config.key_codec;
    source.value_codec = config.value_codec;
    source.exact_dtype = config.exact_dtype;
    source.length = geometry.length;
    source.visibility.tail_start = geometry.tail_start;
    source.visibility.window = geometry.window;
    source.visibility.first_query = geometry.length;
    add_spans(source, geometry.packed);
    const int64_t sinks = std::min<int64_t>(geometry.length, geometry.sinks);
    if (sinks > 0) source.exact.push_back(exact_run(0, 0, sinks));
    if (geometry.tail_count() > 0) {
      source.exact.push_back(exact_run(geometry.tail_start, geometry.sinks, geometry.tail_count()));
    }
    return source;
  }

  void store(const AppendPlan& plan, Bytes key_blocks, Bytes value_blocks) {
    if (plan.n_sealed == 0) return;
    if (plan.extends_last_span) {
      Span& last = spans.back();
      last.keys = join_lines(last.keys, key_blocks, lines());
      last.values = join_lines(last.values, value_blocks, lines());
      last.n_blocks += plan.n_sealed;
    } else {
      spans.push_back({std::move(key_blocks), std::move(value_blocks), plan.n_sealed});
    }
  }

  // Drops the blocks that a trim made invisible, so that an extension lands right behind the rest.
  void shrink_spans() {
    spans.resize(geometry.packed.size());
    if (spans.empty() || spans.back().n_blocks == geometry.packed.back().n_blocks) return;
    Span& last = spans.back();
    const int kept = geometry.packed.back().n_blocks;
    for (Bytes* bytes : {&last.keys, &last.values}) {
      const size_t line = bytes->size() / lines(), kept_line = line / last.n_blocks * kept;
      for (int64_t i = 1; i < lines(); ++i) {
        std::memmove(bytes->data() + i * kept_line, bytes->data() + i * line, kept_line);
      }
      bytes->resize(kept_line * lines());
      bytes->shrink_to_fit();
    }
    last.n_blocks = kept;
  }
};

KvCache::KvCache(const KvCacheConfig& config) : state_(std::make_unique<State>()) {
  require(config.batch >= 1, "[KvCache] batch: got ", config.batch, ", wanted at least 1");
  require(config.key_codec && config.value_codec,
          "[KvCache] codecs: got none, wanted a key and a value codec (make_exact_codec for an "
          "uncompressed cache)");
  for (const CodecPtr& codec : {config.key_codec, config.value_codec}) {
    require(codec->n_kv_heads() == config.n_kv_heads && codec->head_dim() == config.head_dim,
            "[KvCache] ", codec->name(), ": got a codec for ", codec->n_kv_heads(), " heads of ",
            codec->head_dim(), ", wanted ", config.n_kv_heads, " heads of ", config.head_dim);
  }
  require(config.exact_dtype == DType::float16 || config.exact_dtype == DType::bfloat16,
          "[KvCache] exact_dtype: got ", dtype_name(config.exact_dtype),
          ", wanted float16 or bfloat16");
  state_->config = config;
  state_->geometry = CacheGeometry(config.window, config.sinks);
  const size_t slots = state_->lines() * state_->geometry.exact_capacity() * config.head_dim;
  state_->exact_keys.assign(slots, 0);
  state_->exact_values.assign(slots, 0);
}

KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;

void KvCache::append_and_attend(const TensorView& q, const TensorView& keys,
                                const TensorView& values, bool strict,
                                const AttentionParams& params, const MutableTensorView& out,
                                const MutableTensorView& lse) {
  State& s = *state_;
  require(keys.ndim == 4 && keys.shape[0] == s.config.batch, "[KvCache] keys: got a batch of ",
          keys.shape[0], ", wanted ", s.config.batch);
  KeyValueSource source = s.source();  // sinks and tail as they were
  const AppendPlan plan = s.geometry.plan_append(keys.shape[2]);
  // Most steps seal nothing and write their token where it belongs.
  const bool in_place = plan.keeps_places();
  std::vector<uint16_t> next_keys(in_place ? 0 : s.exact_keys.size());
  std::vector<uint16_t> next_values(in_place ? 0 : s.exact_values.size());
  Bytes key_blocks(s.lines() * plan.n_sealed * s.config.key_codec->block_bytes());
  Bytes value_blocks(s.lines() * plan.n_sealed * s.config.value_codec->block_bytes());
  AppendBuffers buffers;
  buffers.new_keys = keys;
  buffers.new_values = values;
  buffers.exact_keys = s.exact_view<TensorView>(s.exact_keys.data());
  buffers.exact_values = s.exact_view<TensorView>(s.exact_values.data());
  buffers.next_exact_keys =
      s.exact_view<MutableTensorView>(in_place ? s.exact_keys.data() : next_keys.data());
  buffers.next_exact_values =
      s.exact_view<MutableTensorView>(in_place ? s.exact_values.data() : next_values.data());
  buffers.key_blocks = key_blocks.data();
  buffers.value_blocks = value_blocks.data();
  const int64_t changed = run_append(default_backend(), s.geometry, plan, *s.config.key_codec,
                                     *s.config.value_codec, buffers);

  // Swapping keeps the old storage alive until the end: `source` still reads it.
  if (!in_place) {
    s.exact_keys.swap(next_keys);
    s.exact_values.swap(next_values);
  }
  s.store(plan, std::move(key_blocks), std::move(value_blocks));
  s.geometry.commit(plan);
  s.nonfinite += changed;
  if (!q.empty()) {
    source.packed.clear();
    s.add_spans(source, s.geometry.packed);
    ExactRun chunk;
    chunk.keys = keys;
    chunk.values = values;
    chunk.start = plan.first;
    source.exact.push_back(chunk);
    source.length = s.geometry.length;
    source.visibility = {plan.tail_start, plan.n_sealed, s.geometry.window, strict, plan.first};
    veloxquant::attend(default_backend(), q, source, params, out, lse);
  }
}

void KvCache::append(const TensorView& keys, const TensorView& values) {
  append_and_attend({}, keys, values, false, {}, {}, {});
}

void KvCache::attend(const TensorView& q, const AttentionParams& params,
                     const MutableTensorView& out, const MutableTensorView& lse) const {
  veloxquant::attend(default_backend(), q, source(), params, out, lse);
}

int64_t KvCache::trim(int64_t n) {
  const int64_t forgotten = state_->geometry.trim(n);
  state_->shrink_spans();
  return forgotten;
}

int64_t KvCache::length() const { return state_->geometry.length; }
int64_t KvCache::nonfinite() const { return state_->nonfinite; }
const CacheGeometry& KvCache::geometry() const { return state_->geometry; }
KeyValueSource KvCache::source() const { return state_->source(); }

int64_t KvCache::nbytes() const {
  int64_t bytes = 2 * static_cast<int64_t>(state_->exact_keys.size() + state_->exact_values.size());
  for (const auto& span : state_->spans) {
    bytes += static_cast<int64_t>(span.keys.size() + span.values.size());
  }
  return bytes;
}

}  // namespace veloxquant
