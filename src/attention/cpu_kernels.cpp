// Inner loops of attention, in Highway. No kernel here is about a codec: keys and values arrive
// decoded, 64 tokens at a time, in buffers that stay in the L1 and L2 caches.
#include "src/attention/cpu_kernels.h"

#include <limits>

#include "src/attention/element.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/attention/cpu_kernels.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace veloxquant::attention::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kTileTokens = 64;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats = hn::CappedTag<float, kColumnStep>;
using Vector = hn::Vec<Floats>;

// ---- exact tokens --------------------------------------------------------------------------

template <class D>
HWY_INLINE hn::Vec<D> load_as_float(D d, const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float16) {
    const hn::Rebind<hwy::float16_t, D> half;
    auto from = static_cast<const hwy::float16_t*>(data) + index;
    return hn::PromoteTo(d, hn::LoadU(half, from));
  }
  if (dtype == DType::bfloat16) {
    const hn::Rebind<hwy::bfloat16_t, D> half;
    auto from = static_cast<const hwy::bfloat16_t*>(data) + index;
    return hn::PromoteTo(d, hn::LoadU(half, from));
  }
  return hn::LoadU(d, static_cast<const float*>(data) + index);
}

// Round to nearest, ties to even, of a magnitude to fp32 values with `dropped` fewer bits.
template <class D, int dropped>
HWY_INLINE hn::Vec<D> round_mantissa(D d, hn::Vec<D> magnitude) {
  const hn::Rebind<uint32_t, D> du;
  auto bits = hn::BitCast(du, magnitude);
  auto odd = hn::And(hn::ShiftRight<dropped>(bits), hn::Set(du, 1u));
  bits = hn::Add(hn::Add(bits, odd), hn::Set(du, (1u << (dropped - 1)) - 1u));
  return hn::BitCast(d, hn::AndNot(hn::Set(du, (1u << dropped) - 1u), bits));
}

// Vector form of as_kept (element.h), without rounding where the input has that type already.
template <class D>
HWY_INLINE hn::Vec<D> keep_as(D d, hn::Vec<D> x, bool round, DType keep, hn::Vec<D> largest) {
  x = hn::IfThenElseZero(hn::Eq(x, x), x);  // NaN becomes 0
  auto magnitude = hn::Abs(x);
  if (round && keep == DType::float16) {
    // Below 2^-14 fp16 is a fixed-point format with step 2^-24, the step of fp32 numbers in
    // [0.5, 1): adding 0.5 rounds.
    auto half = hn::Set(d, 0.5f);
    auto subnormal = hn::Sub(hn::Add(magnitude, half), half);
    auto normal = round_mantissa<D, 13>(d, magnitude);
    magnitude = hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, 6.103515625e-5f)), subnormal, normal);
  } else if (round && keep == DType::bfloat16) {
    magnitude = round_mantissa<D, 16>(d, magnitude);
  }
  return hn::CopySignToAbs(hn::Min(magnitude, largest), x);
}

template <class D>
HWY_INLINE void load_rows(D d, const void* tokens, DType dtype, int64_t token_stride, DType keep,
                          int count, int head_dim, float* rows, int64_t row_stride) {
  const bool round = dtype != keep;
  const auto largest = hn::Set(d, largest_finite(keep));
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < head_dim; i += static_cast<int>(hn::Lanes(d))) {
      auto x = load_as_float(d, tokens, dtype, t * token_stride + i);
      hn::StoreU(keep_as(d, x, round, keep, largest), d, rows + t * row_stride + i);
    }
  }
}

void LoadExactRows(const void* tokens, DType dtype, int64_t token_stride, DType keep, int count,
                   int head_dim, float* rows, int64_t row_stride) {
  const Floats d;
  if (head_dim % static_cast<int>(hn::Lanes(d)) == 0) {
    load_rows(d, tokens, dtype, token_stride, keep, count, head_dim, rows, row_stride);
  } else {
    load_rows(hn::CappedTag<float, 8>(), tokens, dtype, token_stride, keep, count, head_dim, rows,
              row_stride);
  }
}

#if HWY_TARGET == HWY_SCALAR  // has no 128-bit registers
void TransposeRows(const float* rows, int64_t row_stride, int count, int head_dim, float* columns) {
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < head_dim; ++i) columns[i * kTileTokens + t] = rows[t * row_stride + i];
  }
}
#else
// 4 x 4 blocks in 128-bit registers: two rounds of interleaving.
void TransposeRows(const float* rows, int64_t row_stride, int count, int head_dim, float* columns) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> pairs;
  for (int t = 0; t < count; t += 4) {
    const float* row = rows + t * row_stride;
    for (int i = 0; i < head_dim; i += 4) {
      auto a = hn::LoadU(d, row + i);
      auto b = hn::LoadU(d, row + row_stride + i);
      auto e = hn::LoadU(d, row + 2 * row_stride + i);
      auto f = hn::LoadU(d, row + 3 * row_stride + i);
      auto ab_low = hn::BitCast(pairs, hn::InterleaveLower(d, a, b));
      auto ab_high = hn::BitCast(pairs, hn::InterleaveUpper(d, a, b));
      auto ef_low = hn::BitCast(pairs, hn::InterleaveLower(d, e, f));
      auto ef_high = hn::BitCast(pairs, hn::InterleaveUpper(d, e, f));
      float* to = columns + int64_t{i} * kTileTokens + t;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, ab_low, ef_low)), d, to);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, ab_low, ef_low)), d, to + kTileTokens);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, ab_high, ef_high)), d,
                 to + 2 * kTileTokens);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, ab_high, ef_high)), d,
                 to + 3 * kTileTokens);
    }
  }
}
#endif

// ---- matrix product ------------------------------------------------------------------------

// A block of `n_rows` x `n_vectors` accumulators stays in registers: 24 of 32 on AVX-512 and Arm,
// 12 of 16 elsewhere. Few rows (decoding) take more vectors, to hide the latency of the FMA.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kMaxRows = 6;
constexpr int max_vectors(int n_rows) { return kManyRegisters || n_rows <= 2 ? 4 : 2; }

template <int n_rows, int n_vectors>
HWY_NOINLINE void multiply_block(const MatrixProduct& m, int row, int column) {
  const Floats d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  Vector sum[n_rows][n_vectors];
  float* c = m.c + row * m.c_stride + column;
  HWY_UNROLL(8)
  for (int r = 0; r < n_rows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < n_vectors; ++v) {
      sum[r][v] = m.row_scale == nullptr ? hn::Zero(d)
                                         : hn::Mul(hn::Set(d, m.row_scale[row + r]),
                                                   hn::LoadU(d, c + r * m.c_stride + v * lanes));
    }
  }
  const float* a = m.a + row * m.a_stride;
  const float* b = m.b + column;
  for (int k = 0; k < m.depth; ++k, ++a, b += m.b_stride) {
    Vector right[n_vectors];
    HWY_UNROLL(8)
    for (int v = 0; v < n_vectors; ++v) right[v] = hn::LoadU(d, b + v * lanes);
    HWY_UNROLL(8)
    for (int r = 0; r < n_rows; ++r) {
      const Vector left = hn::Set(d, a[r * m.a_stride]);
      HWY_UNROLL(8)
      for (int v = 0; v < n_vectors; ++v) sum[r][v] = hn::MulAdd(left, right[v], sum[r][v]);
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < n_rows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < n_vectors; ++v) {
      hn::StoreU(sum[r][v], d, c + r * m.c_stride + v * lanes);
    }
  }
}

using MultiplyBlock = void (*)(const MatrixProduct&, int row, int column);

template <int n_rows>
MultiplyBlock block_of(int n_vectors) {
  if constexpr (max_vectors(n_rows) == 4) {
    if (n_vectors == 4) return multiply_block<n_rows, 4>;
    if (n_vectors == 3) return multiply_block<n_rows, 3>;
  }
  return n_vectors == 2 ? multiply_block<n_rows, 2> : multiply_block<n_rows, 1>;
}

MultiplyBlock block_of(int n_rows, int n_vectors) {
  switch (n_rows) {
    case 1:
      return block_of<1>(n_vectors);
    case 2:
      return block_of<2>(n_vectors);
    case 3:
      return block_of<3>(n_vectors);
    case 4:
      return block_of<4>(n_vectors);
    case 5:
      return block_of<5>(n_vectors);
    default:
      return block_of<6>(n_vectors);
  }
}

// The next part when n is cut into the fewest parts of at most `most`, as even as can be.
HWY_INLINE int next_part(int n, int most) {
  int parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

// Columns outside, rows inside: a panel of b is reused from L1 by every block of rows.
void Multiply(const MatrixProduct& m) {
  const int lanes = static_cast<int>(hn::Lanes(Floats()));
  const int widest = max_vectors(next_part(m.n_rows, kMaxRows));
  for (int column = 0; column < m.n_columns;) {
    const int n_vectors = next_part((m.n_columns - column) / lanes, widest);
    for (int row = 0; row < m.n_rows;) {
      const int n = next_part(m.n_rows - row, kMaxRows);
      block_of(n, n_vectors)(m, row, column);
      row += n;
    }
    column += n_vectors * lanes;
  }
}

// ---- softmax -------------------------------------------------------------------------------

// 2^x for x <= 0, relative error 1e-7; 0 below 2^-126. 2^x = 2^n 2^f, |f| <= 1/2, the second
// factor by a polynomial through the Chebyshev points.
HWY_INLINE Vector exp2_of(Floats d, Vector x) {
  const hn::RebindToSigned<Floats> di;
  const auto tiny = hn::Lt(x, hn::Set(d, -126.0f));
  x = hn::Max(x, hn::Set(d, -126.0f));
  const auto n = hn::NearestInt(x);
  const auto f = hn::Sub(x, hn::ConvertTo(d, n));
  auto p = hn::Set(d, 1.5461444696478693e-4f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.3400428177411338e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.6180566785259520e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5503272266709695e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022650922288827e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9314720670283210e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
  return hn::IfThenZeroElse(tiny, hn::Mul(p, power));
}

// Scales and masks one row of 64 scores in place and returns their maximum.
HWY_INLINE float finish_scores(Floats d, const SoftmaxStep& step, int row) {
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto scale = hn::Set(d, step.scale);
  const auto cap = hn::Set(d, step.softcap * kLog2E);
  const auto log2_e = hn::Set(d, kLog2E);
  const auto inverse_cap = hn::Set(d, step.softcap > 0 ? 1 / step.softcap : 0);
  const auto nothing = hn::Set(d, -kInfinity);
  const bool cut = step.begin[row] > 0 || step.end[row] < kTileTokens;
  const auto begin = hn::Set(d, static_cast<float>(step.begin[row]));
  const auto end = hn::Set(d, static_cast<float>(step.end[row]));
  float* scores = step.scores + row * step.stride;
  auto top = nothing;
  for (int column = 0; column < kTileTokens; column += lanes) {
    auto s = hn::Mul(hn::LoadU(d, scores + column), scale);
    if (step.softcap > 0) s = hn::Mul(cap, hn::Tanh(d, hn::Mul(s, inverse_cap)));
    if (step.mask != nullptr) {
      s = hn::MulAdd(hn::LoadU(d, step.mask + row * kTileTokens + column), log2_e, s);
    }
    if (cut) {
      const auto index = hn::Iota(d, static_cast<float>(column));
      s = hn::IfThenElse(hn::And(hn::Ge(index, begin), hn::Lt(index, end)), s, nothing);
    }
    hn::StoreU(s, d, scores + column);
    top = hn::Max(top, s);
  }
  return hn::GetLane(hn::MaxOfLanes(d, top));
}

// exp2(score - max) of one row of 64 in place; returns their sum.
HWY_INLINE float exponentiate_row(Floats d, float max, float* scores) {
  const int lanes = static_cast<int>(hn::Lanes(d));
  // A row that has seen nothing yet: any finite base turns -inf into probability 0.
  const auto minus_base = hn::Set(d, max == -kInfinity ? 0.0f : -max);
  auto sum = hn::Zero(d);
  for (int column = 0; column < kTileTokens; column += lanes) {
    const auto p = exp2_of(d, hn::Add(hn::LoadU(d, scores + column), minus_base));
    hn::StoreU(p, d, scores + column);
    sum = hn::Add(sum, p);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

void SoftmaxStepOnRows(const SoftmaxStep& step) {
  const Floats d;
  for (int row = 0; row < step.n_rows; ++row) {
    const float old_max = step.max[row];
    const float top = finish_scores(d, step, row);
    const float new_max = top > old_max ? top : old_max;
    const float base = new_max == -kInfinity ? 0.0f : new_max;
    const float sum = exponentiate_row(d, new_max, step.scores + row * step.stride);
    const float shrink =
        old_max == new_max ? 1.0f : hn::GetLane(exp2_of(d, hn::Set(d, old_max - base)));
    step.sum[row] = step.sum[row] * shrink + sum;
    step.max[row] = new_max;
    step.shrink[row] = shrink;
  }
}

void MaskScores(const SoftmaxStep& step) {
  for (int row = 0; row < step.n_rows; ++row) {
    const float top = finish_scores(Floats(), step, row);
    if (top > step.max[row]) step.max[row] = top;
  }
}

void Exponentiate(const SoftmaxStep& step) {
  for (int row = 0; row < step.n_rows; ++row) {
    step.sum[row] += exponentiate_row(Floats(), step.max[row], step.scores + row * step.stride);
  }
}

}  // namespace veloxquant::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant::attention {

HWY_EXPORT(LoadExactRows);
HWY_EXPORT(TransposeRows);
HWY_EXPORT(Multiply);
HWY_EXPORT(SoftmaxStepOnRows);
HWY_EXPORT(MaskScores);
HWY_EXPORT(Exponentiate);

void load_exact_rows(const void* tokens, DType dtype, int64_t token_stride, DType keep, int count,
                     int head_dim, float* rows, int64_t row_stride) {
  HWY_DYNAMIC_DISPATCH(LoadExactRows)
  (tokens, dtype, token_stride, keep, count, head_dim, rows, row_stride);
}

void transpose_rows(const float* rows, int64_t row_stride, int count, int head_dim,
                    float* columns) {
  HWY_DYNAMIC_DISPATCH(TransposeRows)(rows, row_stride, count, head_dim, columns);
}

void multiply(const MatrixProduct& product) { HWY_DYNAMIC_DISPATCH(Multiply)(product); }

void softmax_step(const SoftmaxStep& step) { HWY_DYNAMIC_DISPATCH(SoftmaxStepOnRows)(step); }
void mask_scores(const SoftmaxStep& step) { HWY_DYNAMIC_DISPATCH(MaskScores)(step); }
void exponentiate(const SoftmaxStep& step) { HWY_DYNAMIC_DISPATCH(Exponentiate)(step); }

}  // namespace veloxquant::attention
#endif  // HWY_ONCE
