#include "src/codecs/lookup/byte_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/byte_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers
int WidestPanel() { return 0; }
void MakeEntries(const float*, int, int, const float*, int, float*) {}
void LookUp(const Blocks&, const float*, int, float*) {}
void AddUp(const Blocks&, const float*, int, float*) {}
void FinishSums(const float*, int, int, float*, int, float*) {}
void AddDigit(float*, int, const float*, int, int) {}
void SplitDigit(float*, int, float*, int, int) {}
void SpreadPlanes(const uint8_t*, int, int, uint8_t*) {}
void TokensToRows(const float*, int, int, const float*, int, float*, int64_t) {}
void RowsToTokens(const float*, int64_t, int, int, const float*, int, float*) {}
#else

using Widest = hn::CappedTag<float, 8>;

int WidestPanel() { return static_cast<int>(hn::Lanes(Widest())); }

// ---- the two loops that touch every code -------------------------------------------------------

// Byte offset of the entry of code `i` of 8. Shifts leave the code multiplied by the entry size.
template <int width>
HWY_INLINE size_t entry_offset(uint64_t codes, int i) {
  constexpr int log2_bytes = width == 4 ? 4 : 5;
  const int shift = 8 * i - log2_bytes;
  const uint64_t moved = shift >= 0 ? codes >> shift : codes << -shift;
  return moved & (uint64_t{0xff} << log2_bytes);
}

template <int width>
HWY_INLINE float* at(const float* entries, size_t byte_offset) {
  return reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(entries) + byte_offset);
}

// n_rows rows of codes at a time: their entries stay in the L1 cache while the blocks go by.
template <int width, int n_rows, bool first>
HWY_INLINE void look_up_rows(const Blocks& blocks, int m, const float* entries, float* tokens) {
  const hn::FixedTag<float, width> d;
  const int64_t entries_a_code = int64_t{blocks.n_values} * width;
  for (int block = 0; block < blocks.n; ++block) {
    const uint8_t* codes = blocks.data + block * blocks.stride + m * kTokens;
    for (int t = 0; t < kTokens; t += 8, tokens += 8 * width) {
      uint64_t eight[n_rows];
      HWY_UNROLL(4)
      for (int r = 0; r < n_rows; ++r) std::memcpy(&eight[r], codes + r * kTokens + t, 8);
      HWY_UNROLL(8)
      for (int i = 0; i < 8; ++i) {
        auto sum = hn::Load(d, at<width>(entries, entry_offset<width>(eight[0], i)));
        HWY_UNROLL(4)
        for (int r = 1; r < n_rows; ++r) {
          const float* entry = entries + r * entries_a_code;
          sum = hn::Add(sum, hn::Load(d, at<width>(entry, entry_offset<width>(eight[r], i))));
        }
        if (!first) sum = hn::Add(sum, hn::Load(d, tokens + i * width));
        hn::Store(sum, d, tokens + i * width);
      }
    }
  }
}

template <int width>
void look_up_panel(const Blocks& blocks, const float* entries, float* tokens) {
  for (int m = 0; m < blocks.n_codes;) {
    const float* from = entries + int64_t{m} * blocks.n_values * width;
    const int rest = blocks.n_codes - m;
    if (rest >= 4) {
      m == 0 ? look_up_rows<width, 4, true>(blocks, m, from, tokens)
             : look_up_rows<width, 4, false>(blocks, m, from, tokens);
      m += 4;
    } else {
      m == 0 ? look_up_rows<width, 1, true>(blocks, m, from, tokens)
             : look_up_rows<width, 1, false>(blocks, m, from, tokens);
      m += 1;
    }
  }
}

template <int width, int n_rows>
HWY_INLINE void add_up_rows(const Blocks& blocks, int m, const float* tokens, float* sums) {
  const hn::FixedTag<float, width> d;
  const int64_t entries_a_code = int64_t{blocks.n_values} * width;
  for (int block = 0; block < blocks.n; ++block) {
    const uint8_t* codes = blocks.data + block * blocks.stride + m * kTokens;
    for (int t = 0; t < kTokens; t += 8, tokens += 8 * width) {
      uint64_t eight[n_rows];
      HWY_UNROLL(4)
      for (int r = 0; r < n_rows; ++r) std::memcpy(&eight[r], codes + r * kTokens + t, 8);
      HWY_UNROLL(8)
      for (int i = 0; i < 8; ++i) {
        const auto weight = hn::Load(d, tokens + i * width);
        HWY_UNROLL(4)
        for (int r = 0; r < n_rows; ++r) {
          float* sum = at<width>(sums + r * entries_a_code, entry_offset<width>(eight[r], i));
          hn::Store(hn::Add(hn::Load(d, sum), weight), d, sum);
        }
      }
    }
  }
}

template <int width>
void add_up_panel(const Blocks& blocks, const float* tokens, float* sums) {
  for (int m = 0; m < blocks.n_codes;) {
    float* to = sums + int64_t{m} * blocks.n_values * width;
    if (blocks.n_codes - m >= 4) {
      add_up_rows<width, 4>(blocks, m, tokens, to);
      m += 4;
    } else {
      add_up_rows<width, 1>(blocks, m, tokens, to);
      m += 1;
    }
  }
}

void LookUp(const Blocks& blocks, const float* entries, int width, float* tokens) {
#if HWY_MAX_BYTES >= 32
  if (width == 8) return look_up_panel<8>(blocks, entries, tokens);
#endif
  (void)width;
  look_up_panel<4>(blocks, entries, tokens);
}

void AddUp(const Blocks& blocks, const float* tokens, int width, float* sums) {
#if HWY_MAX_BYTES >= 32
  if (width == 8) return add_up_panel<8>(blocks, tokens, sums);
#endif
  (void)width;
  add_up_panel<4>(blocks, tokens, sums);
}

// ---- once per segment --------------------------------------------------------------------------

// One dimension after the other: `width` lanes times a broadcast table element.
template <int width>
HWY_INLINE void make_entries_any(const float* table, int n_values, int sub_dim, const float* q,
                                 float* entries) {
  const hn::FixedTag<float, width> d;
  for (int code = 0; code < n_values; ++code, table += sub_dim) {
    auto sum = hn::Mul(hn::Set(d, table[0]), hn::Load(d, q));
    for (int i = 1; i < sub_dim; ++i) {
      sum = hn::MulAdd(hn::Set(d, table[i]), hn::Load(d, q + i * width), sum);
    }
    hn::Store(sum, d, entries + code * width);
  }
}

// n_dims dimensions at a time in four sums each, which hide the latency of the additions.
template <int width, int n_dims>
HWY_INLINE void finish_dims(const float* table, int n_values, int sub_dim, const float* sums,
                            float* out) {
  const hn::FixedTag<float, width> d;
  hn::Vec<decltype(d)> total[n_dims][4];
  HWY_UNROLL(4)
  for (int i = 0; i < n_dims; ++i) {
    HWY_UNROLL(4)
    for (int k = 0; k < 4; ++k) total[i][k] = hn::Zero(d);
  }
  const int whole = n_values / 4 * 4;
  for (int code = whole; code < n_values; ++code) {  // two signs
    HWY_UNROLL(4)
    for (int i = 0; i < n_dims; ++i) {
      total[i][0] = hn::MulAdd(hn::Set(d, table[code * sub_dim + i]),
                               hn::Load(d, sums + code * width), total[i][0]);
    }
  }
  for (int code = 0; code < whole; code += 4, table += 4 * sub_dim) {
    HWY_UNROLL(4)
    for (int k = 0; k < 4; ++k) {
      const auto sum = hn::Load(d, sums + (code + k) * width);
      HWY_UNROLL(4)
      for (int i = 0; i < n_dims; ++i) {
        total[i][k] = hn::MulAdd(hn::Set(d, table[k * sub_dim + i]), sum, total[i][k]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int i = 0; i < n_dims; ++i) {
    const auto low = hn::Add(total[i][0], total[i][1]);
    hn::Store(hn::Add(low, hn::Add(total[i][2], total[i][3])), d, out + i * width);
  }
}

template <int width>
HWY_INLINE void finish_sums_any(const float* table, int n_values, int sub_dim, const float* sums,
                                float* out) {
  int i = 0;
  for (; i + 2 <= sub_dim; i += 2) {
    finish_dims<width, 2>(table + i, n_values, sub_dim, sums, out + i * width);
  }
  if (i < sub_dim) finish_dims<width, 1>(table + i, n_values, sub_dim, sums, out + i * width);
}

#if HWY_MAX_BYTES >= 32
// Panels of 4 rows in vectors of 8 floats, four dimensions at a time: two codes a vector. The four
// table elements that each needs are loaded beside it, and broadcast within 128 bits.
HWY_INLINE hn::Vec<hn::FixedTag<float, 8> > two_rows(const float* table, int sub_dim) {
  const hn::FixedTag<float, 8> d;
  const hn::FixedTag<float, 4> half;
  return hn::Combine(d, hn::LoadU(half, table + sub_dim), hn::LoadU(half, table));
}

HWY_INLINE void make_entries_4x4(const float* table, int n_values, int sub_dim, const float* q,
                                 bool first, float* entries) {
  const hn::FixedTag<float, 8> d;
  const auto q0 = hn::LoadDup128(d, q), q1 = hn::LoadDup128(d, q + 4);
  const auto q2 = hn::LoadDup128(d, q + 8), q3 = hn::LoadDup128(d, q + 12);
  for (int code = 0; code < n_values; code += 2, entries += 8) {
    const auto row = two_rows(table + int64_t{code} * sub_dim, sub_dim);
    const auto low = hn::MulAdd(hn::Broadcast<1>(row), q1, hn::Mul(hn::Broadcast<0>(row), q0));
    const auto high = hn::MulAdd(hn::Broadcast<3>(row), q3, hn::Mul(hn::Broadcast<2>(row), q2));
    const auto sum = hn::Add(low, high);
    hn::Store(first ? sum : hn::Add(sum, hn::Load(d, entries)), d, entries);
  }
}

HWY_INLINE void finish_sums_4x4(const float* table, int n_values, int sub_dim, const float* sums,
                                float* out) {
  const hn::FixedTag<float, 8> d;
  const hn::FixedTag<float, 4> half;
  hn::Vec<decltype(d)> total[4][2];
  HWY_UNROLL(4)
  for (int i = 0; i < 4; ++i) total[i][0] = total[i][1] = hn::Zero(d);
  for (int code = 0; code < n_values; code += 4) {
    HWY_UNROLL(2)
    for (int k = 0; k < 2; ++k) {
      const auto row = two_rows(table + int64_t{code + 2 * k} * sub_dim, sub_dim);
      const auto sum = hn::Load(d, sums + 4 * (code + 2 * k));
      total[0][k] = hn::MulAdd(hn::Broadcast<0>(row), sum, total[0][k]);
      total[1][k] = hn::MulAdd(hn::Broadcast<1>(row), sum, total[1][k]);
      total[2][k] = hn::MulAdd(hn::Broadcast<2>(row), sum, total[2][k]);
      total[3][k] = hn::MulAdd(hn::Broadcast<3>(row), sum, total[3][k]);
    }
  }
  HWY_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    const auto both = hn::Add(total[i][0], total[i][1]);
    hn::Store(hn::Add(hn::LowerHalf(half, both), hn::UpperHalf(half, both)), half, out + 4 * i);
  }
}

// d = 2: four codes a load, the first and third beside each other, then the second and fourth.
HWY_INLINE void make_entries_4x2(const float* table, int n_values, const float* q, float* entries) {
  const hn::FixedTag<float, 8> d;
  const auto q0 = hn::LoadDup128(d, q), q1 = hn::LoadDup128(d, q + 4);
  for (int code = 0; code < n_values; code += 4) {
    const auto row = hn::LoadU(d, table + 2 * code);
    const auto even = hn::MulAdd(hn::Broadcast<1>(row), q1, hn::Mul(hn::Broadcast<0>(row), q0));
    const auto odd = hn::MulAdd(hn::Broadcast<3>(row), q1, hn::Mul(hn::Broadcast<2>(row), q0));
    hn::Store(hn::ConcatLowerLower(d, odd, even), d, entries + 4 * code);
    hn::Store(hn::ConcatUpperUpper(d, odd, even), d, entries + 4 * code + 8);
  }
}

HWY_INLINE void finish_sums_4x2(const float* table, int n_values, const float* sums, float* out) {
  const hn::FixedTag<float, 8> d;
  const hn::FixedTag<float, 4> half;
  auto even0 = hn::Zero(d), even1 = hn::Zero(d), odd0 = hn::Zero(d), odd1 = hn::Zero(d);
  for (int code = 0; code < n_values; code += 4) {
    const auto row = hn::LoadU(d, table + 2 * code);
    const auto low = hn::Load(d, sums + 4 * code), high = hn::Load(d, sums + 4 * code + 8);
    const auto even = hn::ConcatLowerLower(d, high, low);
    const auto odd = hn::ConcatUpperUpper(d, high, low);
    even0 = hn::MulAdd(hn::Broadcast<0>(row), even, even0);
    even1 = hn::MulAdd(hn::Broadcast<1>(row), even, even1);
    odd0 = hn::MulAdd(hn::Broadcast<2>(row), odd, odd0);
    odd1 = hn::MulAdd(hn::Broadcast<3>(row), odd, odd1);
  }
  const auto both0 = hn::Add(even0, odd0), both1 = hn::Add(even1, odd1);
  hn::Store(hn::Add(hn::LowerHalf(half, both0), hn::UpperHalf(half, both0)), half, out);
  hn::Store(hn::Add(hn::LowerHalf(half, both1), hn::UpperHalf(half, both1)), half, out + 4);
}
#endif

void MakeEntries(const float* table, int n_values, int sub_dim, const float* q, int width,
                 float* entries) {
#if HWY_MAX_BYTES >= 32
  if (width == 8) return make_entries_any<8>(table, n_values, sub_dim, q, entries);
  if (n_values % 4 == 0 && sub_dim % 4 == 0) {
    for (int i = 0; i < sub_dim; i += 4) {
      make_entries_4x4(table + i, n_values, sub_dim, q + 4 * i, i == 0, entries);
    }
    return;
  }
  if (n_values % 4 == 0 && sub_dim == 2) return make_entries_4x2(table, n_values, q, entries);
#endif
  (void)width;
  make_entries_any<4>(table, n_values, sub_dim, q, entries);
}

void FinishSums(const float* table, int n_values, int sub_dim, float* sums, int width, float* out) {
#if HWY_MAX_BYTES >= 32
  if (width == 8) {
    finish_sums_any<8>(table, n_values, sub_dim, sums, out);
  } else if (n_values % 4 == 0 && sub_dim % 4 == 0) {
    for (int i = 0; i < sub_dim; i += 4) {
      finish_sums_4x4(table + i, n_values, sub_dim, sums, out + 4 * i);
    }
  } else if (n_values % 4 == 0 && sub_dim == 2) {
    finish_sums_4x2(table, n_values, sums, out);
  } else
#endif
  {
    finish_sums_any<4>(table, n_values, sub_dim, sums, out);
  }
}

// Panels of 8 rows are two of 4 here: few vectors, and one loop.
void AddDigit(float* entries, int n_low, const float* digit, int n_digit, int width) {
  const hn::FixedTag<float, 4> d;
  for (int c = n_digit - 1; c >= 0; --c) {
    for (int part = 0; part < width; part += 4) {
      const auto add = hn::Load(d, digit + c * width + part);
      float* to = entries + int64_t{c} * n_low * width + part;
      for (int v = 0; v < n_low; ++v) {
        hn::Store(hn::Add(hn::Load(d, entries + v * width + part), add), d, to + v * width);
      }
    }
  }
}

void SplitDigit(float* sums, int n_low, float* digit, int n_digit, int width) {
  const hn::FixedTag<float, 4> d;
  for (int c = 0; c < n_digit; ++c) {
    for (int part = 0; part < width; part += 4) {
      float* from = sums + int64_t{c} * n_low * width + part;
      auto even = hn::Zero(d), odd = hn::Zero(d);
      for (int v = 0; v < n_low; ++v) {
        const auto sum = hn::Load(d, from + v * width);
        (v % 2 == 0 ? even : odd) = hn::Add(v % 2 == 0 ? even : odd, sum);
        if (c == 0) continue;
        float* low = sums + v * width + part;
        hn::Store(hn::Add(hn::Load(d, low), sum), d, low);
      }
      hn::Store(hn::Add(even, odd), d, digit + c * width + part);
    }
  }
}

// Each plane's bits are spread to a byte a token, its own bit there, and joined.
void SpreadPlanes(const uint8_t* planes, int n_rows, int n_planes, uint8_t* rows) {
  const hn::CappedTag<uint8_t, 32> d;
  const hn::Repartition<uint64_t, decltype(d)> words;
  const int lanes = static_cast<int>(hn::Lanes(d));
  HWY_ALIGN uint8_t byte_of[kTokens];
  for (int t = 0; t < kTokens; ++t) byte_of[t] = static_cast<uint8_t>(t / 8);
  const auto own_bit = hn::BitCast(d, hn::Set(words, 0x8040201008040201ull));
  for (int row = 0; row < n_rows; ++row, planes += 8 * n_planes, rows += kTokens) {
    for (int t = 0; t < kTokens; t += lanes) {
      const auto index = hn::Load(d, byte_of + t);
      auto joined = hn::Zero(d);
      for (int p = 0; p < n_planes; ++p) {
        uint64_t plane;
        std::memcpy(&plane, planes + 8 * p, 8);
        const auto bytes = hn::TableLookupBytes(hn::BitCast(d, hn::Set(words, plane)), index);
        const auto bit = hn::Set(d, static_cast<uint8_t>(1u << p));
        joined = hn::Or(joined, hn::IfThenElseZero(hn::TestBit(bytes, own_bit), bit));
      }
      hn::StoreU(joined, d, rows + t);
    }
  }
}

using Four = hn::FixedTag<float, 4>;

// 4 x 4 in registers: two rounds of interleaving.
HWY_INLINE void transpose(hn::Vec<Four>& a, hn::Vec<Four>& b, hn::Vec<Four>& c, hn::Vec<Four>& e) {
  const Four d;
  const hn::FixedTag<double, 2> pairs;
  const auto ab_low = hn::BitCast(pairs, hn::InterleaveLower(d, a, b));
  const auto ab_high = hn::BitCast(pairs, hn::InterleaveUpper(d, a, b));
  const auto ce_low = hn::BitCast(pairs, hn::InterleaveLower(d, c, e));
  const auto ce_high = hn::BitCast(pairs, hn::InterleaveUpper(d, c, e));
  a = hn::BitCast(d, hn::InterleaveLower(pairs, ab_low, ce_low));
  b = hn::BitCast(d, hn::InterleaveUpper(pairs, ab_low, ce_low));
  c = hn::BitCast(d, hn::InterleaveLower(pairs, ab_high, ce_high));
  e = hn::BitCast(d, hn::InterleaveUpper(pairs, ab_high, ce_high));
}

void TokensToRows(const float* tokens, int width, int n, const float* factors, int n_rows,
                  float* rows, int64_t stride) {
  const Four d;
  for (int part = 0; part < n_rows; part += 4) {
    const int left = n_rows - part;
    float* to = rows + part * stride;
    for (int t = 0; t < n; t += 4) {
      const float* from = tokens + t * width + part;
      auto a = hn::LoadU(d, from), b = hn::LoadU(d, from + width);
      auto c = hn::LoadU(d, from + 2 * width), e = hn::LoadU(d, from + 3 * width);
      transpose(a, b, c, e);
      const auto factor = factors == nullptr ? hn::Set(d, 1.0f) : hn::LoadU(d, factors + t);
      hn::StoreU(hn::Mul(a, factor), d, to + t);
      if (left > 1) hn::StoreU(hn::Mul(b, factor), d, to + stride + t);
      if (left > 2) hn::StoreU(hn::Mul(c, factor), d, to + 2 * stride + t);
      if (left > 3) hn::StoreU(hn::Mul(e, factor), d, to + 3 * stride + t);
    }
  }
}

void RowsToTokens(const float* rows, int64_t stride, int n_rows, int n, const float* factors,
                  int width, float* tokens) {
  const Four d;
  for (int part = 0; part < width; part += 4) {
    const int left = n_rows - part;
    const float* from = rows + part * stride;
    for (int t = 0; t < n; t += 4) {
      const auto factor = factors == nullptr ? hn::Set(d, 1.0f) : hn::LoadU(d, factors + t);
      auto a = left > 0 ? hn::Mul(hn::LoadU(d, from + t), factor) : hn::Zero(d);
      auto b = left > 1 ? hn::Mul(hn::LoadU(d, from + stride + t), factor) : hn::Zero(d);
      auto c = left > 2 ? hn::Mul(hn::LoadU(d, from + 2 * stride + t), factor) : hn::Zero(d);
      auto e = left > 3 ? hn::Mul(hn::LoadU(d, from + 3 * stride + t), factor) : hn::Zero(d);
      transpose(a, b, c, e);
      float* to = tokens + t * width + part;
      hn::StoreU(a, d, to);
      hn::StoreU(b, d, to + width);
      hn::StoreU(c, d, to + 2 * width);
      hn::StoreU(e, d, to + 3 * width);
    }
  }
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(WidestPanel);
HWY_EXPORT(MakeEntries);
HWY_EXPORT(LookUp);
HWY_EXPORT(AddUp);
HWY_EXPORT(FinishSums);
HWY_EXPORT(AddDigit);
HWY_EXPORT(SplitDigit);
HWY_EXPORT(SpreadPlanes);
HWY_EXPORT(TokensToRows);
HWY_EXPORT(RowsToTokens);

int widest_panel() { return HWY_DYNAMIC_DISPATCH(WidestPanel)(); }

void make_entries(const float* table, int n_values, int sub_dim, const float* q, int width,
                  float* entries) {
  HWY_DYNAMIC_DISPATCH(MakeEntries)(table, n_values, sub_dim, q, width, entries);
}

void look_up(const Blocks& blocks, const float* entries, int width, float* tokens) {
  HWY_DYNAMIC_DISPATCH(LookUp)(blocks, entries, width, tokens);
}

void add_up(const Blocks& blocks, const float* tokens, int width, float* sums) {
  HWY_DYNAMIC_DISPATCH(AddUp)(blocks, tokens, width, sums);
}

void finish_sums(const float* table, int n_values, int sub_dim, float* sums, int width,
                 float* out) {
  HWY_DYNAMIC_DISPATCH(FinishSums)(table, n_values, sub_dim, sums, width, out);
}

void add_digit(float* entries, int n_low, const float* digit, int n_digit, int width) {
  HWY_DYNAMIC_DISPATCH(AddDigit)(entries, n_low, digit, n_digit, width);
}

void split_digit(float* sums, int n_low, float* digit, int n_digit, int width) {
  HWY_DYNAMIC_DISPATCH(SplitDigit)(sums, n_low, digit, n_digit, width);
}

void spread_planes(const uint8_t* planes, int n_rows, int n_planes, uint8_t* rows) {
  HWY_DYNAMIC_DISPATCH(SpreadPlanes)(planes, n_rows, n_planes, rows);
}

void tokens_to_rows(const float* tokens, int width, int n, const float* factors, int n_rows,
                    float* rows, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(TokensToRows)(tokens, width, n, factors, n_rows, rows, stride);
}

void rows_to_tokens(const float* rows, int64_t stride, int n_rows, int n, const float* factors,
                    int width, float* tokens) {
  HWY_DYNAMIC_DISPATCH(RowsToTokens)(rows, stride, n_rows, n, factors, width, tokens);
}

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
