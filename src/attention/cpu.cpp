// The CPU path. One work item = up to 96 query rows of one KV head x one segment of the tokens:
//
//   for each tile of 64 tokens that some row sees
//     K^T [D][64], V [64][D]  decoded into scratch (the codec's or the exact run's own loop)
//     S = Q' K^T ; P = online softmax of S ; O = shrink * O + P V
//
// A segment holds tokens of one form only, so each item has one accumulator, in that form's
// coordinates. When all segments of a row are done they are merged by their log-sum-exp, packed
// ones before the codec's inverse, which therefore runs once per row.
//
// Packed segments of a decode step go to cpu_codes.cpp where a codec has a kernel on its codes.
//
// Cuts depend on the shapes alone, never on the number of threads.
#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "src/attention/cpu_kernels.h"
#include "src/attention/cpu_parts.h"
#include "src/attention/element.h"
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// Scratch of one item (Q, O, S, K, V) stays below 300 KB at head_dim 128: inside L2.
constexpr int64_t kMaxRows = 96;
constexpr int64_t kMinSegmentTiles = 16;
// Bounds the partial results of a split context: about 512 rows per KV head.
constexpr int64_t kMaxPartialRows = 512;
// On codes a segment has fixed costs (look-up tables), and all its scores are kept.
constexpr int64_t kMaxCodeSegmentTiles = 64;
constexpr int64_t kCodeItems = 8;
// Look-up tables of this many query rows exist at a time (at head_dim 128, 2 bits: 32 KB a row).
constexpr int64_t kPreparedRows = 1024;

class Partials {
 public:
  Partials(int64_t n, int64_t n_rows, int64_t columns)
      : n_rows_(n_rows), columns_(columns), size_(n_rows * (columns + 2)) {
    data_ = hwy::AllocateAligned<float>(std::max<int64_t>(1, n * size_));
  }
  Partial operator[](int64_t i) const {
    float* max = data_.get() + i * size_;
    return {max + n_rows_ * columns_, max + n_rows_ * (columns_ + 1), max};
  }

 private:
  int64_t n_rows_, columns_, size_;
  hwy::AlignedFreeUniquePtr<float[]> data_;
};

struct Scratch {
  hwy::AlignedFreeUniquePtr<float[]> data;
  float *q, *keys, *values, *rows, *scores, *mask, *shrink;
  std::vector<int> begin, end;

  Scratch(const Problem& p, int64_t n_rows) : begin(n_rows), end(n_rows) {
    const int64_t columns = padded_columns(p.head_dim);
    const int64_t sizes[] = {n_rows * p.head_dim,    kBlockTokens * int64_t{p.head_dim},
                             kBlockTokens * columns, kBlockTokens * columns,
                             n_rows * kBlockTokens,  p.has_mask_array() ? n_rows * kBlockTokens : 0,
                             padded_columns(n_rows)};
    int64_t total = 0;
    for (int64_t size : sizes) total += padded_columns(size);
    data = hwy::AllocateAligned<float>(total);
    float* next = data.get();
    float** parts[] = {&q, &keys, &values, &rows, &scores, &mask, &shrink};
    for (int i = 0; i < 7; ++i) {
      *parts[i] = next;
      next += padded_columns(sizes[i]);
    }
    // Columns beyond head_dim are multiplied too; rows beyond a tile's tokens are transposed.
    std::fill(values, values + 2 * kBlockTokens * columns, 0.0f);
  }
};

int64_t n_row_tiles(const Problem& p) { return (p.n_rows() + kMaxRows - 1) / kMaxRows; }

// Long contexts of few rows (decoding) are cut, so that there is work for every thread.
std::vector<Segment> cut_segments(const Problem& p, bool on_codes) {
  const int64_t n_tiles = static_cast<int64_t>(p.tiles.size());
  int64_t step = std::max<int64_t>(1, n_tiles), packed_step = step;
  if (n_row_tiles(p) == 1) {
    int64_t most = std::max<int64_t>(1, kMaxPartialRows / p.n_rows());
    step = packed_step = std::max(kMinSegmentTiles, (n_tiles + most - 1) / most);
    if (on_codes) {
      const int64_t n_heads = int64_t{p.batch} * p.n_kv_heads;
      const int64_t even = (p.n_packed_tiles * n_heads + kCodeItems - 1) / kCodeItems;
      packed_step = std::max(step, std::min(even, kMaxCodeSegmentTiles));
      const int64_t n_segments = (p.n_packed_tiles + packed_step - 1) / packed_step;
      packed_step = (p.n_packed_tiles + n_segments - 1) / n_segments;
    }
  }
  std::vector<Segment> segments;
  for (int64_t i = 0; i < p.n_packed_tiles; i += packed_step) {
    segments.push_back({i, std::min(i + packed_step, p.n_packed_tiles), true});
  }
  for (int64_t i = p.n_packed_tiles; i < n_tiles; i += step) {
    segments.push_back({i, std::min(i + step, n_tiles), false});
  }
  return segments;
}

void load_tile(const Problem& p, const Rows& rows, const Tile& tile, Scratch& s) {
  const int64_t columns = padded_columns(p.head_dim);
  const KeyValueSource& source = p.source;
  const int b = rows.b, h = rows.kv_head;
  if (tile.packed) {
    const BlockPlace place{b, h, tile.position};
    source.key_codec->decode_block_transposed(Backend::cpu, place, p.key_block(b, h, tile),
                                              tile.count, s.keys);
    source.value_codec->decode_block(Backend::cpu, place, p.value_block(b, h, tile), tile.count,
                                     s.values, columns);
    return;
  }
  const ExactRun& run = source.exact[tile.run];
  load_exact_rows(run.keys.at(b, h, tile.offset), run.keys.dtype, run.keys.stride[2],
                  source.exact_dtype, tile.count, p.head_dim, s.rows, columns);
  transpose_rows(s.rows, columns, tile.count, p.head_dim, s.keys);
  load_exact_rows(run.values.at(b, h, tile.offset), run.values.dtype, run.values.stride[2],
                  source.exact_dtype, tile.count, p.head_dim, s.values, columns);
}

void add_tile(const Problem& p, const Rows& rows, const Tile& tile, Scratch& s, Partial state) {
  const Interval seen_by = find_visible_rows(p, rows, tile, s.begin.data(), s.end.data());
  if (seen_by.begin >= seen_by.end) return;
  load_tile(p, rows, tile, s);
  if (p.has_mask_array()) load_mask(p, rows, tile, s.mask);

  const int64_t first = seen_by.begin, columns = padded_columns(p.head_dim);
  const int n = static_cast<int>(seen_by.end - first);
  MatrixProduct scores;
  scores.n_rows = n;
  scores.n_columns = kBlockTokens;
  scores.depth = p.head_dim;
  scores.a = s.q + first * p.head_dim;
  scores.a_stride = p.head_dim;
  scores.b = s.keys;
  scores.b_stride = kBlockTokens;
  scores.c = s.scores;
  scores.c_stride = kBlockTokens;
  multiply(scores);

  SoftmaxStep softmax;
  softmax.n_rows = n;
  softmax.scores = s.scores;
  softmax.begin = s.begin.data() + first;
  softmax.end = s.end.data() + first;
  softmax.mask = p.has_mask_array() ? s.mask + first * kBlockTokens : nullptr;
  softmax.softcap = p.params.logit_softcap;
  softmax.scale =
      softmax.softcap > 0 ? p.params.scale : static_cast<float>(p.params.scale * kLog2E);
  softmax.max = state.max + first;
  softmax.sum = state.sum + first;
  softmax.shrink = s.shrink;
  softmax_step(softmax);

  MatrixProduct output;
  output.n_rows = n;
  output.n_columns = static_cast<int>(columns);
  output.depth = *std::max_element(softmax.end, softmax.end + n);
  output.a = s.scores;
  output.a_stride = kBlockTokens;
  output.b = s.values;
  output.b_stride = columns;
  output.c = state.out + first * columns;
  output.c_stride = columns;
  output.row_scale = s.shrink;
  multiply(output);
}

void attend_segment(const Problem& p, const Rows& rows, const Segment& segment, Partial state) {
  Scratch scratch(p, rows.n);
  std::fill(state.max, state.max + rows.n, -kInfinity);
  std::fill(state.sum, state.sum + rows.n, 0.0f);
  std::fill(state.out, state.out + rows.n * padded_columns(p.head_dim), 0.0f);
  p.load_queries(rows.b, rows.kv_head, rows.first, rows.n, scratch.q);
  if (segment.packed) p.source.key_codec->transform_query(rows.kv_head, scratch.q, rows.n);
  for (int64_t i = segment.begin; i < segment.end; ++i) {
    add_tile(p, rows, p.tiles[i], scratch, state);
  }
}

std::unique_ptr<const CodeScores> prepare_scores(const Problem& p, const Rows& rows) {
  std::vector<float> q(int64_t{rows.n} * p.head_dim);
  p.load_queries(rows.b, rows.kv_head, rows.first, rows.n, q.data());
  const double unit = p.params.logit_softcap > 0 ? 1.0 : kLog2E;
  const float scale = static_cast<float>(p.params.scale * unit);
  for (float& x : q) x *= scale;
  p.source.key_codec->transform_query(rows.kv_head, q.data(), rows.n);
  BlockPlace place;
  place.sequence = rows.b;
  place.kv_head = rows.kv_head;
  return p.source.key_codec->code_scores(place, q.data(), rows.n);
}

// exp2(a - b) where -inf counts as nothing.
float weight(float a, float b) { return a == -kInfinity ? 0.0f : std::exp2(a - b); }

// Segments of one form -> max, sum and out of the first of them, out divided by the sum.
void merge_form(const Partial* parts, size_t n_parts, int n_rows, int64_t columns) {
  const Partial& to = parts[0];
  for (int r = 0; r < n_rows; ++r) {
    float top = to.max[r];
    for (size_t i = 1; i < n_parts; ++i) top = std::max(top, parts[i].max[r]);
    if (top == -kInfinity) continue;
    float sum = 0;
    for (size_t i = 0; i < n_parts; ++i) sum += parts[i].sum[r] * weight(parts[i].max[r], top);
    float* out = to.out + r * columns;
    const float keep = weight(to.max[r], top) / sum;
    for (int64_t d = 0; d < columns; ++d) out[d] *= keep;
    for (size_t i = 1; i < n_parts; ++i) {
      const float share = weight(parts[i].max[r], top) / sum;
      const float* add = parts[i].out + r * columns;
      for (int64_t d = 0; d < columns; ++d) out[d] += share * add[d];
    }
    to.max[r] = top;
    to.sum[r] = sum;
  }
}

// parts: one per segment. Merges them and writes the rows of out and lse.
void finish_rows(const Problem& p, const Rows& rows, const std::vector<Segment>& segments,
                 const std::vector<Partial>& parts) {
  const int64_t D = p.head_dim, columns = padded_columns(D);
  std::vector<float> merged(2 * rows.n * D, 0.0f);  // packed rows, then exact rows
  std::vector<float> max(2 * rows.n, -kInfinity), sum(2 * rows.n, 0.0f);
  const size_t n_packed = std::count_if(segments.begin(), segments.end(),
                                        [](const Segment& segment) { return segment.packed; });
  for (int form = 0; form < 2; ++form) {
    const size_t begin = form == 0 ? 0 : n_packed;
    const size_t end = form == 0 ? n_packed : segments.size();
    if (begin == end) continue;
    const Partial& first = parts[begin];
    merge_form(&first, end - begin, rows.n, columns);
    for (int r = 0; r < rows.n; ++r) {
      max[form * rows.n + r] = first.max[r];
      sum[form * rows.n + r] = first.sum[r];
      std::copy_n(first.out + r * columns, D, merged.data() + (form * rows.n + r) * D);
    }
    if (form == 0) p.source.value_codec->inverse(rows.kv_head, merged.data(), rows.n);
  }

  for (int r = 0; r < rows.n; ++r) {
    const int head = p.q_head_of(rows.kv_head, rows.first + r);
    const int64_t query = p.query_of(rows.first + r);
    const float sink = static_cast<float>(kLog2E * p.sink_logit(head));
    const int exact = rows.n + r;
    const float top = std::max({max[r], max[exact], sink});
    const float packed_sum = sum[r] * weight(max[r], top);
    const float exact_sum = sum[exact] * weight(max[exact], top);
    const float total = top == -kInfinity ? 1.0f : packed_sum + exact_sum + weight(sink, top);
    void* out = p.out.at(rows.b, head, query);
    for (int64_t d = 0; d < D; ++d) {
      const float x =
          packed_sum / total * merged[r * D + d] + exact_sum / total * merged[exact * D + d];
      store_element(out, p.out.dtype, d, x);
    }
    if (!p.lse.empty()) {
      *static_cast<float*>(p.lse.at(rows.b, head, query)) =
          static_cast<float>((top + std::log2(static_cast<double>(total))) / kLog2E);
    }
  }
}

// What the segments of one head share.
struct HeadWork {
  std::once_flag prepare;
  std::unique_ptr<const CodeScores> scores;
  std::atomic<int64_t> left{0};  // segments that are not done
};

// Few rows: heads x segments are the work items, in one parallel loop, because waking the workers
// takes as long as a short context. The first item of a head makes its look-up tables, the last one
// merges its segments. Heads go in waves, so that the tables of a large batch do not all exist at
// once.
void attend_few_rows(const Problem& p, const CodeUse& use, const std::vector<Segment>& segments) {
  const int64_t n_segments = static_cast<int64_t>(segments.size());
  const int64_t n_heads = int64_t{p.batch} * p.n_kv_heads;
  const int64_t wave = use.keys ? std::max<int64_t>(8, kPreparedRows / p.n_rows()) : n_heads;
  for (int64_t first = 0; first < n_heads; first += wave) {
    const int64_t n = std::min(wave, n_heads - first);
    Partials partials(n * n_segments, p.n_rows(), padded_columns(p.head_dim));
    std::vector<HeadWork> heads(n);
    for (HeadWork& head : heads) head.left = n_segments;
    auto rows_of = [&](int64_t i) {
      return Rows{static_cast<int>((first + i) / p.n_kv_heads),
                  static_cast<int>((first + i) % p.n_kv_heads), 0, static_cast<int>(p.n_rows())};
    };
    auto finish = [&](int64_t i) {
      std::vector<Partial> parts;
      for (int64_t k = 0; k < n_segments; ++k) parts.push_back(partials[i * n_segments + k]);
      finish_rows(p, rows_of(i), segments, parts);
    };
    if (segments.empty()) {
      for (int64_t i = 0; i < n; ++i) finish(i);
    }
    parallel_for(n * n_segments, [&](long item) {
      const int64_t i = item / n_segments;
      HeadWork& head = heads[i];
      const Rows rows = rows_of(i);
      const Segment& segment = segments[item % n_segments];
      if (segment.packed && (use.keys || use.values)) {
        if (use.keys) {
          std::call_once(head.prepare, [&] { head.scores = prepare_scores(p, rows); });
        }
        attend_codes(p, rows, segment, use, head.scores.get(), partials[item]);
      } else {
        attend_segment(p, rows, segment, partials[item]);
      }
      if (--head.left > 0) return;
      head.scores.reset();
      finish(i);
    });
  }
}

}  // namespace

Interval find_visible_rows(const Problem& p, const Rows& rows, const Tile& tile, int* begin,
                           int* end) {
  Interval seen_by{rows.n, 0};
  Interval columns;
  for (int r = 0; r < rows.n; ++r) {
    const int64_t row = rows.first + r;
    if (r == 0 || row % p.group == 0) {
      Interval seen = p.visible(tile, p.position_of(row));
      columns.begin = std::clamp<int64_t>(seen.begin - tile.position, 0, tile.count);
      columns.end = std::clamp<int64_t>(seen.end - tile.position, 0, tile.count);
    }
    begin[r] = static_cast<int>(columns.begin);
    end[r] = static_cast<int>(columns.end);
    if (columns.begin < columns.end) {
      seen_by.begin = std::min<int64_t>(seen_by.begin, r);
      seen_by.end = r + 1;
    }
  }
  return seen_by;
}

void load_mask(const Problem& p, const Rows& rows, const Tile& tile, float* mask) {
  for (int r = 0; r < rows.n; ++r) {
    const int64_t row = rows.first + r;
    const int head = p.q_head_of(rows.kv_head, row);
    p.load_mask(rows.b, head, p.query_of(row), tile.position, tile.count, mask + r * kBlockTokens);
  }
}

void attend_cpu(const Problem& p) {
  cpu::apply_environment();
  const CodeUse use = choose_code_use(Backend::cpu, p.source, p.n_rows(), p.n_packed_tiles);
  const std::vector<Segment> segments = cut_segments(p, use.keys || use.values);
  const int64_t row_tiles = n_row_tiles(p);
  if (row_tiles == 1) return attend_few_rows(p, use, segments);

  const int64_t n_heads = int64_t{p.batch} * p.n_kv_heads;
  parallel_for(n_heads * row_tiles, [&](long item) {
    const int64_t head = item / row_tiles, first = item % row_tiles * kMaxRows;
    const Rows rows{static_cast<int>(head / p.n_kv_heads), static_cast<int>(head % p.n_kv_heads),
                    first, static_cast<int>(std::min(kMaxRows, p.n_rows() - first))};
    Partials partials(static_cast<int64_t>(segments.size()), rows.n, padded_columns(p.head_dim));
    std::vector<Partial> parts;
    for (size_t i = 0; i < segments.size(); ++i) {
      parts.push_back(partials[i]);
      attend_segment(p, rows, segments[i], parts.back());
    }
    finish_rows(p, rows, segments, parts);
  });
}

}  // namespace veloxquant::attention
