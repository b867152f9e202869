#include "src/codecs/lookup/plane_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/plane_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "src/backends/cpu/unroll.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTokens = 64;

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers
int PlaneLanes() { return 0; }
bool HasWideTables() { return false; }
void SplitPlanes(const float*, int, int, float, int, int, uint8_t*) {}
float LargestMagnitude(const float*, int) { return 0; }
void MakePlaneEntries(const PlaneColumns&, const float*, int64_t, int, float*, int64_t, float*) {}
void FoldPlaneSums(const float*, int, float*) {}
void ScorePlanes(const Blocks&, const PlaneDigits&, const uint8_t*, int, float, const float*,
                 float*) {}
float WeightsToPlanes(const float*, int, const float*, int, int, int16_t*) { return 0; }
void AddPlanes(const Blocks&, int, const PlaneDigits&, int, const uint8_t*, const int16_t*,
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
constexpr int kVectors = kTokens / kLanes;  // of the tokens of a block
constexpr int kUnitBlocks = kVectorsAUnit / kVectors;

int PlaneLanes() { return kLanes; }
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
HWY_INLINE __m512i kept_in_register(const uint8_t* from) {
  __m512i x = hn::Load(Bytes(), from).raw;
  // Or else compilers load it again for every permutation, and loads are what runs out.
  asm("" : "+v"(x));
  return x;
}

// 256 entries in four registers. A permutation takes 6 bits of a code, and the upper two choose
// where it is written: one micro-operation each everywhere.
struct Quarters {
  __m512i a, b, c, d;
  struct Choice {
    __mmask64 odd, upper, last;
    HWY_INLINE explicit Choice(__m512i code)
        : odd(_mm512_movepi8_mask(_mm512_add_epi8(code, code))),
          upper(_mm512_movepi8_mask(code)),
          last(_kand_mask64(upper, odd)) {}
  };

  HWY_INLINE explicit Quarters(const uint8_t* table)
      : a(kept_in_register(table)),
        b(kept_in_register(table + 64)),
        c(kept_in_register(table + 128)),
        d(kept_in_register(table + 192)) {}
  HWY_INLINE __m512i at(__m512i code, const Choice& choice) const {
    __m512i x = _mm512_permutexvar_epi8(code, a);
    x = _mm512_mask_permutexvar_epi8(x, choice.odd, code, b);
    x = _mm512_mask_permutexvar_epi8(x, choice.upper, code, c);
    return _mm512_mask_permutexvar_epi8(x, choice.last, code, d);
  }
};
// Permutations of two registers take 7 bits: half as many, but three micro-operations each on
// Intel; one on AMD.
struct Halves {
  __m512i a, b, c, d;
  struct Choice {
    __mmask64 upper;
    HWY_INLINE explicit Choice(__m512i code) : upper(_mm512_movepi8_mask(code)) {}
  };

  HWY_INLINE explicit Halves(const uint8_t* table)
      : a(kept_in_register(table)),
        b(kept_in_register(table + 64)),
        c(kept_in_register(table + 128)),
        d(kept_in_register(table + 192)) {}
  HWY_INLINE __m512i at(__m512i code, const Choice& choice) const {
    return _mm512_mask_blend_epi8(choice.upper, _mm512_permutex2var_epi8(a, code, b),
                                  _mm512_permutex2var_epi8(c, code, d));
  }
};
template <class Plane>
struct WideTable {
  static constexpr int kBytes = 512;
  Plane low, high;

  HWY_INLINE explicit WideTable(const uint8_t* table) : low(table), high(table + 256) {}
  HWY_INLINE void look_up(ByteVector code, ByteVector& l, ByteVector& h) const {
    const typename Plane::Choice choice(code.raw);
    l = ByteVector{low.at(code.raw, choice)};
    h = ByteVector{high.at(code.raw, choice)};
  }
};
#else
// Sixteen tables of 16: slower than other look-ups, so that only tests come here.
struct WideTable {
  static constexpr int kBytes = 512;
  const uint8_t* table;

  HWY_INLINE explicit WideTable(const uint8_t* from) : table(from) {}
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

template <class Table>
struct Form {
  using Type = Table;
};
// body(Form of the table that these digits are looked up in)
template <class Body>
HWY_INLINE void with_table(const PlaneDigits& digits, const Body& body) {
  if (digits.bits <= 4) return body(Form<Table16>());
#if VELOXQUANT_VBMI
  digits.by_halves ? body(Form<WideTable<Halves> >()) : body(Form<WideTable<Quarters> >());
#else
  body(Form<WideTable>());
#endif
}

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

using Sixteen = hn::CappedTag<float, 16>;  // divides the 16 or 256 entries of a plane

void SplitPlanes(const float* x, int n, int size, float factor, int bias, int low_bits,
                 uint8_t* planes) {
  const Sixteen d;
  const hn::RebindToSigned<Sixteen> di;
  const hn::Rebind<uint8_t, Sixteen> bytes;
  const auto scale = hn::Set(d, factor);
  const auto zero = hn::Set(di, bias);
  const auto low_mask = hn::Set(di, (1 << low_bits) - 1), byte = hn::Set(di, 255);
  for (int k = 0; k < n; ++k, x += size, planes += 2 * size) {
    for (int i = 0; i < size; i += static_cast<int>(hn::Lanes(d))) {
      const auto v = hn::Add(hn::NearestInt(hn::Mul(hn::Load(d, x + i), scale)), zero);
      const auto rest = hn::And(hn::ShiftRightSame(v, low_bits), byte);
      hn::StoreU(hn::DemoteTo(bytes, hn::And(v, low_mask)), bytes, planes + i);
      hn::StoreU(hn::DemoteTo(bytes, rest), bytes, planes + size + i);
    }
  }
}

float LargestMagnitude(const float* x, int n) {
  const Sixteen d;
  auto most = hn::Zero(d);
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    most = hn::Max(most, hn::Abs(hn::Load(d, x + i)));
  }
  return hn::GetLane(hn::MaxOfLanes(d, most));
}

template <int n_rows, class Column>
HWY_INLINE void make_entries_of(const Column& column, int size, int dim, const float* q,
                                int64_t q_stride, float* entries, int64_t stride, float* most) {
  const Sixteen d;
  hn::Vec<Sixteen> largest[n_rows];
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) largest[r] = hn::Zero(d);
  for (int i = 0; i < size; i += static_cast<int>(hn::Lanes(d))) {
    hn::Vec<Sixteen> sum[n_rows];
    VELOXQUANT_UNROLL
    for (int r = 0; r < n_rows; ++r) sum[r] = hn::Zero(d);
    for (int k = 0; k < dim; ++k) {
      const auto x = column(k * size + i);
      VELOXQUANT_UNROLL
      for (int r = 0; r < n_rows; ++r) {
        sum[r] = hn::MulAdd(x, hn::Set(d, q[r * q_stride + k]), sum[r]);
      }
    }
    VELOXQUANT_UNROLL
    for (int r = 0; r < n_rows; ++r) {
      hn::Store(sum[r], d, entries + r * stride + i);
      largest[r] = hn::Max(largest[r], hn::Abs(sum[r]));
    }
  }
  VELOXQUANT_UNROLL
  for (int r = 0; r < n_rows; ++r) {
    most[r] = std::max(most[r], hn::GetLane(hn::MaxOfLanes(d, largest[r])));
  }
}

void MakePlaneEntries(const PlaneColumns& columns, const float* q, int64_t q_stride, int n_rows,
                      float* entries, int64_t stride, float* most) {
  const Sixteen d;
  const hn::Rebind<hwy::float16_t, Sixteen> halves;
  const auto make = [&](const auto& column) HWY_ATTR {
    const auto rows = [&](auto n) HWY_ATTR {
      make_entries_of<decltype(n)::value>(column, columns.size, columns.dim, q, q_stride, entries,
                                          stride, most);
    };
    switch (n_rows) {
      case 1:
        return rows(std::integral_constant<int, 1>());
      case 2:
        return rows(std::integral_constant<int, 2>());
      case 3:
        return rows(std::integral_constant<int, 3>());
      default:
        return rows(std::integral_constant<int, 4>());
    }
  };
  if (columns.in_fp16) {
    const auto* x = static_cast<const hwy::float16_t*>(columns.data);
    make([&](int i) HWY_ATTR { return hn::PromoteTo(d, hn::LoadU(halves, x + i)); });
  } else {
    const auto* x = static_cast<const float*>(columns.data);
    make([&](int i) HWY_ATTR { return hn::LoadU(d, x + i); });
  }
}

void FoldPlaneSums(const float* sums, int n, float* out) {
  const Floats d;
  for (int i = 0; i < n; ++i, sums += kPlaneFloats) {
    out[i] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, sums)));  // lanes beyond the widest are 0
  }
}

// ---- keys --------------------------------------------------------------------------------------

// Vectors of tokens whose sums a register file holds beside the tables.
constexpr int kTogether = kLanes == 64 ? 2 : 1;

// Sums of look-ups of a vector's tokens, 16 bits each: of tokens 16 b + 0..7 of its 128-bit blocks
// b, and of 16 b + 8..15, of the low planes, then of the high ones. (Not a struct: its constructor
// would not be compiled for the SIMD level.)
constexpr int kKeySums = 4;

// The vectors' tokens have these sums of 7-bit entries of one or two digits: they fit a byte, so
// that two widen at once.
template <int n_vectors>
HWY_INLINE void add_pair(const ByteVector (&low)[n_vectors], const ByteVector (&high)[n_vectors],
                         hn::Vec<Words> (&sums)[n_vectors][kKeySums]) {
  const Words d;
  const auto nothing = hn::Zero(Bytes());
  VELOXQUANT_UNROLL
  for (int v = 0; v < n_vectors; ++v) {
    const auto add = [&](int i, ByteVector x)
                         HWY_ATTR { sums[v][i] = hn::Add(sums[v][i], hn::BitCast(d, x)); };
    add(0, hn::InterleaveLower(Bytes(), low[v], nothing));
    add(1, hn::InterleaveUpper(Bytes(), low[v], nothing));
    add(2, hn::InterleaveLower(Bytes(), high[v], nothing));
    add(3, hn::InterleaveUpper(Bytes(), high[v], nothing));
  }
}

// Look-ups of a digit, in place of what was there or added to it.
template <class Table, bool is_first, int n_vectors>
HWY_INLINE void look_up_digit(const uint8_t* table, const ByteVector (&codes)[n_vectors], int shift,
                              ByteVector mask, ByteVector (&low)[n_vectors],
                              ByteVector (&high)[n_vectors]) {
  const Table planes(table);
  VELOXQUANT_UNROLL
  for (int v = 0; v < n_vectors; ++v) {
    ByteVector l, h;
    planes.look_up(digit_of<Table>(codes[v], shift, mask), l, h);
    low[v] = is_first ? l : hn::Add(low[v], l);
    high[v] = is_first ? h : hn::Add(high[v], h);
  }
}

template <int n_vectors>
HWY_INLINE void load_codes(const uint8_t* const (&from)[n_vectors], int64_t at,
                           ByteVector (&codes)[n_vectors]) {
  VELOXQUANT_UNROLL
  for (int v = 0; v < n_vectors; ++v) codes[v] = hn::LoadU(Bytes(), from[v] + at);
}

// (high * 128 + low - zero) * step * factors of a vector's tokens.
HWY_INLINE void finish_scores(const hn::Vec<Words> (&sums)[kKeySums], int zero, float step,
                              const float* factors, float* scores) {
  const hn::CappedTag<float, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<uint16_t, decltype(d)> half;
  const int lanes = static_cast<int>(hn::Lanes(d));
  HWY_ALIGN uint16_t low[2][kLanes / 2], high[2][kLanes / 2];
  for (int i = 0; i < 2; ++i) {
    hn::Store(sums[i], Words(), low[i]);
    hn::Store(sums[2 + i], Words(), high[i]);
  }
  for (int eight = 0; eight < kLanes / 8; ++eight) {
    for (int i = 0; i < 8; i += lanes) {
      const int at = eight / 2 * 8 + i, t = 8 * eight + i;
      const auto l = hn::PromoteTo(di, hn::Load(half, low[eight % 2] + at));
      const auto h = hn::PromoteTo(di, hn::Load(half, high[eight % 2] + at));
      const auto sum = hn::Sub(hn::Add(hn::ShiftLeft<7>(h), l), hn::Set(di, zero));
      auto score = hn::Mul(hn::ConvertTo(d, sum), hn::Set(d, step));
      if (factors != nullptr) score = hn::Mul(score, hn::LoadU(d, factors + t));
      hn::StoreU(score, d, scores + t);
    }
  }
}

// One row's scores of n_vectors vectors of tokens, a_byte (1, 2 or 4) digits in a byte.
template <class Table, int a_byte, int n_vectors>
HWY_INLINE void score_vectors(const uint8_t* const (&from)[n_vectors], int n_bytes, int bits,
                              const uint8_t* tables, hn::Vec<Words> (&sums)[n_vectors][kKeySums]) {
  const auto mask = hn::Set(Bytes(), static_cast<uint8_t>((1u << bits) - 1u));
  const auto nothing = hn::Zero(Words());
  VELOXQUANT_UNROLL
  for (int v = 0; v < n_vectors; ++v) {
    VELOXQUANT_UNROLL
    for (int i = 0; i < kKeySums; ++i) sums[v][i] = nothing;
  }
  ByteVector codes[n_vectors], low[n_vectors], high[n_vectors];
  int m = 0;
  for (; m + (a_byte == 1 ? 2 : 1) <= n_bytes; m += a_byte == 1 ? 2 : 1) {
    load_codes(from, int64_t{m} * kTokens, codes);
    VELOXQUANT_UNROLL
    for (int i = 0; i < HWY_MAX(a_byte, 2); i += 2, tables += 2 * Table::kBytes) {
      look_up_digit<Table, true>(tables, codes, i * bits, mask, low, high);
      if constexpr (a_byte == 1) load_codes(from, int64_t{m + 1} * kTokens, codes);
      look_up_digit<Table, false>(tables + Table::kBytes, codes, a_byte == 1 ? 0 : (i + 1) * bits,
                                  mask, low, high);
      add_pair(low, high, sums);
    }
  }
  if (m < n_bytes) {
    load_codes(from, int64_t{m} * kTokens, codes);
    look_up_digit<Table, true>(tables, codes, 0, mask, low, high);
    add_pair(low, high, sums);
  }
}

template <class Table, int a_byte>
void score_row(const Blocks& blocks, int bits, const uint8_t* tables, int zero, float step,
               const float* factors, float* scores) {
  const auto codes_of = [&](int v) {
    return blocks.data + v / kVectors * blocks.stride + v % kVectors * kLanes;
  };
  const auto finish = [&](const hn::Vec<Words>(&sums)[kKeySums], int v) HWY_ATTR {
    finish_scores(sums, zero, step, factors == nullptr ? nullptr : factors + v * kLanes,
                  scores + v * kLanes);
  };
  const int n = blocks.n * kVectors;
  int v = 0;
  for (; v + kTogether <= n; v += kTogether) {
    const uint8_t* from[kTogether];
    VELOXQUANT_UNROLL
    for (int i = 0; i < kTogether; ++i) from[i] = codes_of(v + i);
    hn::Vec<Words> sums[kTogether][kKeySums];
    score_vectors<Table, a_byte, kTogether>(from, blocks.n_codes, bits, tables, sums);
    VELOXQUANT_UNROLL
    for (int i = 0; i < kTogether; ++i) finish(sums[i], v + i);
  }
  for (; v < n; ++v) {
    const uint8_t* const from[1] = {codes_of(v)};
    hn::Vec<Words> sums[1][kKeySums];
    score_vectors<Table, a_byte, 1>(from, blocks.n_codes, bits, tables, sums);
    finish(sums[0], v);
  }
}

void ScorePlanes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables, int zero,
                 float step, const float* factors, float* scores) {
  with_table(digits, [&](auto form) HWY_ATTR {
    using Table = typename decltype(form)::Type;
    const auto score = digits.a_byte == 1   ? score_row<Table, 1>
                       : digits.a_byte == 2 ? score_row<Table, 2>
                                            : score_row<Table, 4>;
    score(blocks, digits.bits, tables, zero, step, factors, scores);
  });
}

// ---- values ------------------------------------------------------------------------------------

// Place of a token among the integers of its vector: interleaved bytes come as tokens 16 b + 0..7
// of all 128-bit blocks b, then 16 b + 8..15.
HWY_INLINE int place_of(int token) {
  return token % 16 / 8 * (kLanes / 2) + token / 16 * 8 + token % 8;
}

// Values have 14 bits. What a lane adds up must stay below 2^31, rounding included.
constexpr float kMostWeight = 32766.0f, kMostLane = 262000.0f;

float WeightsToPlanes(const float* weights, int n, const float* factors, int row, int n_rows,
                      int16_t* integers) {
  // Moves the border of rounding through a whole step every 16 tokens: weights far below the
  // largest, all alike, are then right in their sum.
  HWY_ALIGN static constexpr float kDither[16] = {
      -15 / 32.f, 1 / 32.f, -7 / 32.f, 9 / 32.f,  -11 / 32.f, 5 / 32.f, -3 / 32.f, 13 / 32.f,
      -13 / 32.f, 3 / 32.f, -5 / 32.f, 11 / 32.f, -9 / 32.f,  7 / 32.f, -1 / 32.f, 15 / 32.f};
  constexpr int kFloats = kLanes / 4;
  const Floats d;
  const hn::Rebind<int16_t, Floats> shorts;
  const auto weight = [&](int t) HWY_ATTR {
    const auto w = hn::LoadU(d, weights + t);
    return factors == nullptr ? w : hn::Mul(w, hn::LoadU(d, factors + t));
  };
  // A lane adds up the products of four tokens of every vector.
  auto most = hn::Zero(d);
  auto sum0 = most, sum1 = most, sum2 = most, sum3 = most;
  const auto count = [&](int t, hn::Vec<Floats>& sum) HWY_ATTR {
    const auto size = hn::Abs(weight(t));
    most = hn::Max(most, size);
    sum = hn::Add(sum, size);
  };
  for (int t = 0; t < n; t += kLanes) {
    count(t, sum0);
    count(t + kFloats, sum1);
    count(t + 2 * kFloats, sum2);
    count(t + 3 * kFloats, sum3);
  }
  const auto sum = hn::Max(hn::Max(sum0, sum1), hn::Max(sum2, sum3));
  const float largest = hn::GetLane(hn::MaxOfLanes(d, most));
  const float lane = 4 * hn::GetLane(hn::MaxOfLanes(d, sum));
  // Weights that are nothing beside those of other blocks: no reciprocal overflows.
  const bool counts = largest > 1e-30f;
  const float unit = counts ? std::max(largest / kMostWeight, lane / kMostLane) : 0.0f;
  const auto inverse = hn::Set(d, counts ? 1.0f / unit : 0.0f);
  for (int t = 0; t < n; t += kFloats) {
    const auto border = hn::LoadU(d, kDither + t % 16);
    const auto integer = hn::NearestInt(hn::MulAdd(weight(t), inverse, border));
    const auto rounded = hn::DemoteTo(shorts, integer);
    int16_t* to = integers + (int64_t{t / kLanes} * n_rows + row) * kLanes;
#if HWY_MAX_BYTES >= 64
    const hn::Half<decltype(shorts)> eight;
    hn::StoreU(hn::LowerHalf(eight, rounded), eight, to + place_of(t % kLanes));
    hn::StoreU(hn::UpperHalf(eight, rounded), eight, to + place_of(t % kLanes + 8));
#else
    hn::StoreU(rounded, shorts, to + place_of(t % kLanes));
#endif
  }
  return unit;
}

// sum + products of 16-bit integers, two neighbours each; Arm spreads them over two sums.
HWY_INLINE void add_products(hn::Vec<Shorts> a, hn::Vec<Shorts> b, hn::Vec<Ints>& sum,
                             hn::Vec<Ints>& more) {
#if VELOXQUANT_VBMI
  // Highway takes this level only with VNNI, but does not tell the compiler, hence no intrinsic.
  (void)more;
  __m512i raw = sum.raw;
  asm("vpdpwssd %2, %1, %0" : "+v"(raw) : "v"(a.raw), "v"(b.raw));
  sum = hn::Vec<Ints>{raw};
#else
  sum = hn::ReorderWidenMulAccumulate(Ints(), a, b, sum, more);
#endif
}

// n_tables (1 or 2) dimensions of byte m, whose digits begin at bits `shift`: one load of codes and
// weights serves both.
template <class Table, int n_rows, int n_tables>
HWY_INLINE void add_dimensions(const Blocks& blocks, int m, const int (&shift)[n_tables],
                               ByteVector mask, const uint8_t* tables, const int16_t* integers,
                               const float* units, float* sums) {
  const Bytes d;
  const Shorts shorts;
  const Floats floats;
  const Table first(tables), second(tables + (n_tables - 1) * Table::kBytes);
  const uint8_t* codes = blocks.data + int64_t{m} * kTokens;
  for (int done = 0; done < blocks.n; done += kUnitBlocks, units += n_rows) {
    hn::Vec<Ints> sum[n_tables][n_rows], more[n_tables][n_rows];
    VELOXQUANT_UNROLL
    for (int r = 0; r < n_rows; ++r) {
      VELOXQUANT_UNROLL
      for (int i = 0; i < n_tables; ++i) sum[i][r] = more[i][r] = hn::Zero(Ints());
    }
    const int end = std::min(blocks.n, done + kUnitBlocks);
    for (int block = done; block < end; ++block, codes += blocks.stride) {
      VELOXQUANT_UNROLL
      for (int v = 0; v < kVectors; ++v, integers += n_rows * kLanes) {
        const auto code = hn::LoadU(d, codes + v * kLanes);
        hn::Vec<Shorts> a[n_tables], b[n_tables];
        VELOXQUANT_UNROLL
        for (int i = 0; i < n_tables; ++i) {
          ByteVector low, high;
          (i == 0 ? first : second).look_up(digit_of<Table>(code, shift[i], mask), low, high);
          a[i] = hn::BitCast(shorts, hn::InterleaveLower(d, low, high));
          b[i] = hn::BitCast(shorts, hn::InterleaveUpper(d, low, high));
        }
        // Products of one sum are far from each other, so that none waits for the one before.
        VELOXQUANT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
          const auto weight = hn::Load(shorts, integers + r * kLanes);
          VELOXQUANT_UNROLL
          for (int i = 0; i < n_tables; ++i) add_products(a[i], weight, sum[i][r], more[i][r]);
        }
        VELOXQUANT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
          const auto weight = hn::Load(shorts, integers + r * kLanes + kLanes / 2);
          VELOXQUANT_UNROLL
          for (int i = 0; i < n_tables; ++i) {
            n_tables == 1 ? add_products(b[i], weight, more[i][r], sum[i][r])
                          : add_products(b[i], weight, sum[i][r], more[i][r]);
          }
        }
      }
    }
    VELOXQUANT_UNROLL
    for (int i = 0; i < n_tables; ++i) {
      VELOXQUANT_UNROLL
      for (int r = 0; r < n_rows; ++r) {
        float* to = sums + (i * n_rows + r) * kPlaneFloats;
        const auto total = hn::ConvertTo(floats, hn::Add(sum[i][r], more[i][r]));
        hn::Store(hn::MulAdd(total, hn::Set(floats, units[r]), hn::Load(floats, to)), floats, to);
      }
    }
  }
}

template <class Table, int n_rows>
void add_byte(const Blocks& blocks, int m, const PlaneDigits& digits, int n_dims,
              const uint8_t* tables, const int16_t* integers, const float* units, float* sums) {
  const auto mask = hn::Set(Bytes(), static_cast<uint8_t>((1u << digits.bits) - 1u));
  const int a_digit = n_dims / digits.a_byte;
  const auto shift_of = [&](int dim) { return dim / a_digit * digits.bits; };
  int dim = 0;
  if (HWY_MAX_BYTES == 64) {  // as many registers
    for (; dim + 2 <= n_dims; dim += 2) {
      const int shift[2] = {shift_of(dim), shift_of(dim + 1)};
      add_dimensions<Table, n_rows, 2>(blocks, m, shift, mask, tables + dim * Table::kBytes,
                                       integers, units, sums + dim * n_rows * kPlaneFloats);
    }
  }
  for (; dim < n_dims; ++dim) {
    const int shift[1] = {shift_of(dim)};
    add_dimensions<Table, n_rows, 1>(blocks, m, shift, mask, tables + dim * Table::kBytes, integers,
                                     units, sums + dim * n_rows * kPlaneFloats);
  }
}

void AddPlanes(const Blocks& blocks, int m, const PlaneDigits& digits, int n_dims,
               const uint8_t* tables, const int16_t* integers, const float* units, int n_rows,
               float* sums) {
  with_table(digits, [&](auto form) HWY_ATTR {
    using Table = typename decltype(form)::Type;
    const auto add = n_rows == 1   ? add_byte<Table, 1>
                     : n_rows == 2 ? add_byte<Table, 2>
                     : n_rows == 3 ? add_byte<Table, 3>
                                   : add_byte<Table, 4>;
    add(blocks, m, digits, n_dims, tables, integers, units, sums);
  });
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(PlaneLanes);
HWY_EXPORT(HasWideTables);
HWY_EXPORT(SplitPlanes);
HWY_EXPORT(LargestMagnitude);
HWY_EXPORT(MakePlaneEntries);
HWY_EXPORT(FoldPlaneSums);
HWY_EXPORT(ScorePlanes);
HWY_EXPORT(WeightsToPlanes);
HWY_EXPORT(AddPlanes);

int plane_lanes() { return HWY_DYNAMIC_DISPATCH(PlaneLanes)(); }
bool permutes_pairs_at_once() {
#if HWY_ARCH_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

bool has_wide_tables() { return HWY_DYNAMIC_DISPATCH(HasWideTables)(); }

void split_planes(const float* x, int n, int size, float factor, int bias, int low_bits,
                  uint8_t* planes) {
  HWY_DYNAMIC_DISPATCH(SplitPlanes)(x, n, size, factor, bias, low_bits, planes);
}

void make_plane_entries(const PlaneColumns& columns, const float* q, int64_t q_stride, int n_rows,
                        float* entries, int64_t stride, float* most) {
  HWY_DYNAMIC_DISPATCH(MakePlaneEntries)(columns, q, q_stride, n_rows, entries, stride, most);
}

float largest_magnitude(const float* x, int n) {
  return HWY_DYNAMIC_DISPATCH(LargestMagnitude)(x, n);
}

void fold_plane_sums(const float* sums, int n, float* out) {
  HWY_DYNAMIC_DISPATCH(FoldPlaneSums)(sums, n, out);
}

void score_planes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables, int zero,
                  float step, const float* factors, float* scores) {
  HWY_DYNAMIC_DISPATCH(ScorePlanes)(blocks, digits, tables, zero, step, factors, scores);
}

float weights_to_planes(const float* weights, int n, const float* factors, int row, int n_rows,
                        int16_t* integers) {
  return HWY_DYNAMIC_DISPATCH(WeightsToPlanes)(weights, n, factors, row, n_rows, integers);
}

void add_planes(const Blocks& blocks, int m, const PlaneDigits& digits, int n_dims,
                const uint8_t* tables, const int16_t* integers, const float* units, int n_rows,
                float* sums) {
  HWY_DYNAMIC_DISPATCH(AddPlanes)
  (blocks, m, digits, n_dims, tables, integers, units, n_rows, sums);
}

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
