#include "src/mlx/snapshot.h"

#include <algorithm>

#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;

bool SnapshotLayout::same_positions(const SnapshotLayout& other) const {
  auto equal = [](const PackedSpan& a, const PackedSpan& b) {
    return a.start == b.start && a.n_blocks == b.n_blocks && a.last_count == b.last_count;
  };
  return length == other.length && exact_length == other.exact_length &&
         exact_tail_start == other.exact_tail_start && chunk_start == other.chunk_start &&
         sinks == other.sinks &&
         std::equal(packed.begin(), packed.end(), other.packed.begin(), other.packed.end(), equal);
}

int64_t Snapshot::nbytes() const {
  int64_t bytes = 0;
  for (const mx::array& a : spans) bytes += static_cast<int64_t>(a.nbytes());
  if (exact) bytes += static_cast<int64_t>(exact->nbytes());
  if (chunk) bytes += static_cast<int64_t>(chunk->nbytes());
  return bytes;
}

std::vector<mx::array> Snapshot::inputs() const {
  std::vector<mx::array> all = spans;
  if (exact) all.push_back(*exact);
  if (chunk) all.push_back(*chunk);
  return all;
}

KeyValueSource source_over(const SnapshotLayout& layout, const CodecPtr& key_codec,
                           const CodecPtr& value_codec, bool has_exact, bool has_chunk,
                           const mx::array* key_inputs, const mx::array* value_inputs) {
  KeyValueSource source;
  source.key_codec = key_codec;
  source.value_codec = value_codec;
  source.exact_dtype = layout.exact_dtype;
  source.length = layout.length;
  source.visibility = layout.visibility;
  for (const PackedSpan& span : layout.packed) {
    const mx::array &keys = *key_inputs++, &values = *value_inputs++;
    PackedRun run;
    run.keys = keys.data<uint8_t>();
    run.values = values.data<uint8_t>();
    run.key_batch_stride = keys.strides()[0];
    run.key_head_stride = keys.strides()[1];
    run.value_batch_stride = values.strides()[0];
    run.value_head_stride = values.strides()[1];
    run.n_blocks = span.n_blocks;
    run.last_count = span.last_count;
    run.start = span.start;
    source.packed.push_back(run);
  }
  if (has_exact) {
    const TensorView keys = view_of(*key_inputs++), values = view_of(*value_inputs++);
    auto add = [&](int64_t start, int64_t slot, int64_t n) {
      if (n <= 0) return;
      ExactRun run{keys, values, start};
      for (TensorView* view : {&run.keys, &run.values}) {
        view->data = view->at(0, 0, slot);
        view->shape[2] = n;
      }
      source.exact.push_back(run);
    };
    add(0, 0, std::min<int64_t>(layout.exact_length, layout.sinks));
    add(layout.exact_tail_start, layout.sinks, layout.exact_length - layout.exact_tail_start);
  }
  if (has_chunk && layout.length > layout.chunk_start) {
    source.exact.push_back({view_of(*key_inputs), view_of(*value_inputs), layout.chunk_start});
  }
  return source;
}

}  // namespace veloxquant
