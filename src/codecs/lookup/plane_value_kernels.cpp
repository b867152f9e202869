#include "src/codecs/lookup/plane_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/lookup/plane_value_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>

#include "src/backends/cpu/unroll.h"
#include "src/codecs/lookup/plane_tables-inl.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::lookup::HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR
void FoldPlaneSums(const float*, int, float*) {}
float WeightsToPlanes(const float*, int, const float*, int, int, int16_t*) { return 0; }
void AddPlanes(const Blocks&, int, const PlaneDigits&, int, const uint8_t*, const int16_t*,
               const float*, int, float*) {}
#else

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

void FoldPlaneSums(const float* sums, int n, float* out) {
  const Floats d;
  for (int i = 0; i < n; ++i, sums += kPlaneFloats) {
    out[i] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, sums)));  // lanes beyond the widest are 0
  }
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace veloxquant::lookup::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::lookup {

HWY_EXPORT(FoldPlaneSums);
HWY_EXPORT(WeightsToPlanes);
HWY_EXPORT(AddPlanes);

void fold_plane_sums(const float* sums, int n, float* out) {
  HWY_DYNAMIC_DISPATCH(FoldPlaneSums)(sums, n, out);
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
