// The scalar codecs as plain loops: the specification of every stored bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/turboquant/kernels.h"
#include "src/math/bitpack.h"
#include "src/math/rotation.h"
#include "src/math/row_sums.h"

namespace veloxquant::turboquant {
namespace {

void encode_rows(const RowEncoder& encoder, const float* x, int64_t n, uint8_t* codes,
                 int64_t stage_stride, uint16_t* scalars, float* left) {
  const int dim = encoder.dim;
  const float root_dim = std::sqrt(static_cast<float>(dim));
  std::vector<float> u(dim), z(dim), scratch(dim);
  for (int64_t r = 0; r < n; ++r) {
    const float* row = x + r * dim;
    const float norm = std::sqrt(dot_row(row, row, dim));
    std::memcpy(u.data(), row, sizeof(float) * dim);
    if (encoder.signs != nullptr) rotate_row(encoder.signs, dim, u.data(), scratch.data());
    const float factor = unit_factor(norm, root_dim);
    for (int d = 0; d < dim; ++d) {
      u[d] = mul(u[d], factor);
      float rest = u[d];
      for (int s = 0; s < encoder.n_stages; ++s) {
        const uint32_t code = scalar_code(encoder.stage[s], rest);
        const float level = scalar_level(encoder.stage[s], code);
        codes[s * stage_stride + r * dim + d] = static_cast<uint8_t>(code);
        z[d] = s == 0 ? level : z[d] + level;
        rest = rest - level;
      }
      if (left != nullptr) left[r * dim + d] = rest;
    }
    switch (encoder.scale) {
      case ScalarScale::norm_corrected:
        scalars[r] = stored_scalar(norm, std::sqrt(dot_row(z.data(), z.data(), dim)));
        break;
      case ScalarScale::raw:
        scalars[r] = stored_scalar(norm, root_dim);
        break;
      case ScalarScale::unbiased:
        scalars[r] = stored_scalar(mul(norm, root_dim), dot_row(u.data(), z.data(), dim));
        break;
    }
  }
}

void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* packed) {
  const std::vector<uint16_t> wide(codes, codes + n);
  pack_bits(wide.data(), n, bits, packed);
}

void unpack_codes(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  std::vector<uint16_t> wide(n);
  unpack_bits(packed, n, bits, wide.data());
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
}

void transpose_codes(const uint8_t* codes, int rows, int columns, uint8_t* out) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) out[c * rows + r] = codes[r * columns + c];
  }
}

void decode_rows(const DecodeRowsArgs& args, float* y, int64_t y_stride) {
  if (args.quantizer[0]->bits == 0) {  // 0, whatever the scalar
    for (int r = 0; r < args.rows; ++r) std::fill_n(y + r * y_stride, args.columns, 0.0f);
    return;
  }
  std::vector<uint16_t> codes(args.columns);
  std::vector<float> sum(args.columns);
  for (int r = 0; r < args.rows; ++r) {
    for (int p = 0; p < kMaxPlanes; ++p) {
      if (args.quantizer[p] == nullptr) continue;
      const ScalarQuantizer& quantizer = *args.quantizer[p];
      unpack_bits(args.plane[p] + int64_t{r} * args.columns * quantizer.bits / 8, args.columns,
                  quantizer.bits, codes.data());
      for (int c = 0; c < args.columns; ++c) {
        const float level = scalar_level(quantizer, codes[c]);
        sum[c] = p == 0 ? level : sum[c] + level;
      }
    }
    for (int c = 0; c < args.columns; ++c) {
      y[r * y_stride + c] = mul(f16_to_f32(args.scalars[args.by_row ? r : c]), sum[c]);
    }
  }
}

void row_times_matrix(const float* x, const float* matrix, int dim, float* out) {
  for (int j = 0; j < dim; ++j) {
    float sum = mul(x[0], matrix[j]);
    for (int i = 1; i < dim; ++i) sum = sum + mul(x[i], matrix[i * dim + j]);
    out[j] = sum;
  }
}

}  // namespace

const Kernels& reference_kernels() {
  static const Kernels kernels{encode_rows,     pack_codes,  unpack_codes,
                               transpose_codes, decode_rows, row_times_matrix};
  return kernels;
}

}  // namespace veloxquant::turboquant
