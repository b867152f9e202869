// One item of work is a KV head and a segment of its tokens, for all query rows of the head's
// group: tiles of 64 tokens, online softmax, segments merged by their log-sum-exp.
#include "veloxquant/rvq_attend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/rvq_attend.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "src/backends/cpu/unroll.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Ints = hn::RebindToSigned<Floats>;
using FloatVector = hn::Vec<Floats>;

// Up to 16 entries in one register or two, more by gathers. `last`: the last valid code.
template <bool kInRegisters>
struct CentroidTable {
  const float* entries;  // 16 or more
  FloatVector low, high;
  hn::Vec<Ints> last;

  CentroidTable(const float* padded, int n) : entries(padded) {
    const Floats d;
    low = hn::LoadU(d, padded);
    high = hn::LoadU(d, padded + 16 - hn::Lanes(d));
    last = hn::Set(Ints(), n - 1);
  }
  HWY_INLINE FloatVector look_up(const uint8_t* codes) const {
    const Floats d;
    const Ints di;
    const hn::Rebind<uint8_t, Ints> du8;
    const auto code = hn::Min(hn::PromoteTo(di, hn::LoadU(du8, codes)), last);
#if HWY_MAX_BYTES >= 64
    if constexpr (kInRegisters) {
      return hn::TableLookupLanes(low, hn::IndicesFromVec(d, code));
    }
#elif HWY_MAX_BYTES >= 32
    if constexpr (kInRegisters) {
      const auto index = hn::IndicesFromVec(d, hn::And(code, hn::Set(di, 7)));
      const FloatVector upper = hn::BitCast(d, hn::ShiftLeft<28>(code));
      return hn::IfNegativeThenElse(upper, hn::TableLookupLanes(high, index),
                                    hn::TableLookupLanes(low, index));
    }
#endif
    return hn::GatherIndex(d, entries, code);
  }
};

template <bool kInRegisters, int kRows>
HWY_INLINE void score_tokens(const float* HWY_RESTRICT table1, int n1,
                             const float* HWY_RESTRICT table2, int n2,
                             const uint8_t* HWY_RESTRICT codes1, const uint8_t* HWY_RESTRICT codes2,
                             int n_tokens, int dim, const float* HWY_RESTRICT q,
                             float* HWY_RESTRICT scores) {
  const Floats d;
  const int lanes = static_cast<int>(hn::Lanes(d)), whole = dim / lanes * lanes;
  const CentroidTable<kInRegisters> first(table1, n1), second(table2, n2);
  for (int t = 0; t < n_tokens; ++t, codes1 += dim, codes2 += dim) {
    FloatVector sum[kRows];
    VELOXQUANT_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(d);
    for (int i = 0; i < whole; i += lanes) {
      const FloatVector key = hn::Add(first.look_up(codes1 + i), second.look_up(codes2 + i));
      VELOXQUANT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = hn::MulAdd(key, hn::LoadU(d, q + r * dim + i), sum[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float total = hn::GetLane(hn::SumOfLanes(d, sum[r]));
      for (int i = whole; i < dim; ++i) {
        total += q[r * dim + i] * (table1[std::min<int>(codes1[i], n1 - 1)] +
                                   table2[std::min<int>(codes2[i], n2 - 1)]);
      }
      scores[r * 64 + t] = total;
    }
  }
}

template <bool kInRegisters>
void score_rows(const float* table1, int n1, const float* table2, int n2, const uint8_t* codes1,
                const uint8_t* codes2, int n_tokens, int dim, const float* q, int n_rows,
                float* scores) {
  int r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    score_tokens<kInRegisters, 4>(table1, n1, table2, n2, codes1, codes2, n_tokens, dim,
                                  q + r * dim, scores + r * 64);
  }
  for (; r < n_rows; ++r) {
    score_tokens<kInRegisters, 1>(table1, n1, table2, n2, codes1, codes2, n_tokens, dim,
                                  q + r * dim, scores + r * 64);
  }
}

// Tables are padded to 16 entries at least. scores: [n_rows][64]
void score_tile(const float* table1, int n1, const float* table2, int n2, const uint8_t* codes1,
                const uint8_t* codes2, int n_tokens, int dim, const float* q, int n_rows,
                float* scores) {
  (n1 <= 16 && n2 <= 16 ? score_rows<true> : score_rows<false>)(table1, n1, table2, n2, codes1,
                                                                codes2, n_tokens, dim, q, n_rows,
                                                                scores);
}

// out[d] = shrink * out[d] + sum_t weights[t] * rows[t][d]
void add_values(const float* HWY_RESTRICT rows, int n_tokens, int dim,
                const float* HWY_RESTRICT weights, float shrink, float* HWY_RESTRICT out) {
  const Floats d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    FloatVector sum[4];
    VELOXQUANT_UNROLL
    for (int k = 0; k < 4; ++k) {
      sum[k] = hn::Mul(hn::LoadU(d, out + i + k * lanes), hn::Set(d, shrink));
    }
    for (int t = 0; t < n_tokens; ++t) {
      const FloatVector weight = hn::Set(d, weights[t]);
      VELOXQUANT_UNROLL
      for (int k = 0; k < 4; ++k) {
        sum[k] = hn::MulAdd(weight, hn::LoadU(d, rows + t * dim + i + k * lanes), sum[k]);
      }
    }
    VELOXQUANT_UNROLL
    for (int k = 0; k < 4; ++k) hn::StoreU(sum[k], d, out + i + k * lanes);
  }
  for (; i < dim; ++i) {
    float sum = out[i] * shrink;
    for (int t = 0; t < n_tokens; ++t) sum += weights[t] * rows[t * dim + i];
    out[i] = sum;
  }
}

}  // namespace veloxquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"
#include "src/math/float16.h"
#include "veloxquant/backend.h"

namespace veloxquant {

HWY_EXPORT(score_tile);
HWY_EXPORT(add_values);

namespace {

constexpr int kTile = 64;
constexpr int64_t kSegment = 1024;
constexpr int64_t kMaxSplitRows = 64;  // more query rows give work enough without segments
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Partial {
  std::vector<float> max, sum, out;
};

class Attention {
 public:
  explicit Attention(const RvqAttendProblem& p) : p_(p) {
    group_ = p.heads / p.kv_heads;
    rows_ = group_ * p.n_queries;
    out_dim_ = p.n_subvectors * p.sub_dim;
    segment_ = rows_ <= kMaxSplitRows ? kSegment : std::max<int64_t>(1, p.n_tokens);
    n_segments_ = std::max<int64_t>(1, (p.n_tokens + segment_ - 1) / segment_);
    for (const auto* table : {&p.centroids1, &p.centroids2}) {
      padded_.push_back(*table);
      padded_.back().resize(std::max<size_t>(16, table->size()), table->back());
    }
    last_value_ = static_cast<int>(p.value_table.size()) / p.sub_dim - 1;
  }

  void run(uint16_t* out) {
    const int64_t kv = int64_t{p_.batch} * p_.kv_heads;
    std::vector<Partial> partials(kv * n_segments_);
    parallel_for(static_cast<long>(partials.size()),
                 [&](long i) { partials[i] = segment(i / n_segments_, i % n_segments_); });
    for (int64_t i = 0; i < kv; ++i) {
      for (int64_t row = 0; row < rows_; ++row) merge(&partials[i * n_segments_], i, row, out);
    }
  }

 private:
  // Row `row` of a KV head: query `row % n_queries` of head `row / n_queries` of its group.
  Partial segment(int64_t kv, int64_t index) const {
    const int64_t begin = index * segment_, end = std::min(p_.n_tokens, begin + segment_);
    Partial result{std::vector<float>(rows_, -kInfinity), std::vector<float>(rows_, 0.0f),
                   std::vector<float>(rows_ * out_dim_, 0.0f)};
    std::vector<float> scores(rows_ * kTile), rows(kTile * out_dim_);
    const float* q = p_.q + kv * rows_ * p_.dim;  // heads of a group are neighbours
    for (int64_t t = begin; t < end; t += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, end - t));
      const int64_t token = kv * p_.n_tokens + t;
      HWY_DYNAMIC_DISPATCH(score_tile)
      (padded_[0].data(), static_cast<int>(p_.centroids1.size()), padded_[1].data(),
       static_cast<int>(p_.centroids2.size()), p_.keys1 + token * p_.dim, p_.keys2 + token * p_.dim,
       n, p_.dim, q, static_cast<int>(rows_), scores.data());
      decode_values(p_.values + token * p_.n_subvectors, n, rows.data());
      for (int64_t row = 0; row < rows_; ++row) {
        float* s = &scores[row * kTile];
        const float most = masked(kv, row, t, n, s);
        const float max = std::max(result.max[row], most);
        if (max == -kInfinity) continue;
        const float shrink = std::exp(result.max[row] - max);
        float sum = 0.0f;
        for (int i = 0; i < n; ++i) sum += s[i] = std::exp(s[i] - max);
        result.sum[row] = result.sum[row] * shrink + sum;
        result.max[row] = max;
        HWY_DYNAMIC_DISPATCH(add_values)
        (rows.data(), n, out_dim_, s, shrink, &result.out[row * out_dim_]);
      }
    }
    return result;
  }

  void decode_values(const uint8_t* codes, int n, float* rows) const {
    for (int64_t i = 0; i < int64_t{n} * p_.n_subvectors; ++i, rows += p_.sub_dim) {
      const float* entry = &p_.value_table[std::min<int>(codes[i], last_value_) * p_.sub_dim];
      if (p_.sub_dim == 4) {
        std::memcpy(rows, entry, 16);
      } else if (p_.sub_dim == 8) {
        std::memcpy(rows, entry, 32);
      } else {
        std::memcpy(rows, entry, sizeof(float) * p_.sub_dim);
      }
    }
  }

  // Raw products to scaled and masked scores; returns the largest.
  float masked(int64_t kv, int64_t row, int64_t t, int n, float* s) const {
    const int64_t query = row % p_.n_queries;
    const int64_t position = p_.n_tokens - p_.n_queries + query;
    const float* norms = p_.norms == nullptr ? nullptr : p_.norms + kv * p_.n_tokens + t;
    const float* mask = nullptr;
    if (p_.mask != nullptr) {
      const int64_t head = kv % p_.kv_heads * group_ + row / p_.n_queries;
      mask = p_.mask + kv / p_.kv_heads * p_.mask_stride[0] + head * p_.mask_stride[1] +
             query * p_.mask_stride[2] + t * p_.mask_stride[3];
    }
    float most = -kInfinity;
    for (int i = 0; i < n; ++i) {
      const int64_t key = t + i;
      s[i] *= p_.scale;
      if (norms != nullptr) s[i] *= norms[i];
      if (mask != nullptr) s[i] += mask[i * p_.mask_stride[3]];
      if (p_.causal && key > position) s[i] = -kInfinity;
      if (p_.sliding_window > 0 && key <= position - p_.sliding_window) s[i] = -kInfinity;
      most = std::max(most, s[i]);
    }
    return most;
  }

  void merge(const Partial* parts, int64_t kv, int64_t row, uint16_t* out) const {
    float max = -kInfinity;
    for (int64_t i = 0; i < n_segments_; ++i) max = std::max(max, parts[i].max[row]);
    std::vector<float> total(out_dim_, 0.0f);
    float sum = 0.0f;
    for (int64_t i = 0; i < n_segments_ && max != -kInfinity; ++i) {
      const float factor = std::exp(parts[i].max[row] - max);
      sum += factor * parts[i].sum[row];
      for (int d = 0; d < out_dim_; ++d) total[d] += factor * parts[i].out[row * out_dim_ + d];
    }
    for (int d = 0; d < out_dim_; ++d) {
      out[(kv * rows_ + row) * out_dim_ + d] = f32_to_f16(sum > 0.0f ? total[d] / sum : 0.0f);
    }
  }

  const RvqAttendProblem& p_;
  std::vector<std::vector<float>> padded_;
  int64_t group_, rows_, segment_, n_segments_;
  int out_dim_, last_value_;
};

}  // namespace

void rvq_attend(const RvqAttendProblem& problem, uint16_t* out) {
  cpu::apply_environment();
  Attention(problem).run(out);
}

}  // namespace veloxquant
#endif  // HWY_ONCE
