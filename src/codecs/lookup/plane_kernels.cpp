#include "src/codecs/lookup/plane_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/plane_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "src/backends/cpu/unroll.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers
int PlaneLanes() { return 0; }
int PlaneGroup() { return 1; }
bool HasWideTables() { return false; }
void SplitPlanes(const float*, int, float, int, int, uint8_t*, uint8_t*) {}
float LargestMagnitude(const float*, int) { return 0; }
void FoldPlaneSums(const float*, int, float*) {}
void LookUpPlanes(const Blocks&, const PlaneDigits&, const uint8_t*, int, uint8_t*) {}
void FinishPlanes(const uint8_t*, int, int, float, const float*, float*) {}
void WeightsToPlanes(const float*, int64_t, int, int, const float*, int16_t*, float*) {}
void AddPlanes(const Blocks&, int, int, const PlaneDigits&, const uint8_t*, const int16_t*,
               const float*, int, float*) {}
#else

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
#define VELOXQUANT_VBMI 1
#else
#define VELOXQUANT_VBMI 0
#endif

using Bytes = hn::CappedTag<uint8_t, kTokens>;
using Words = hn::Repartition<uint16_t, Bytes>;
using Shorts = hn::Repartition<int16_t, Bytes>;
using Ints = hn::Repartition<int32_t, Bytes>;
using Floats = hn::Repartition<float, Bytes>;
using ByteVector = hn::Vec<Bytes>;
constexpr int kLanes = HWY_MIN(kTokens, HWY_MAX_BYTES);
constexpr int kVectors = kTokens / kLanes;          // of the tokens of a block
constexpr int kGroupBlocks = kLanes == 64 ? 2 : 1;  // that share the scale of their weights

int PlaneLanes() { return kLanes; }
int PlaneGroup() { return kGroupBlocks; }
bool HasWideTables() { return VELOXQUANT_VBMI; }

// ---- tables ------------------------------------------------------------------------------------

// 16 entries in each 128-bit block of a register.
struct Table16 {
  static constexpr int kBytes = 32;
  ByteVector low, high;

  HWY_INLINE explicit Table16(const uint8_t* table)
      : low(hn::LoadDup128(Bytes(), table)), high(hn::LoadDup128(Bytes(), table + 16)) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    l = hn::TableLookupBytes(low, code);
    h = hn::TableLookupBytes(high, code);
  }
};

#if VELOXQUANT_VBMI
// 256 entries in four registers: a permutation takes 6 bits of a code, and the upper two choose
// where it is written. Permutations of two registers take 7 bits, but are three micro-operations
// each on Intel, where these are one.
struct Quarters {
  __m512i a, b, c, d;

  HWY_INLINE explicit Quarters(const uint8_t* table)
      : a(hn::Load(Bytes(), table).raw),
        b(hn::Load(Bytes(), table + 64).raw),
        c(hn::Load(Bytes(), table + 128).raw),
        d(hn::Load(Bytes(), table + 192).raw) {}
  HWY_INLINE ByteVector at(__m512i code, __mmask64 odd, __mmask64 upper, __mmask64 last) const {
    __m512i x = _mm512_permutexvar_epi8(code, a);
    x = _mm512_mask_permutexvar_epi8(x, odd, code, b);
    x = _mm512_mask_permutexvar_epi8(x, upper, code, c);
    return ByteVector{_mm512_mask_permutexvar_epi8(x, last, code, d)};
  }
};
struct Table256 {
  static constexpr int kBytes = 512;
  Quarters low, high;

  HWY_INLINE explicit Table256(const uint8_t* table) : low(table), high(table + 256) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    const __mmask64 upper = _mm512_movepi8_mask(code.raw);
    const __mmask64 odd = _mm512_movepi8_mask(_mm512_add_epi8(code.raw, code.raw));
    const __mmask64 last = _kand_mask64(upper, odd);
    l = low.at(code.raw, odd, upper, last);
    h = high.at(code.raw, odd, upper, last);
  }
};
#else
// Sixteen tables of 16: slower than other look-ups, so that only tests come here.
struct Table256 {
  static constexpr int kBytes = 512;
  const uint8_t* table;

  HWY_INLINE explicit Table256(const uint8_t* from) : table(from) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    const Bytes d;
    const auto low_half = hn::And(code, hn::Set(d, uint8_t{15}));
    const auto high_half = hn::AndNot(hn::Set(d, uint8_t{15}), code);
    l = h = hn::Zero(d);
    for (int k = 0; k < 16; ++k) {
      const auto here = hn::Eq(high_half, hn::Set(d, static_cast<uint8_t>(16 * k)));
      const auto low = hn::LoadDup128(d, table + 16 * k);
      const auto high = hn::LoadDup128(d, table + 256 + 16 * k);
      l = hn::IfThenElse(here, hn::TableLookupBytes(low, low_half), l);
      h = hn::IfThenElse(here, hn::TableLookupBytes(high, low_half), h);
    }
  }
};
#endif

// The digit of each byte: wide tables take whole bytes.
template <class Table>
HWY_INLINE ByteVector digit_of(ByteVector code, int shift, ByteVector mask) {
  if constexpr (Table::kBytes > 32) {
    return code;
  } else {
    const auto moved = hn::ShiftRightSame(hn::BitCast(Words(), code), shift);
    return hn::And(hn::BitCast(Bytes(), moved), mask);
  }
}

template <class D>
HWY_INLINE void split_planes_by(D d, const float* x, int n, float factor, int bias, int low_bits,
                                uint8_t* low, uint8_t* high) {
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> bytes;
  const auto scale = hn::Set(d, factor);
  const auto zero = hn::Set(di, bias);
  const auto low_mask = hn::Set(di, (1 << low_bits) - 1), byte = hn::Set(di, 255);
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    const auto v = hn::Add(hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), scale)), zero);
    const auto rest = hn::And(hn::ShiftRightSame(v, low_bits), byte);
    hn::StoreU(hn::DemoteTo(bytes, hn::And(v, low_mask)), bytes, low + i);
    hn::StoreU(hn::DemoteTo(bytes, rest), bytes, high + i);
  }
}

void SplitPlanes(const float* x, int n, float factor, int bias, int low_bits, uint8_t* low,
                 uint8_t* high) {
  const hn::CappedTag<float, 16> wide;
  if (n % static_cast<int>(hn::Lanes(wide)) == 0) {
    split_planes_by(wide, x, n, factor, bias, low_bits, low, high);
  } else {
    split_planes_by(hn::FixedTag<float, 4>(), x, n, factor, bias, low_bits, low, high);
  }
}

float LargestMagnitude(const float* x, int n) {
  const hn::CappedTag<float, 16> wide;
  const hn::FixedTag<float, 4> few;
  const int lanes = static_cast<int>(hn::Lanes(wide));
  auto most = hn::Zero(wide);
  auto rest = hn::Zero(few);
  int i = 0;
  for (; i + lanes <= n; i += lanes) most = hn::Max(most, hn::Abs(hn::LoadU(wide, x + i)));
  for (; i < n; i += 4) rest = hn::Max(rest, hn::Abs(hn::LoadU(few, x + i)));
  return std::max(hn::GetLane(hn::MaxOfLanes(wide, most)), hn::GetLane(hn::MaxOfLanes(few, rest)));
}

void FoldPlaneSums(const float* sums, int n, float* out) {
  const Floats d;
  for (int i = 0; i < n; ++i, sums += kPlaneFloats) {
    out[i] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, sums)));  // lanes beyond the widest are 0
  }
}

// ---- keys --------------------------------------------------------------------------------------

// Two digits at a time: sums of two planes of 7 bits fit a byte, so that they widen once.
template <class Table, int n_digits>
HWY_INLINE void look_up_few(const Blocks& blocks, const PlaneDigits& digits, int first,
                            const uint8_t* tables, int n_rows, uint8_t* totals) {
  const Bytes d;
  const Words words;
  const auto mask = hn::Set(d, static_cast<uint8_t>((1u << digits.bits) - 1u));
  const int64_t row_bytes = int64_t{blocks.n} * kTokens * 4;
  const uint8_t* from[n_digits];
  int shift[n_digits];
  for (int i = 0; i < n_digits; ++i) {
    from[i] = blocks.data + (first + i) / digits.a_byte * kTokens;
    shift[i] = (first + i) % digits.a_byte * digits.bits;
  }
  for (int r = 0; r < n_rows; ++r, totals += row_bytes) {
    const uint8_t* table = tables + r * Table::kBytes;
    const Table one(table), two(table + (n_digits - 1) * n_rows * Table::kBytes);
    uint8_t* to = totals;
    for (int block = 0; block < blocks.n; ++block) {
      const int64_t at = block * blocks.stride;
      for (int v = 0; v < kVectors; ++v, to += 4 * kLanes) {
        ByteVector low, high;
        one.look_up(digit_of<Table>(hn::LoadU(d, from[0] + at + v * kLanes), shift[0], mask), low,
                    high);
        if constexpr (n_digits == 2) {
          ByteVector more_low, more_high;
          two.look_up(digit_of<Table>(hn::LoadU(d, from[1] + at + v * kLanes), shift[1], mask),
                      more_low, more_high);
          low = hn::Add(low, more_low);
          high = hn::Add(high, more_high);
        }
        const auto add = [&](int k, hn::Vec<Words> sum) HWY_ATTR {
          uint16_t* total = reinterpret_cast<uint16_t*>(to + k * kLanes);
          hn::Store(hn::Add(hn::Load(words, total), sum), words, total);
        };
        const auto low16 = hn::BitCast(words, low), high16 = hn::BitCast(words, high);
        add(0, low16);
        add(1, hn::ShiftRight<8>(low16));
        add(2, high16);
        add(3, hn::ShiftRight<8>(high16));
      }
    }
  }
}

template <class Table>
void look_up_all(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables, int n_rows,
                 uint8_t* totals) {
  const int n = blocks.n_codes * digits.a_byte;
  const int64_t step = int64_t{n_rows} * Table::kBytes;
  int k = 0;
  for (; k + 2 <= n; k += 2) {
    look_up_few<Table, 2>(blocks, digits, k, tables + k * step, n_rows, totals);
  }
  if (k < n) look_up_few<Table, 1>(blocks, digits, k, tables + k * step, n_rows, totals);
}

void LookUpPlanes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables,
                  int n_rows, uint8_t* totals) {
  digits.bits <= 4 ? look_up_all<Table16>(blocks, digits, tables, n_rows, totals)
                   : look_up_all<Table256>(blocks, digits, tables, n_rows, totals);
}

// Sums of even and odd tokens -> of tokens in the order of interleaving within 128 bits: tokens
// 16 b + 0..7 first, then 16 b + 8..15.
HWY_INLINE void in_order(const uint8_t* sums, uint16_t* first, uint16_t* second) {
  const Words d;
  const uint16_t* words = reinterpret_cast<const uint16_t*>(sums);
  const auto all = hn::Load(d, words), odd = hn::Load(d, words + kLanes / 2);
  const auto even = hn::Sub(all, hn::ShiftLeft<8>(odd));
  hn::Store(hn::InterleaveLower(d, even, odd), d, first);
  hn::Store(hn::InterleaveUpper(d, even, odd), d, second);
}

void FinishPlanes(const uint8_t* totals, int n_blocks, int zero, float step, const float* factors,
                  float* scores) {
  const hn::CappedTag<float, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<uint16_t, decltype(d)> half;
  const int lanes = static_cast<int>(hn::Lanes(d));
  HWY_ALIGN uint16_t low[2][kLanes / 2], high[2][kLanes / 2];
  for (int v = 0; v < n_blocks * kVectors; ++v, totals += 4 * kLanes) {
    in_order(totals, low[0], low[1]);
    in_order(totals + 2 * kLanes, high[0], high[1]);
    for (int eight = 0; eight < kLanes / 8; ++eight) {
      for (int i = 0; i < 8; i += lanes) {
        const int at = eight / 2 * 8 + i, t = v * kLanes + 8 * eight + i;
        const auto l = hn::PromoteTo(di, hn::Load(half, low[eight % 2] + at));
        const auto h = hn::PromoteTo(di, hn::Load(half, high[eight % 2] + at));
        const auto sum = hn::Sub(hn::Add(hn::ShiftLeft<7>(h), l), hn::Set(di, zero));
        auto score = hn::Mul(hn::ConvertTo(d, sum), hn::Set(d, step));
        if (factors != nullptr) score = hn::Mul(score, hn::LoadU(d, factors + t));
        hn::StoreU(score, d, scores + t);
      }
    }
  }
}

// ---- values ------------------------------------------------------------------------------------

// Place of a token among the integers of its vector: interleaved bytes come as tokens 16 b + 0..7
// of all 128-bit blocks b, then 16 b + 8..15.
HWY_INLINE int place_of(int token) {
  return token % 16 / 8 * (kLanes / 2) + token / 16 * 8 + token % 8;
}

void WeightsToPlanes(const float* weights, int64_t stride, int n_rows, int n_blocks,
                     const float* factors, int16_t* integers, float* scales) {
  constexpr float kMost = 8191.0f;
  // Moves the border of rounding through a whole step every 16 tokens: weights far below the
  // largest, all alike, are then right in their sum.
  HWY_ALIGN static constexpr float kDither[16] = {
      -15 / 32.f, 1 / 32.f, -7 / 32.f, 9 / 32.f,  -11 / 32.f, 5 / 32.f, -3 / 32.f, 13 / 32.f,
      -13 / 32.f, 3 / 32.f, -5 / 32.f, 11 / 32.f, -9 / 32.f,  7 / 32.f, -1 / 32.f, 15 / 32.f};
  const hn::CappedTag<float, 8> d;  // a run of neighbours, see place_of
  const hn::Rebind<int16_t, decltype(d)> shorts;
  const int lanes = static_cast<int>(hn::Lanes(d));
  auto weight = [&](const float* row, int t) HWY_ATTR {
    const auto w = hn::LoadU(d, row + t);
    return factors == nullptr ? w : hn::Mul(w, hn::LoadU(d, factors + t));
  };
  for (int first = 0; first < n_blocks; first += kGroupBlocks, scales += n_rows) {
    const int begin = first * kTokens;
    const int end = std::min(n_blocks, first + kGroupBlocks) * kTokens;
    for (int r = 0; r < n_rows; ++r) {
      const float* row = weights + r * stride;
      auto most = hn::Zero(d);
      for (int t = begin; t < end; t += lanes) most = hn::Max(most, hn::Abs(weight(row, t)));
      const float largest = hn::GetLane(hn::MaxOfLanes(d, most));
      // Weights that are nothing beside those of other blocks: no reciprocal overflows.
      const bool counts = largest > 1e-30f;
      scales[r] = counts ? largest / kMost : 0.0f;
      const auto inverse = hn::Set(d, counts ? kMost / largest : 0.0f);
      for (int t = begin; t < end; t += lanes) {
        const auto border = hn::LoadU(d, kDither + t % 16);
        const auto integer = hn::NearestInt(hn::MulAdd(weight(row, t), inverse, border));
        int16_t* to = integers + (int64_t{t / kLanes} * n_rows + r) * kLanes;
        hn::StoreU(hn::DemoteTo(shorts, integer), shorts, to + place_of(t % kLanes));
      }
    }
  }
}

// sum + products of 16-bit integers, two neighbours each; Arm spreads them over two sums.
HWY_INLINE hn::Vec<Ints> add_products(hn::Vec<Shorts> a, hn::Vec<Shorts> b, hn::Vec<Ints> sum,
                                      hn::Vec<Ints>& more) {
#if VELOXQUANT_VBMI
  // Highway takes this level only with VNNI, but does not tell the compiler, hence no intrinsic.
  (void)more;
  __m512i raw = sum.raw;
  asm("vpdpwssd %2, %1, %0" : "+v"(raw) : "v"(a.raw), "v"(b.raw));
  return hn::Vec<Ints>{raw};
#else
  return hn::ReorderWidenMulAccumulate(Ints(), a, b, sum, more);
#endif
}

// Values have 15 bits and weights 13, without sign: eight products, of two vectors of tokens, fit
// 32 bits. codes: of each of the vectors.
template <class Table, int n_rows, int n_vectors>
HWY_INLINE void add_vectors(const Table& planes, const uint8_t* const (&codes)[2], int shift,
                            ByteVector mask, const int16_t* integers, const float* scales,
                            hn::Vec<Floats> (&total)[n_rows]) {
  const Bytes d;
  const Shorts shorts;
  const Floats floats;
  hn::Vec<Ints> sum[n_rows], more[n_rows];
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) sum[r] = more[r] = hn::Zero(Ints());
  VELOXQUANT_UNROLL
  for (int i = 0; i < n_vectors; ++i) {
    ByteVector low, high;
    planes.look_up(digit_of<Table>(hn::LoadU(d, codes[i]), shift, mask), low, high);
    const auto a = hn::BitCast(shorts, hn::InterleaveLower(d, low, high));
    const auto b = hn::BitCast(shorts, hn::InterleaveUpper(d, low, high));
    VELOXQUANT_UNROLL
    for (int r = 0; r < n_rows; ++r) {
      const int16_t* weights = integers + (i * n_rows + r) * kLanes;
      sum[r] = add_products(a, hn::Load(shorts, weights), sum[r], more[r]);
      sum[r] = add_products(b, hn::Load(shorts, weights + kLanes / 2), sum[r], more[r]);
    }
  }
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) {
#if !HWY_ARCH_X86
    sum[r] = hn::Add(sum[r], more[r]);
#endif
    total[r] = hn::MulAdd(hn::ConvertTo(floats, sum[r]), hn::Set(floats, scales[r]), total[r]);
  }
}

template <class Table, int n_rows>
HWY_INLINE void add_digit_planes(const Blocks& blocks, int m, int shift, const PlaneDigits& digits,
                                 const uint8_t* table, const int16_t* integers, const float* scales,
                                 float* sums) {
  const Floats floats;
  const Table planes(table);
  const auto mask = hn::Set(Bytes(), static_cast<uint8_t>((1u << digits.bits) - 1u));
  hn::Vec<Floats> total[n_rows];
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) total[r] = hn::Load(floats, sums + r * kPlaneFloats);
  const int64_t stride = blocks.stride;
  const uint8_t* codes = blocks.data + m * kTokens;
  int block = 0;
  for (; block + kGroupBlocks <= blocks.n; block += kGroupBlocks, scales += n_rows) {
    VELOXQUANT_UNROLL
    for (int v = 0; v < kGroupBlocks * kVectors; v += 2, integers += 2 * n_rows * kLanes) {
      const uint8_t* const two[2] = {codes + v * kLanes,
                                     codes + (kVectors == 1 ? stride : (v + 1) * kLanes)};
      add_vectors<Table, n_rows, 2>(planes, two, shift, mask, integers, scales, total);
    }
    codes += kGroupBlocks * stride;
  }
  if (block < blocks.n) {  // half a group
    const uint8_t* const one[2] = {codes, nullptr};
    add_vectors<Table, n_rows, 1>(planes, one, shift, mask, integers, scales, total);
  }
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) hn::Store(total[r], floats, sums + r * kPlaneFloats);
}

template <class Table>
void add_rows(const Blocks& blocks, int m, int shift, const PlaneDigits& digits,
              const uint8_t* table, const int16_t* integers, const float* scales, int n_rows,
              float* sums) {
  switch (n_rows) {
    case 1:
      return add_digit_planes<Table, 1>(blocks, m, shift, digits, table, integers, scales, sums);
    case 2:
      return add_digit_planes<Table, 2>(blocks, m, shift, digits, table, integers, scales, sums);
    case 3:
      return add_digit_planes<Table, 3>(blocks, m, shift, digits, table, integers, scales, sums);
    default:
      return add_digit_planes<Table, 4>(blocks, m, shift, digits, table, integers, scales, sums);
  }
}

void AddPlanes(const Blocks& blocks, int m, int shift, const PlaneDigits& digits,
               const uint8_t* table, const int16_t* integers, const float* scales, int n_rows,
               float* sums) {
  const auto add = digits.bits <= 4 ? add_rows<Table16> : add_rows<Table256>;
  add(blocks, m, shift, digits, table, integers, scales, n_rows, sums);
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(PlaneLanes);
HWY_EXPORT(PlaneGroup);
HWY_EXPORT(HasWideTables);
HWY_EXPORT(SplitPlanes);
HWY_EXPORT(LargestMagnitude);
HWY_EXPORT(FoldPlaneSums);
HWY_EXPORT(LookUpPlanes);
HWY_EXPORT(FinishPlanes);
HWY_EXPORT(WeightsToPlanes);
HWY_EXPORT(AddPlanes);

int plane_lanes() { return HWY_DYNAMIC_DISPATCH(PlaneLanes)(); }
int plane_group() { return HWY_DYNAMIC_DISPATCH(PlaneGroup)(); }
bool has_wide_tables() { return HWY_DYNAMIC_DISPATCH(HasWideTables)(); }

void split_planes(const float* x, int n, float factor, int bias, int low_bits, uint8_t* low,
                  uint8_t* high) {
  HWY_DYNAMIC_DISPATCH(SplitPlanes)(x, n, factor, bias, low_bits, low, high);
}

float largest_magnitude(const float* x, int n) {
  return HWY_DYNAMIC_DISPATCH(LargestMagnitude)(x, n);
}

void fold_plane_sums(const float* sums, int n, float* out) {
  HWY_DYNAMIC_DISPATCH(FoldPlaneSums)(sums, n, out);
}

void look_up_planes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables,
                    int n_rows, uint8_t* totals) {
  HWY_DYNAMIC_DISPATCH(LookUpPlanes)(blocks, digits, tables, n_rows, totals);
}

void finish_planes(const uint8_t* totals, int n_blocks, int zero, float step, const float* factors,
                   float* scores) {
  HWY_DYNAMIC_DISPATCH(FinishPlanes)(totals, n_blocks, zero, step, factors, scores);
}

void weights_to_planes(const float* weights, int64_t stride, int n_rows, int n_blocks,
                       const float* factors, int16_t* integers, float* scales) {
  HWY_DYNAMIC_DISPATCH(WeightsToPlanes)
  (weights, stride, n_rows, n_blocks, factors, integers, scales);
}

void add_planes(const Blocks& blocks, int m, int shift, const PlaneDigits& digits,
                const uint8_t* table, const int16_t* integers, const float* scales, int n_rows,
                float* sums) {
  HWY_DYNAMIC_DISPATCH(AddPlanes)
  (blocks, m, shift, digits, table, integers, scales, n_rows, sums);
}

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
