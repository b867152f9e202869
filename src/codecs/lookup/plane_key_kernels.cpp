#include "src/codecs/lookup/plane_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/plane_key_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "src/backends/cpu/unroll.h"
#include "src/codecs/lookup/plane_tables-inl.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR
int PlaneLanes() { return 0; }
bool HasWideTables() { return false; }
void SplitPlanes(const float*, int, int, float, int, int, uint8_t*) {}
float LargestMagnitude(const float*, int) { return 0; }
void MakePlaneEntries(const PlaneColumns&, const float*, int64_t, int, float*, int64_t, float*) {}
void ScorePlanes(const Blocks&, const PlaneDigits&, const uint8_t*, int, float, const float*,
                 float*) {}
#else

int PlaneLanes() { return kLanes; }
bool HasWideTables() { return VELOXQUANT_VBMI; }

// ---- tables ------------------------------------------------------------------------------------

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
HWY_EXPORT(ScorePlanes);

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

void score_planes(const Blocks& blocks, const PlaneDigits& digits, const uint8_t* tables, int zero,
                  float step, const float* factors, float* scores) {
  HWY_DYNAMIC_DISPATCH(ScorePlanes)(blocks, digits, tables, zero, step, factors, scores);
}

}  // namespace veloxquant::lookup
#endif  // HWY_ONCE
