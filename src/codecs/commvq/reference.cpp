// The executable specification of CommVQ: plain loops, every sum in ascending order from zero.
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/commvq/kernels.h"
#include "src/codecs/commvq/rms.h"
#include "src/math/float16.h"

namespace veloxquant::commvq {
namespace {

void products(const float* entries, int n_pairs, int n_entries, float* norms, float* cross) {
  for (int a = 0; a < n_entries; ++a) {
    const float* xa = entries + a * 2 * n_pairs;
    const float* ya = xa + n_pairs;
    float norm = 0.0f;
    for (int j = 0; j < n_pairs; ++j) norm += mul(xa[j], xa[j]) + mul(ya[j], ya[j]);
    norms[a] = norm;
    for (int b = 0; b < n_entries; ++b) {
      const float* xb = entries + b * 2 * n_pairs;
      const float* yb = xb + n_pairs;
      float sum = 0.0f;
      for (int j = 0; j < n_pairs; ++j) sum += mul(ya[j], xb[j]) - mul(xa[j], yb[j]);
      cross[a * kMaxEntries + b] = mul(2.0f, sum);
    }
  }
}

void nearest_tile(const StageTables& stage, const float* z, uint16_t* codes, Scores* scores) {
  const int n = stage.n_entries, pairs = stage.n_pairs;
  std::vector<float> of_a(n), of_b(n);
  for (int t = 0; t < kBlockTokens; ++t) {
    for (int l = 0; l < n; ++l) {
      const float* x = stage.entries + l * 2 * pairs;
      const float* y = x + pairs;
      float u = 0.0f, w = 0.0f;  // <z, u_l>, <z, w_l>
      for (int j = 0; j < pairs; ++j) {
        const float first = z[j * kBlockTokens + t], second = z[(pairs + j) * kBlockTokens + t];
        u += mul(first, x[j]) + mul(second, y[j]);
        w += mul(second, x[j]) - mul(first, y[j]);
      }
      of_a[l] = stage.norms[l] - mul(2.0f, u);
      of_b[l] = stage.norms[l] - mul(2.0f, w);
    }
    int best_a = 0, best_b = 0;
    float best = INFINITY;
    for (int a = 0; a < n; ++a) {
      const float* cross = stage.cross + a * kMaxEntries;
      float least = INFINITY;
      int at = 0;
      for (int b = 0; b < n; ++b) {
        const float score = of_b[b] + cross[b];
        if (score < least) {
          least = score;
          at = b;
        }
      }
      const float score = of_a[a] + least;
      if (scores != nullptr) scores->least[a * kBlockTokens + t] = score;
      if (score < best) {
        best = score;
        best_a = a;
        best_b = at;
      }
    }
    codes[t] = static_cast<uint16_t>(best_a * 64 + best_b);
    for (int l = 0; l < n && scores != nullptr; ++l) {
      scores->of_a[l * kBlockTokens + t] = of_a[l];
      scores->of_b[l * kBlockTokens + t] = of_b[l];
    }
  }
}

void subtract_centres(const StageTables& stage, const uint16_t* codes, float* z) {
  const int pairs = stage.n_pairs;
  for (int t = 0; t < kBlockTokens; ++t) {
    const float* xa = stage.entries + factor_a(codes[t], stage.n_entries) * 2 * pairs;
    const float* xb = stage.entries + factor_b(codes[t], stage.n_entries) * 2 * pairs;
    for (int j = 0; j < pairs; ++j) {
      z[j * kBlockTokens + t] -= xa[j] - xb[pairs + j];
      z[(pairs + j) * kBlockTokens + t] -= xa[pairs + j] + xb[j];
    }
  }
}

void encode_tile(const HeadTables& head, float* z, uint8_t* block) {
  const int pairs = head.n_pairs;
  for (int t = 0; t < kBlockTokens; ++t) {
    float sum = 0.0f;
    for (int j = 0; j < pairs; ++j) {
      const float x = z[j * kBlockTokens + t], y = z[(pairs + j) * kBlockTokens + t];
      sum += mul(x, x) + mul(y, y);
    }
    const uint16_t rms = rounded_rms(sum, 2 * pairs);
    std::memcpy(block + head.n_stages * kRowBytes + 2 * t, &rms, 2);
    const float inverse = inverse_rms(sum, rms);
    for (int i = 0; i < 2 * pairs; ++i) {
      z[i * kBlockTokens + t] = mul(z[i * kBlockTokens + t], inverse);
    }
  }
  std::vector<float> entries(head.stage_size()), norms(kMaxEntries);
  std::vector<float> cross(kMaxEntries * kMaxEntries);
  for (int r = 0; r < head.n_stages; ++r) {
    for (int64_t i = 0; i < head.stage_size(); ++i) entries[i] = f16_to_f32(head.stage(r)[i]);
    products(entries.data(), pairs, head.n_entries, norms.data(), cross.data());
    uint16_t codes[kBlockTokens];
    const StageTables stage{pairs, head.n_entries, entries.data(), norms.data(), cross.data()};
    nearest_tile(stage, z, codes, nullptr);
    pack_row(codes, block + r * kRowBytes);
    subtract_centres(stage, codes, z);
  }
}

void decode_tile(const HeadTables& head, const uint8_t* block, float* z) {
  const int pairs = head.n_pairs;
  std::memset(z, 0, sizeof(float) * 2 * pairs * kBlockTokens);
  for (int r = 0; r < head.n_stages; ++r) {
    uint16_t codes[kBlockTokens];
    unpack_row(block + r * kRowBytes, codes);
    for (int t = 0; t < kBlockTokens; ++t) {
      const uint16_t* xa = head.stage(r) + factor_a(codes[t], head.n_entries) * 2 * pairs;
      const uint16_t* xb = head.stage(r) + factor_b(codes[t], head.n_entries) * 2 * pairs;
      for (int j = 0; j < pairs; ++j) {
        z[j * kBlockTokens + t] += f16_to_f32(xa[j]) - f16_to_f32(xb[pairs + j]);
        z[(pairs + j) * kBlockTokens + t] += f16_to_f32(xa[pairs + j]) + f16_to_f32(xb[j]);
      }
    }
  }
  for (int t = 0; t < kBlockTokens; ++t) {
    uint16_t rms;
    std::memcpy(&rms, block + head.n_stages * kRowBytes + 2 * t, 2);
    const float scale = f16_to_f32(rms);
    for (int i = 0; i < 2 * pairs; ++i) {
      z[i * kBlockTokens + t] = mul(z[i * kBlockTokens + t], scale);
    }
  }
}

}  // namespace

const Kernels& reference_kernels() {
  static const Kernels kernels{encode_tile, decode_tile, nearest_tile, subtract_centres, products};
  return kernels;
}

}  // namespace veloxquant::commvq
