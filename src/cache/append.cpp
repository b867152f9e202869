// The data of one append. Every new element is rounded to 16 bits first, so that a token has the
// same bytes whether it was sealed at once (prefill) or from the tail (decode).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "veloxquant/cache.h"

namespace veloxquant {
namespace {

// Elements that are copied before other threads have woken up.
constexpr int64_t kAlone = 1 << 16;

// One side of one KV head: where its tokens come from and go to.
struct HeadAppend {
  const CacheGeometry& geometry;
  const AppendPlan& plan;
  int head_dim;
  DType exact_dtype;
  const uint16_t* exact;        // [capacity][D] before, or null
  std::vector<uint16_t> fresh;  // new tokens, rounded: [n_new][D]

  int64_t slot(int64_t position, int64_t tail_start) const {
    return position < geometry.sinks ? position : geometry.sinks + (position - tail_start);
  }

  // 16-bit values of the token at `position`, old or new.
  const uint16_t* token(int64_t position) const {
    if (position >= plan.first) return fresh.data() + (position - plan.first) * head_dim;
    return exact + slot(position, plan.tail_start) * head_dim;
  }

  void seal(Backend backend, const Codec& codec, int sequence, int kv_head, uint8_t* blocks) const {
    std::vector<float> x(static_cast<size_t>(kBlockTokens) * head_dim);
    for (int i = 0; i < plan.n_sealed; ++i) {
      const int64_t start = plan.tail_start + int64_t{kBlockTokens} * i;
      for (int t = 0; t < kBlockTokens; ++t) {
        cpu::to_float(exact_dtype, token(start + t), head_dim, x.data() + t * head_dim);
      }
      codec.encode_block(backend, {sequence, kv_head, start}, x.data(), kBlockTokens,
                         blocks + i * codec.block_bytes());
    }
  }

  // The new tokens, where the others are and stay.
  void add_exact(uint16_t* storage) const {
    for (int64_t p = plan.first; p < plan.first + plan.n_new; ++p) {
      std::memcpy(storage + slot(p, plan.tail_start) * head_dim, token(p),
                  sizeof(uint16_t) * head_dim);
    }
  }

  void write_exact(uint16_t* next) const {
    const size_t row = sizeof(uint16_t) * head_dim;
    std::memset(next, 0, row * geometry.exact_capacity());
    const int64_t length = plan.first + plan.n_new;
    for (int64_t p = 0; p < std::min<int64_t>(length, geometry.sinks); ++p) {
      std::memcpy(next + p * head_dim, token(p), row);
    }
    for (int64_t p = plan.next_tail_start; p < length; ++p) {
      std::memcpy(next + slot(p, plan.next_tail_start) * head_dim, token(p), row);
    }
  }
};

int64_t round_tokens(const TensorView& tokens, int b, int h, DType dtype,
                     std::vector<uint16_t>& rounded) {
  const int64_t n = tokens.shape[2], dim = tokens.shape[3];
  rounded.resize(static_cast<size_t>(n) * dim);
  std::vector<float> row(dim);
  int64_t changed = 0;
  for (int64_t t = 0; t < n; ++t) {
    if (tokens.stride[3] == 1) {
      cpu::to_float(tokens.dtype, tokens.at(b, h, t), dim, row.data());
    } else {
      for (int64_t d = 0; d < dim; ++d)
        cpu::to_float(tokens.dtype, tokens.at(b, h, t, d), 1, &row[d]);
    }
    changed += cpu::to_finite_16bit(dtype, row.data(), dim, rounded.data() + t * dim);
  }
  return changed;
}

void check_tokens(const TensorView& view, const char* name, const TensorView& like,
                  const Codec& codec) {
  const bool float_dtype =
      view.dtype == DType::float32 || view.dtype == DType::float16 || view.dtype == DType::bfloat16;
  require(view.ndim == 4 && float_dtype && view.shape == like.shape &&
              view.shape[1] == codec.n_kv_heads() && view.shape[3] == codec.head_dim(),
          "[append] ", name, ": got ", dtype_name(view.dtype), " [", view.shape[0], ", ",
          view.shape[1], ", ", view.shape[2], ", ", view.shape[3], "], wanted floats [",
          like.shape[0], ", ", codec.n_kv_heads(), ", ", like.shape[2], ", ", codec.head_dim(),
          "]");
}

}  // namespace

int64_t run_append(Backend backend, const CacheGeometry& geometry, const AppendPlan& plan,
                   const Codec& key_codec, const Codec& value_codec, const AppendBuffers& buffers) {
  check_tokens(buffers.new_keys, "keys", buffers.new_keys, key_codec);
  check_tokens(buffers.new_values, "values", buffers.new_keys, value_codec);
  require(buffers.new_keys.shape[2] == plan.n_new, "[append] keys: got ", buffers.new_keys.shape[2],
          " tokens, wanted ", plan.n_new);
  const int batch = static_cast<int>(buffers.new_keys.shape[0]);
  const int heads = key_codec.n_kv_heads(), dim = key_codec.head_dim();
  for (const Codec* codec : {&key_codec, &value_codec}) {
    require(codec->n_sequences() == 1 || codec->n_sequences() == batch, "[append] keys: got ",
            batch, " sequences, wanted ", codec->n_sequences(), " as the tables of the codec have");
  }
  const bool in_place = buffers.next_exact_keys.data == buffers.exact_keys.data ||
                        buffers.next_exact_values.data == buffers.exact_values.data;
  require(!in_place || plan.keeps_places(), "[append] next_exact_keys, next_exact_values: got the ",
          "storage before, wanted other storage where blocks are sealed");
  const DType exact_dtype = buffers.next_exact_keys.dtype;
  std::atomic<int64_t> changed{0};

  const auto append_line = [&](long item) {
    const bool keys = item % 2 == 0;
    const int h = static_cast<int>(item / 2 % heads), b = static_cast<int>(item / 2 / heads);
    const TensorView& fresh = keys ? buffers.new_keys : buffers.new_values;
    const TensorView& exact = keys ? buffers.exact_keys : buffers.exact_values;
    const MutableTensorView& next = keys ? buffers.next_exact_keys : buffers.next_exact_values;
    const Codec& codec = keys ? key_codec : value_codec;
    HeadAppend head{geometry, plan, dim, exact_dtype, nullptr, {}};
    if (!exact.empty()) head.exact = static_cast<const uint16_t*>(exact.at(b, h));
    changed += round_tokens(fresh, b, h, exact_dtype, head.fresh);
    if (plan.n_sealed > 0) {
      uint8_t* blocks = keys ? buffers.key_blocks : buffers.value_blocks;
      blocks += (int64_t{b} * heads + h) * plan.n_sealed * codec.block_bytes();
      head.seal(backend, codec, b, h, blocks);
    }
    uint16_t* to = static_cast<uint16_t*>(next.at(b, h));
    to == head.exact ? head.add_exact(to) : head.write_exact(to);
  };
  const long lines = long{batch} * heads * 2;
  if (in_place && lines * plan.n_new * dim <= kAlone) {
    for (long item = 0; item < lines; ++item) append_line(item);
  } else {
    parallel_for(lines, append_line);
  }
  return changed;
}

}  // namespace veloxquant
