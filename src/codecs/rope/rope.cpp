// Rope: checks the spec, lays out the pairs, moves rows in and out of tiles of 64 tokens.
#include "veloxquant/rope.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "src/codecs/rope/kernels.h"
#include "src/math/portable.h"
#include "veloxquant/error.h"

namespace veloxquant {

Rope::Rope(RopeSpec spec) : spec_(std::move(spec)) {
  require(spec_.head_dim >= 2 && spec_.head_dim % 2 == 0, "[rope] head_dim: got ", spec_.head_dim,
          ", wanted an even number: RoPE rotates pairs of dimensions");
  require(spec_.rotary_dims() <= spec_.head_dim, "[rope] inv_freq: got ", spec_.inv_freq.size(),
          " frequencies, wanted at most head_dim / 2 = ", spec_.head_dim / 2);
  for (float frequency : spec_.inv_freq) {
    require(std::isfinite(frequency), "[rope] inv_freq: got ", frequency, ", wanted finite");
  }
  require(std::isfinite(spec_.position_scale), "[rope] position_scale: got ", spec_.position_scale,
          ", wanted finite");
  require(std::isfinite(spec_.attention_factor) && spec_.attention_factor > 0,
          "[rope] attention_factor: got ", spec_.attention_factor, ", wanted finite and above 0");
  const int half = spec_.rotary_dims() / 2;
  for (int j = 0; j < half; ++j) {
    pairs_.push_back(spec_.traditional ? RopePair{2 * j, 2 * j + 1} : RopePair{j, j + half});
  }
  for (int i = 2 * half; i < spec_.head_dim; i += 2) pairs_.push_back({i, i + 1});
}

void Rope::tables(Backend backend, RopeDirection direction, const int64_t* positions,
                  float* cosines, float* sines) const {
  float scaled[rope::kTokens];
  for (int t = 0; t < rope::kTokens; ++t) {
    scaled[t] = mul(spec_.position_scale, static_cast<float>(positions[t]));
  }
  const double factor = direction == RopeDirection::forward
                            ? static_cast<double>(spec_.attention_factor)
                            : 1.0 / static_cast<double>(spec_.attention_factor);
  rope::kernels_of(backend).tables(spec_.inv_freq.data(), spec_.rotary_dims() / 2, scaled, factor,
                                   cosines, sines);
}

namespace {

void turn(const Rope& rope, Backend backend, RopeDirection direction, const int64_t* positions,
          float* x_t) {
  const int n_pairs = rope.spec().rotary_dims() / 2;
  if (n_pairs == 0) return;
  std::vector<float> tables(2 * static_cast<size_t>(n_pairs) * rope::kTokens);
  float* cosines = tables.data();
  float* sines = cosines + n_pairs * rope::kTokens;
  rope.tables(backend, direction, positions, cosines, sines);
  rope::kernels_of(backend).turn(rope.pairs().data(), n_pairs, direction, cosines, sines, x_t);
}

}  // namespace

void Rope::turn_tile(Backend backend, RopeDirection direction, int64_t first, float* x_t) const {
  int64_t positions[rope::kTokens];
  for (int t = 0; t < rope::kTokens; ++t) positions[t] = first + t;
  turn(*this, backend, direction, positions, x_t);
}

void Rope::turn_rows(Backend backend, RopeDirection direction, const int64_t* positions, int64_t n,
                     float* rows, int64_t row_stride) const {
  const int dims = spec_.rotary_dims();
  std::vector<float> tile(static_cast<size_t>(dims) * rope::kTokens, 0.0f);
  for (int64_t start = 0; start < n; start += rope::kTokens) {
    const int64_t count = std::min<int64_t>(rope::kTokens, n - start);
    int64_t here[rope::kTokens] = {};
    for (int64_t t = 0; t < count; ++t) {
      here[t] = positions[start + t];
      const float* row = rows + (start + t) * row_stride;
      for (int d = 0; d < dims; ++d) tile[d * rope::kTokens + t] = row[d];
    }
    turn(*this, backend, direction, here, tile.data());
    for (int64_t t = 0; t < count; ++t) {
      float* row = rows + (start + t) * row_stride;
      for (int d = 0; d < dims; ++d) row[d] = tile[d * rope::kTokens + t];
    }
  }
}

}  // namespace veloxquant
