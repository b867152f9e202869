// The executable specification of levels and planes.
#include <algorithm>
#include <cstring>

#include "src/codecs/rabitq/levels.h"

namespace veloxquant::rabitq {
namespace {

// The step whose levels have the greatest cosine with the token; the first wins ties.
float best_inverse_step(const float* y, int rows, int bits) {
  if (bits == 1) return 0.0f;  // one magnitude only
  const float squares = level_sums(y, kBlockTokens, rows, bits, 0.0f).squares;
  const float inverse =
      mul(inverse_rms(squares, 1.0f / static_cast<float>(rows)), kInverseStep[bits]);
  float best = -1.0f, best_step = 0.0f;
  for (float factor : kStepFactors) {
    const float inverse_step = mul(inverse, factor);
    const LevelSums sums = level_sums(y, kBlockTokens, rows, bits, inverse_step);
    const float cosine = mul(sums.dots, sums.dots) / sums.levels;
    if (cosine > best) {
      best = cosine;
      best_step = inverse_step;
    }
  }
  return best_step;
}

void encode(const float* y_t, int rows, int bits, uint8_t* planes, float* squares, float* dots,
            float* levels) {
  std::memset(planes, 0, static_cast<size_t>(plane_bytes(rows, bits)));
  for (int t = 0; t < kBlockTokens; ++t) {
    const float* y = y_t + t;
    const float inverse_step = best_inverse_step(y, rows, bits);
    for (int r = 0; r < rows; ++r) {
      set_code(planes, bits, r, t, level_code(y[r * kBlockTokens], bits, inverse_step));
    }
    const LevelSums sums = level_sums(y, kBlockTokens, rows, bits, inverse_step);
    squares[t] = sums.squares;
    dots[t] = sums.dots;
    levels[t] = sums.levels;
  }
}

void decode(const uint8_t* planes, int rows, int bits, const float* scale, const float* mean,
            float* y_t) {
  const int highest = (1 << bits) - 1;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < kBlockTokens; ++t) {
      const int level = 2 * static_cast<int>(get_code(planes, bits, r, t)) - highest;
      float y = static_cast<float>(level);
      if (scale != nullptr) y = mul(y, scale[t]);
      if (mean != nullptr) y = y + mean[r];
      y_t[r * kBlockTokens + t] = y;
    }
  }
}

}  // namespace

const LevelKernels& reference_levels() {
  static const LevelKernels kernels{encode, decode};
  return kernels;
}

uint32_t get_code(const uint8_t* planes, int bits, int row, int t) {
  const uint8_t* plane = planes + plane_bytes(row, bits) + t / 8;
  uint32_t code = 0;
  for (int p = 0; p < bits; ++p) code |= ((plane[p * kPlaneBytes] >> (t % 8)) & 1u) << p;
  return code;
}

void set_code(uint8_t* planes, int bits, int row, int t, uint32_t code) {
  uint8_t* plane = planes + plane_bytes(row, bits) + t / 8;
  for (int p = 0; p < bits; ++p) {
    plane[p * kPlaneBytes] |= static_cast<uint8_t>(((code >> p) & 1u) << (t % 8));
  }
}

void clear_tokens_from(int n_tokens, int64_t n_planes, uint8_t* planes) {
  if (n_tokens >= kBlockTokens) return;
  uint8_t kept[kPlaneBytes] = {};
  for (int t = 0; t < n_tokens; ++t) kept[t / 8] |= static_cast<uint8_t>(1u << (t % 8));
  for (int64_t p = 0; p < n_planes; ++p) {
    for (int b = 0; b < kPlaneBytes; ++b) planes[p * kPlaneBytes + b] &= kept[b];
  }
}

void to_tile(const float* rows, int n_tokens, int dim, float* tile) {
  for (int d = 0; d < dim; ++d) {
    for (int t = 0; t < n_tokens; ++t) tile[d * kBlockTokens + t] = rows[t * dim + d];
    for (int t = n_tokens; t < kBlockTokens; ++t) tile[d * kBlockTokens + t] = 0.0f;
  }
}

void from_tile(const float* tile, int n_tokens, int dim, float* rows, int64_t row_stride) {
  // 8 x 8 squares: both sides stay within a few cache lines.
  constexpr int kSquare = 8;
  for (int first_d = 0; first_d < dim; first_d += kSquare) {
    for (int first_t = 0; first_t < n_tokens; first_t += kSquare) {
      const int end_d = first_d + kSquare < dim ? first_d + kSquare : dim;
      const int end_t = first_t + kSquare < n_tokens ? first_t + kSquare : n_tokens;
      for (int t = first_t; t < end_t; ++t) {
        for (int d = first_d; d < end_d; ++d) {
          rows[t * row_stride + d] = tile[d * kBlockTokens + t];
        }
      }
    }
  }
}

void planes_to_rows(const uint8_t* planes, int m, int n_tokens, uint8_t* rows, int64_t row_stride) {
  for (int byte = 0; byte < m / 8; ++byte) {
    for (int first = 0; first < n_tokens; first += 8) {
      uint64_t square = 0;
      for (int k = 0; k < 8; ++k) {
        const uint8_t* plane = planes + (8 * byte + k) * kPlaneBytes;
        square |= static_cast<uint64_t>(plane[first / 8]) << (8 * k);
      }
      square = transpose_bits(square);
      for (int t = first; t < std::min(first + 8, n_tokens); ++t, square >>= 8) {
        rows[t * row_stride + byte] = static_cast<uint8_t>(square);
      }
    }
  }
}

void rows_to_planes(const uint8_t* rows, int64_t row_stride, int m, int n_tokens, uint8_t* planes) {
  for (int byte = 0; byte < m / 8; ++byte) {
    for (int first = 0; first < n_tokens; first += 8) {
      uint64_t square = 0;
      for (int t = first; t < std::min(first + 8, n_tokens); ++t) {
        square |= static_cast<uint64_t>(rows[t * row_stride + byte]) << (8 * (t - first));
      }
      square = transpose_bits(square);
      for (int k = 0; k < 8; ++k, square >>= 8) {
        planes[(8 * byte + k) * kPlaneBytes + first / 8] = static_cast<uint8_t>(square);
      }
    }
  }
}

}  // namespace veloxquant::rabitq
