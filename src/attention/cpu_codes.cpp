// Packed segments on their codes, for the few query rows of a decode step:
//
//   S = scores of all tokens of the segment (the key codec's CodeScores)
//   P = exp2(S - max), masked
//   O = sum of P over the values (the value codec's CodeSums)
//
// All scores come before the first value: the sums need no rescaling, and a codec may keep them in
// any form until the end of the segment. A side without such a kernel decodes tiles, as cpu.cpp.
#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "src/attention/cpu_kernels.h"
#include "src/attention/cpu_parts.h"

namespace veloxquant::attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// More rows than this (16 queries of 4 heads) share a decoded tile at less cost.
constexpr int64_t kMaxCodeRows = 64;
// Preparing look-up tables costs about as much as decoding this many tiles.
constexpr int64_t kMinCodeTiles = 8;

using Floats = hwy::AlignedFreeUniquePtr<float[]>;

// Consecutive blocks of one packed run that some row sees; tiles [first, first + n).
struct Stretch {
  int64_t first;
  int n;
};

class CodeSegment {
 public:
  CodeSegment(const Problem& p, const Rows& rows, const Segment& segment)
      : p_(p), rows_(rows), segment_(segment) {
    const int64_t n_tiles = segment.end - segment.begin;
    stride_ = n_tiles * kBlockTokens;
    columns_ = padded_columns(p.head_dim);
    scores_ = hwy::AllocateAligned<float>(stride_ * rows.n);
    begin_.resize(n_tiles * rows.n);
    end_.resize(n_tiles * rows.n);
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      const int64_t at = (i - segment.begin) * rows.n;
      const Interval seen = find_visible_rows(p, rows, p.tiles[i], &begin_[at], &end_[at]);
      if (seen.begin < seen.end) add_tile(i);
    }
  }

  void score(const CodeScores* codes) {
    is_scaled_ = codes != nullptr;  // with their query
    if (codes == nullptr) return score_tiles();
    for (const Stretch& stretch : stretches_) {
      const uint8_t* blocks = p_.key_block(rows_.b, rows_.kv_head, p_.tiles[stretch.first]);
      codes->score(blocks, stretch.n, scores_of(stretch.first), stride_);
    }
  }

  void softmax(Partial state) {
    std::fill(state.max, state.max + rows_.n, -kInfinity);
    std::fill(state.sum, state.sum + rows_.n, 0.0f);
    std::vector<float> mask(p_.has_mask_array() ? rows_.n * kBlockTokens : 0);
    SoftmaxStep step;
    step.n_rows = rows_.n;
    step.stride = stride_;
    step.softcap = p_.params.logit_softcap;
    step.scale = static_cast<float>(step.softcap > 0 ? p_.params.scale : p_.params.scale * kLog2E);
    if (is_scaled_) step.scale = 1.0f;
    step.max = state.max;
    step.sum = state.sum;
    step.mask = p_.has_mask_array() ? mask.data() : nullptr;
    for_each_tile([&](int64_t i) {
      const int64_t at = (i - segment_.begin) * rows_.n;
      step.begin = &begin_[at];
      step.end = &end_[at];
      step.scores = scores_of(i);
      if (step.mask != nullptr) load_mask(p_, rows_, p_.tiles[i], mask.data());
      mask_scores(step);
    });
    for_each_tile([&](int64_t i) {
      step.scores = scores_of(i);
      exponentiate(step);
    });
  }

  void add_values(CodeSums* codes, float* out) {
    if (codes == nullptr) return add_value_tiles(out);
    for (const Stretch& stretch : stretches_) {
      const uint8_t* blocks = p_.value_block(rows_.b, rows_.kv_head, p_.tiles[stretch.first]);
      codes->add(blocks, stretch.n, scores_of(stretch.first), stride_);
    }
    codes->take(out, columns_);
  }

 private:
  void add_tile(int64_t i) {
    if (!stretches_.empty()) {
      Stretch& last = stretches_.back();
      const Tile &before = p_.tiles[i - 1], &tile = p_.tiles[i];
      if (last.first + last.n == i && before.run == tile.run && before.offset + 1 == tile.offset) {
        ++last.n;
        return;
      }
    }
    stretches_.push_back({i, 1});
  }

  float* scores_of(int64_t tile) const {
    return scores_.get() + (tile - segment_.begin) * kBlockTokens;
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    for (const Stretch& stretch : stretches_) {
      for (int i = 0; i < stretch.n; ++i) body(stretch.first + i);
    }
  }

  BlockPlace place_of(const Tile& tile) const {
    BlockPlace place;
    place.sequence = rows_.b;
    place.kv_head = rows_.kv_head;
    place.position = tile.position;
    return place;
  }

  void score_tiles() {
    Floats q = hwy::AllocateAligned<float>(int64_t{rows_.n} * p_.head_dim);
    Floats keys = hwy::AllocateAligned<float>(int64_t{kBlockTokens} * p_.head_dim);
    p_.load_queries(rows_.b, rows_.kv_head, rows_.first, rows_.n, q.get());
    p_.source.key_codec->transform_query(rows_.kv_head, q.get(), rows_.n);
    MatrixProduct product;
    product.n_rows = rows_.n;
    product.n_columns = kBlockTokens;
    product.depth = p_.head_dim;
    product.a = q.get();
    product.a_stride = p_.head_dim;
    product.b = keys.get();
    product.b_stride = kBlockTokens;
    product.c_stride = stride_;
    for_each_tile([&](int64_t i) {
      const Tile& tile = p_.tiles[i];
      const uint8_t* block = p_.key_block(rows_.b, rows_.kv_head, tile);
      p_.source.key_codec->decode_block_transposed(Backend::cpu, place_of(tile), block, tile.count,
                                                   keys.get());
      product.c = scores_of(i);
      multiply(product);
    });
  }

  void add_value_tiles(float* out) {
    Floats values = hwy::AllocateAligned<float>(kBlockTokens * columns_);
    std::fill(values.get(), values.get() + kBlockTokens * columns_, 0.0f);
    std::fill(out, out + rows_.n * columns_, 0.0f);
    const std::vector<float> keep(rows_.n, 1.0f);
    MatrixProduct product;
    product.n_rows = rows_.n;
    product.n_columns = static_cast<int>(columns_);
    product.a_stride = stride_;
    product.b = values.get();
    product.b_stride = columns_;
    product.c = out;
    product.c_stride = columns_;
    product.row_scale = keep.data();
    for_each_tile([&](int64_t i) {
      const Tile& tile = p_.tiles[i];
      const uint8_t* block = p_.value_block(rows_.b, rows_.kv_head, tile);
      p_.source.value_codec->decode_block(Backend::cpu, place_of(tile), block, tile.count,
                                          values.get(), columns_);
      product.depth = tile.count;
      product.a = scores_of(i);
      multiply(product);
    });
  }

  const Problem& p_;
  const Rows& rows_;
  const Segment& segment_;
  int64_t stride_, columns_;
  bool is_scaled_ = false;
  Floats scores_;  // [n rows][stride]
  std::vector<int> begin_, end_;
  std::vector<Stretch> stretches_;
};

}  // namespace

CodeUse choose_code_use(Backend backend, const KeyValueSource& source, int64_t n_rows,
                        int64_t n_packed_tiles) {
  CodeUse use;
  if (n_packed_tiles == 0) return use;
  if (backend == Backend::reference) {
    use.name = "the reference decodes";
  } else if (n_rows > kMaxCodeRows) {
    use.name = "many query rows share a decoded tile";
  } else if (n_packed_tiles < kMinCodeTiles) {
    use.name = "few blocks";
  } else {
    const std::string keys = source.key_codec->code_kernel(backend);
    const std::string values = source.value_codec->code_kernel(backend);
    use.keys = !keys.empty();
    use.values = !values.empty();
    if (!use.keys && !use.values) {
      use.name = "no kernel on these codes";
    } else if (keys == values) {
      use.name = keys;
    } else {
      use.name =
          (use.keys ? keys : "decoded") + " keys, " + (use.values ? values : "decoded") + " values";
    }
  }
  return use;
}

void attend_codes(const Problem& p, const Rows& rows, const Segment& segment, const CodeUse& use,
                  const CodeScores* scores, Partial state) {
  CodeSegment work(p, rows, segment);
  work.score(scores);
  work.softmax(state);
  std::unique_ptr<CodeSums> sums;
  if (use.values) {
    BlockPlace place;
    place.sequence = rows.b;
    place.kv_head = rows.kv_head;
    sums = p.source.value_codec->code_sums(place, rows.n);
  }
  work.add_values(sums.get(), state.out);
}

}  // namespace veloxquant::attention
