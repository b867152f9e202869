// CommVQ on the CPU: compiled once per SIMD level. Encoding is vectorised over tokens, decoding
// over pairs; every sum keeps the order of the reference.
#include "src/codecs/commvq/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/commvq/cpu.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "src/codecs/commvq/rms.h"
#include "src/math/float16.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::commvq::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 64>;
using VF = hn::Vec<F32>;
using F4 = hn::CappedTag<float, 4>;  // head_dim is a multiple of 8: pairs come in fours

// fp16 [n] -> fp32, n a multiple of 8.
HWY_INLINE void widen(const uint16_t* HWY_RESTRICT from, int64_t n, float* HWY_RESTRICT to) {
  const hn::CappedTag<float, 8> df;
  const hn::Rebind<hwy::float16_t, decltype(df)> df16;
  const hn::Rebind<uint16_t, decltype(df)> du16;
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (int64_t i = 0; i < n; i += lanes) {
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, from + i))), df, to + i);
  }
}

void products(const float* HWY_RESTRICT entries, int n_pairs, int n_entries,
              float* HWY_RESTRICT norms, float* HWY_RESTRICT cross) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  // Entry-minor: x [pairs][64], then y; what lies beyond n_entries is 0 and never looked at.
  std::vector<float> columns(2 * static_cast<size_t>(n_pairs) * kMaxEntries, 0.0f);
  for (int l = 0; l < n_entries; ++l) {
    for (int i = 0; i < 2 * n_pairs; ++i) {
      columns[i * kMaxEntries + l] = entries[l * 2 * n_pairs + i];
    }
  }
  const float* x = columns.data();
  const float* y = x + n_pairs * kMaxEntries;
  float padded_norms[kMaxEntries];
  for (int b = 0; b < kMaxEntries; b += lanes) {
    VF norm = hn::Zero(df);
    for (int j = 0; j < n_pairs; ++j) {
      const VF xb = hn::LoadU(df, x + j * kMaxEntries + b);
      const VF yb = hn::LoadU(df, y + j * kMaxEntries + b);
      norm = hn::Add(norm, hn::Add(hn::Mul(xb, xb), hn::Mul(yb, yb)));
    }
    hn::StoreU(norm, df, padded_norms + b);
    for (int a = 0; a < n_entries; ++a) {
      VF sum = hn::Zero(df);
      for (int j = 0; j < n_pairs; ++j) {
        const VF xb = hn::LoadU(df, x + j * kMaxEntries + b);
        const VF yb = hn::LoadU(df, y + j * kMaxEntries + b);
        const VF xa = hn::Set(df, x[j * kMaxEntries + a]), ya = hn::Set(df, y[j * kMaxEntries + a]);
        sum = hn::Add(sum, hn::Sub(hn::Mul(ya, xb), hn::Mul(xa, yb)));
      }
      hn::StoreU(hn::Mul(hn::Set(df, 2.0f), sum), df, cross + a * kMaxEntries + b);
    }
  }
  std::copy(padded_norms, padded_norms + n_entries, norms);
}

// of_a, of_b [entries][lanes]: norm - 2 <z, u>, norm - 2 <z, w> of one vector of tokens. Two
// entries at a time share the loads of z.
HWY_INLINE void inner_products(const StageTables& stage, const float* HWY_RESTRICT z,
                               float* HWY_RESTRICT of_a, float* HWY_RESTRICT of_b) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const int pairs = stage.n_pairs;
  const VF two = hn::Set(df, 2.0f);
  for (int l = 0; l < stage.n_entries; l += 2) {
    const int k = std::min(l + 1, stage.n_entries - 1);
    const float* HWY_RESTRICT xl = stage.entries + l * 2 * pairs;
    const float* HWY_RESTRICT xk = stage.entries + k * 2 * pairs;
    VF ul = hn::Zero(df), wl = ul, uk = ul, wk = ul;
    for (int j = 0; j < pairs; ++j) {
      const VF first = hn::LoadU(df, z + j * kBlockTokens);
      const VF second = hn::LoadU(df, z + (pairs + j) * kBlockTokens);
      const VF x = hn::Set(df, xl[j]), y = hn::Set(df, xl[pairs + j]);
      ul = hn::Add(ul, hn::Add(hn::Mul(first, x), hn::Mul(second, y)));
      wl = hn::Add(wl, hn::Sub(hn::Mul(second, x), hn::Mul(first, y)));
      const VF p = hn::Set(df, xk[j]), q = hn::Set(df, xk[pairs + j]);
      uk = hn::Add(uk, hn::Add(hn::Mul(first, p), hn::Mul(second, q)));
      wk = hn::Add(wk, hn::Sub(hn::Mul(second, p), hn::Mul(first, q)));
    }
    const VF norm_l = hn::Set(df, stage.norms[l]), norm_k = hn::Set(df, stage.norms[k]);
    hn::StoreU(hn::Sub(norm_l, hn::Mul(two, ul)), df, of_a + l * lanes);
    hn::StoreU(hn::Sub(norm_l, hn::Mul(two, wl)), df, of_b + l * lanes);
    hn::StoreU(hn::Sub(norm_k, hn::Mul(two, uk)), df, of_a + k * lanes);
    hn::StoreU(hn::Sub(norm_k, hn::Mul(two, wk)), df, of_b + k * lanes);
  }
}

// The lowest of_b[b] + cross[a][b] for kRows neighbouring a: only the values, which is two
// instructions a pair; the winner's b is found afterwards.
template <int kRows>
HWY_INLINE void least_over_b(const float* HWY_RESTRICT of_b, const float* HWY_RESTRICT cross, int n,
                             VF (&least)[kRows]) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (int i = 0; i < kRows; ++i) least[i] = hn::Set(df, float_of(0x7f800000u));
  for (int b = 0; b < n; ++b) {
    const VF score = hn::LoadU(df, of_b + b * lanes);
    for (int i = 0; i < kRows; ++i) {
      least[i] = hn::Min(least[i], hn::Add(score, hn::Set(df, cross[i * kMaxEntries + b])));
    }
  }
}

void nearest_tile(const StageTables& stage, const float* HWY_RESTRICT z,
                  uint16_t* HWY_RESTRICT codes, Scores* scores) {
  const F32 df;
  const hn::RebindToSigned<F32> di;
  const hn::Rebind<uint16_t, F32> du16;
  using VI = hn::Vec<decltype(di)>;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const int n = stage.n_entries;
  HWY_ALIGN float of_a[kMaxEntries * HWY_MAX_BYTES / sizeof(float)];
  HWY_ALIGN float of_b[kMaxEntries * HWY_MAX_BYTES / sizeof(float)];
  constexpr int kRows = 8;
  for (int t = 0; t < kBlockTokens; t += lanes) {
    inner_products(stage, z + t, of_a, of_b);
    for (int l = 0; l < n && scores != nullptr; ++l) {
      hn::StoreU(hn::LoadU(df, of_a + l * lanes), df, scores->of_a + l * kBlockTokens + t);
      hn::StoreU(hn::LoadU(df, of_b + l * lanes), df, scores->of_b + l * kBlockTokens + t);
    }
    VF best = hn::Set(df, float_of(0x7f800000u));
    VI best_a = hn::Zero(di);
    const auto consider = [&](int a, VF least) HWY_ATTR {
      const VF score = hn::Add(hn::LoadU(df, of_a + a * lanes), least);
      if (scores != nullptr) hn::StoreU(score, df, scores->least + a * kBlockTokens + t);
      const auto closer = hn::Lt(score, best);
      best = hn::IfThenElse(closer, score, best);
      best_a = hn::IfThenElse(hn::RebindMask(di, closer), hn::Set(di, a), best_a);
    };
    int a = 0;
    for (; a + kRows <= n; a += kRows) {
      VF least[kRows];
      least_over_b<kRows>(of_b, stage.cross + a * kMaxEntries, n, least);
      for (int i = 0; i < kRows; ++i) consider(a + i, least[i]);
    }
    for (; a < n; ++a) {
      VF least[1];
      least_over_b<1>(of_b, stage.cross + a * kMaxEntries, n, least);
      consider(a, least[0]);
    }
    // The first b that reaches the lowest score of the winning a.
    const VI row = hn::Mul(best_a, hn::Set(di, kMaxEntries));
    VF least = hn::Set(df, float_of(0x7f800000u));
    VI best_b = hn::Zero(di);
    for (int b = 0; b < n; ++b) {
      const VF score =
          hn::Add(hn::LoadU(df, of_b + b * lanes), hn::GatherIndex(df, stage.cross + b, row));
      const auto closer = hn::Lt(score, least);
      least = hn::IfThenElse(closer, score, least);
      best_b = hn::IfThenElse(hn::RebindMask(di, closer), hn::Set(di, b), best_b);
    }
    const VI code = hn::Add(hn::Mul(best_a, hn::Set(di, 64)), best_b);
    hn::StoreU(hn::DemoteTo(du16, code), du16, codes + t);
  }
}

void subtract_centres(const StageTables& stage, const uint16_t* codes, float* HWY_RESTRICT z) {
  const int pairs = stage.n_pairs;
  const F32 df;
  const hn::RebindToSigned<F32> di;
  const int lanes = static_cast<int>(hn::Lanes(df));
  HWY_ALIGN int32_t at_a[kBlockTokens], at_b[kBlockTokens];
  for (int t = 0; t < kBlockTokens; ++t) {
    at_a[t] = factor_a(codes[t], stage.n_entries) * 2 * pairs;
    at_b[t] = factor_b(codes[t], stage.n_entries) * 2 * pairs;
  }
  for (int j = 0; j < pairs; ++j) {
    const float* x = stage.entries + j;
    const float* y = x + pairs;
    for (int t = 0; t < kBlockTokens; t += lanes) {
      const auto a = hn::Load(di, at_a + t), b = hn::Load(di, at_b + t);
      float* first = z + j * kBlockTokens + t;
      float* second = first + pairs * kBlockTokens;
      const VF centre_x = hn::Sub(hn::GatherIndex(df, x, a), hn::GatherIndex(df, y, b));
      const VF centre_y = hn::Add(hn::GatherIndex(df, y, a), hn::GatherIndex(df, x, b));
      hn::StoreU(hn::Sub(hn::LoadU(df, first), centre_x), df, first);
      hn::StoreU(hn::Sub(hn::LoadU(df, second), centre_y), df, second);
    }
  }
}

// z /= rms of each token; the rounded rms go to `scalars`.
HWY_INLINE void normalise(int pairs, float* HWY_RESTRICT z, uint8_t* HWY_RESTRICT scalars) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  HWY_ALIGN float sums[kBlockTokens], inverse[kBlockTokens];
  for (int t = 0; t < kBlockTokens; t += lanes) {
    VF sum = hn::Zero(df);
    for (int j = 0; j < pairs; ++j) {
      const VF x = hn::LoadU(df, z + j * kBlockTokens + t);
      const VF y = hn::LoadU(df, z + (pairs + j) * kBlockTokens + t);
      sum = hn::Add(sum, hn::Add(hn::Mul(x, x), hn::Mul(y, y)));
    }
    hn::Store(sum, df, sums + t);
  }
  for (int t = 0; t < kBlockTokens; ++t) {
    const uint16_t rms = rounded_rms(sums[t], 2 * pairs);
    std::memcpy(scalars + 2 * t, &rms, 2);
    inverse[t] = inverse_rms(sums[t], rms);
  }
  for (int i = 0; i < 2 * pairs; ++i) {
    for (int t = 0; t < kBlockTokens; t += lanes) {
      float* at = z + i * kBlockTokens + t;
      hn::StoreU(hn::Mul(hn::LoadU(df, at), hn::Load(df, inverse + t)), df, at);
    }
  }
}

void encode_tile(const HeadTables& head, float* z, uint8_t* block) {
  normalise(head.n_pairs, z, block + head.n_stages * kRowBytes);
  std::vector<float> entries(head.stage_size());
  HWY_ALIGN float norms[kMaxEntries];
  HWY_ALIGN float cross[kMaxEntries * kMaxEntries];
  for (int r = 0; r < head.n_stages; ++r) {
    widen(head.stage(r), head.stage_size(), entries.data());
    HWY_NAMESPACE::products(entries.data(), head.n_pairs, head.n_entries, norms, cross);
    uint16_t codes[kBlockTokens];
    const StageTables stage{head.n_pairs, head.n_entries, entries.data(), norms, cross};
    HWY_NAMESPACE::nearest_tile(stage, z, codes, nullptr);
    pack_row(codes, block + r * kRowBytes);
    HWY_NAMESPACE::subtract_centres(stage, codes, z);
  }
}

template <class D>
HWY_INLINE hn::Vec<D> widened(D df, const uint16_t* from) {
  const hn::Rebind<hwy::float16_t, D> df16;
  const hn::Rebind<uint16_t, D> du16;
  return hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, from)));
}

// Adds the centre of one stage to a token's sums: [2][pairs], from pair j on while vectors fit.
template <class D>
HWY_INLINE int add_centre(D df, const uint16_t* HWY_RESTRICT xa, const uint16_t* HWY_RESTRICT xb,
                          int pairs, int j, float* HWY_RESTRICT sums) {
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (; j + lanes <= pairs; j += lanes) {
    const auto x = hn::Sub(widened(df, xa + j), widened(df, xb + pairs + j));
    const auto y = hn::Add(widened(df, xa + pairs + j), widened(df, xb + j));
    hn::StoreU(hn::Add(hn::LoadU(df, sums + j), x), df, sums + j);
    hn::StoreU(hn::Add(hn::LoadU(df, sums + pairs + j), y), df, sums + pairs + j);
  }
  return j;
}

void decode_tile(const HeadTables& head, const uint8_t* block, float* z) {
  const F32 df;
  const int pairs = head.n_pairs;
  HWY_ALIGN float sums[kBlockTokens * 2 * kMaxPairs];
  std::memset(sums, 0, sizeof(float) * kBlockTokens * 2 * pairs);
  for (int r = 0; r < head.n_stages; ++r) {
    uint16_t codes[kBlockTokens];
    unpack_row(block + r * kRowBytes, codes);
    const uint16_t* stage = head.stage(r);
    for (int t = 0; t < kBlockTokens; ++t) {
      const uint16_t* xa = stage + factor_a(codes[t], head.n_entries) * 2 * pairs;
      const uint16_t* xb = stage + factor_b(codes[t], head.n_entries) * 2 * pairs;
      float* row = sums + t * 2 * pairs;
      const int j = add_centre(df, xa, xb, pairs, 0, row);
      add_centre(F4(), xa, xb, pairs, j, row);
    }
  }
  const uint8_t* scalars = block + head.n_stages * kRowBytes;
  for (int t = 0; t < kBlockTokens; ++t) {
    uint16_t rms;
    std::memcpy(&rms, scalars + 2 * t, 2);
    const float scale = f16_to_f32(rms);
    const float* row = sums + t * 2 * pairs;
    for (int i = 0; i < 2 * pairs; ++i) z[i * kBlockTokens + t] = mul(row[i], scale);
  }
}

}  // namespace veloxquant::commvq::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"

namespace veloxquant::commvq {

HWY_EXPORT(encode_tile);
HWY_EXPORT(decode_tile);
HWY_EXPORT(nearest_tile);
HWY_EXPORT(subtract_centres);
HWY_EXPORT(products);

const Kernels& cpu_kernels() {
  cpu::apply_environment();
  static const Kernels kernels{
      [](const HeadTables& head, float* z, uint8_t* block) {
        HWY_DYNAMIC_DISPATCH(encode_tile)(head, z, block);
      },
      [](const HeadTables& head, const uint8_t* block, float* z) {
        HWY_DYNAMIC_DISPATCH(decode_tile)(head, block, z);
      },
      [](const StageTables& stage, const float* z, uint16_t* codes, Scores* scores) {
        HWY_DYNAMIC_DISPATCH(nearest_tile)(stage, z, codes, scores);
      },
      [](const StageTables& stage, const uint16_t* codes, float* z) {
        HWY_DYNAMIC_DISPATCH(subtract_centres)(stage, codes, z);
      },
      [](const float* entries, int n_pairs, int n_entries, float* norms, float* cross) {
        HWY_DYNAMIC_DISPATCH(products)(entries, n_pairs, n_entries, norms, cross);
      }};
  return kernels;
}

}  // namespace veloxquant::commvq
#endif  // HWY_ONCE
