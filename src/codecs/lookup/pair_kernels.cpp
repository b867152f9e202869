#include "src/codecs/lookup/pair_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/pair_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers: no look-ups either
void ScorePairs(const Blocks&, const PairTables&, const float*, float*) {}
void AddPairs(const Blocks&, const PairTables&, const float*, float*) {}
void FoldPairs(int, float*) {}
void DoublePairs(int, float*) {}
void PairDigits(const float*, int, float*) {}
#else

using Floats = hn::CappedTag<float, kPairLanes>;
using Vector = hn::Vec<Floats>;
constexpr int kLanes = HWY_MIN(kPairLanes, HWY_MAX_BYTES / 4);
constexpr int kParts = kPairLanes / kLanes;  // vectors of a panel

// The pair of a code in every pair of lanes: one load.
HWY_INLINE Vector pair_of(const float* table, uint64_t codes, int i) {
  const hn::Repartition<double, Floats> pairs;
  double pair;
  std::memcpy(&pair, table + 2 * ((codes >> (8 * i)) & 0xff), sizeof pair);
  return hn::BitCast(Floats(), hn::Set(pairs, pair));
}

HWY_INLINE const float* table_of(const Blocks& blocks, const PairTables& tables, int m) {
  if (tables.stride != 0) return tables.data + m * tables.stride;
  return tables.data + int64_t{m / tables.codes_a_part} * blocks.n_values * 2;
}

// n_rows rows of codes at a time: their tables stay in the L1 cache while the blocks go by. Eight
// sums hide the latency of the multiplications.
template <int n_rows>
HWY_INLINE void score_rows(const Blocks& blocks, const PairTables& tables, int m, const float* q,
                           float* tokens) {
  constexpr int kSums = 8 / kParts;
  const Floats d;
  const float* table[n_rows];
  for (int r = 0; r < n_rows; ++r) table[r] = table_of(blocks, tables, m + r);
  for (int block = 0; block < blocks.n; ++block) {
    const uint8_t* codes = blocks.data + block * blocks.stride + m * kTokens;
    for (int t = 0; t < kTokens; t += kSums, tokens += kSums * kPairLanes) {
      Vector sum[kSums][kParts];
      HWY_UNROLL(8)
      for (int i = 0; i < kSums; ++i) {
        HWY_UNROLL(2)
        for (int p = 0; p < kParts; ++p) {
          sum[i][p] = m == 0 ? hn::Zero(d) : hn::Load(d, tokens + i * kPairLanes + p * kLanes);
        }
      }
      HWY_UNROLL(8)
      for (int r = 0; r < n_rows; ++r) {
        uint64_t few = 0;
        std::memcpy(&few, codes + r * kTokens + t, kSums);
        Vector left[kParts];
        HWY_UNROLL(2)
        for (int p = 0; p < kParts; ++p) {
          left[p] = hn::Load(d, q + (m + r) * kPairLanes + p * kLanes);
        }
        HWY_UNROLL(8)
        for (int i = 0; i < kSums; ++i) {
          const Vector pair = pair_of(table[r], few, i);
          HWY_UNROLL(2)
          for (int p = 0; p < kParts; ++p) sum[i][p] = hn::MulAdd(left[p], pair, sum[i][p]);
        }
      }
      HWY_UNROLL(8)
      for (int i = 0; i < kSums; ++i) {
        HWY_UNROLL(2)
        for (int p = 0; p < kParts; ++p) {
          hn::Store(sum[i][p], d, tokens + i * kPairLanes + p * kLanes);
        }
      }
    }
  }
}

template <int n_rows>
HWY_INLINE void add_rows(const Blocks& blocks, const PairTables& tables, int m, const float* tokens,
                         float* sums) {
  const Floats d;
  const float* table[n_rows];
  Vector sum[n_rows][kParts];
  sums += m * kPairLanes;
  HWY_UNROLL(8)
  for (int r = 0; r < n_rows; ++r) {
    table[r] = table_of(blocks, tables, m + r);
    HWY_UNROLL(2)
    for (int p = 0; p < kParts; ++p) sum[r][p] = hn::Load(d, sums + r * kPairLanes + p * kLanes);
  }
  for (int block = 0; block < blocks.n; ++block) {
    const uint8_t* codes = blocks.data + block * blocks.stride + m * kTokens;
    for (int t = 0; t < kTokens; t += 8, tokens += 8 * kPairLanes) {
      uint64_t eight[n_rows];
      HWY_UNROLL(8)
      for (int r = 0; r < n_rows; ++r) std::memcpy(&eight[r], codes + r * kTokens + t, 8);
      HWY_UNROLL(8)
      for (int i = 0; i < 8; ++i) {
        Vector weight[kParts];
        HWY_UNROLL(2)
        for (int p = 0; p < kParts; ++p) {
          weight[p] = hn::Load(d, tokens + i * kPairLanes + p * kLanes);
        }
        HWY_UNROLL(8)
        for (int r = 0; r < n_rows; ++r) {
          const Vector pair = pair_of(table[r], eight[r], i);
          HWY_UNROLL(2)
          for (int p = 0; p < kParts; ++p) sum[r][p] = hn::MulAdd(weight[p], pair, sum[r][p]);
        }
      }
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < n_rows; ++r) {
    HWY_UNROLL(2)
    for (int p = 0; p < kParts; ++p) hn::Store(sum[r][p], d, sums + r * kPairLanes + p * kLanes);
  }
}

void ScorePairs(const Blocks& blocks, const PairTables& tables, const float* q, float* tokens) {
  constexpr int kRows = 8;
  int m = 0;
  for (; m + kRows <= blocks.n_codes; m += kRows) {
    score_rows<kRows>(blocks, tables, m, q, tokens);
  }
  for (; m < blocks.n_codes; ++m) score_rows<1>(blocks, tables, m, q, tokens);
}

void AddPairs(const Blocks& blocks, const PairTables& tables, const float* tokens, float* sums) {
  constexpr int kRows = 8 / kParts;
  int m = 0;
  for (; m + kRows <= blocks.n_codes; m += kRows) {
    add_rows<kRows>(blocks, tables, m, tokens, sums);
  }
  for (; m < blocks.n_codes; ++m) add_rows<1>(blocks, tables, m, tokens, sums);
}

void PairDigits(const float* digits, int n, float* table) {
  const hn::FixedTag<float, 4> d;
  for (int high = 0; high < n; ++high) {
    const auto second = hn::Set(d, digits[n + high]);
    for (int low = 0; low < n; low += 4, table += 8) {
      const auto first = hn::LoadU(d, digits + low);
      hn::Store(hn::InterleaveLower(d, first, second), d, table);
      hn::Store(hn::InterleaveUpper(d, first, second), d, table + 4);
    }
  }
}

void FoldPairs(int n, float* tokens) {
  const Floats d;
  for (int i = 0; i < n * kPairRows; i += kLanes) {
    const auto a = hn::Load(d, tokens + 2 * i), b = hn::Load(d, tokens + 2 * i + kLanes);
    hn::Store(hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a)), d, tokens + i);
  }
}

void DoublePairs(int n, float* tokens) {
  const hn::FixedTag<float, kPairRows> d;
  for (int i = (n - 1) * kPairRows; i >= 0; i -= kPairRows) {  // upwards would overwrite the next
    const auto rows = hn::Load(d, tokens + i);
    hn::Store(hn::InterleaveLower(d, rows, rows), d, tokens + 2 * i);
    hn::Store(hn::InterleaveUpper(d, rows, rows), d, tokens + 2 * i + kPairRows);
  }
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(ScorePairs);
HWY_EXPORT(AddPairs);
HWY_EXPORT(FoldPairs);
HWY_EXPORT(DoublePairs);
HWY_EXPORT(PairDigits);

void score_pairs(const Blocks& blocks, const PairTables& tables, const float* q, float* tokens) {
  HWY_DYNAMIC_DISPATCH(ScorePairs)(blocks, tables, q, tokens);
}

void add_pairs(const Blocks& blocks, const PairTables& tables, const float* tokens, float* sums) {
  HWY_DYNAMIC_DISPATCH(AddPairs)(blocks, tables, tokens, sums);
}

void fold_pairs(int n, float* tokens) { HWY_DYNAMIC_DISPATCH(FoldPairs)(n, tokens); }
void pair_digits(const float* digits, int n, float* table) {
  HWY_DYNAMIC_DISPATCH(PairDigits)(digits, n, table);
}

void double_pairs(int n, float* tokens) { HWY_DYNAMIC_DISPATCH(DoublePairs)(n, tokens); }

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
