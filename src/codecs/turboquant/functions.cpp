// The row functions of scalar_quant.h: 64 rows at a time through the kernels of the codec.
#include <algorithm>
#include <cstring>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/codecs/rotation.h"
#include "src/codecs/turboquant/kernels.h"
#include "src/codecs/turboquant/nearest.h"
#include "src/math/finite.h"
#include "veloxquant/scalar_quant.h"
#include "veloxquant/vecinfer.h"
#include "veloxquant/words.h"

namespace veloxquant {
namespace {

using turboquant::kernels_of;

constexpr int64_t kRows = 64;
constexpr int64_t kValues = 8192;  // of a task of the element-wise functions

turboquant::RowEncoder encoder_of(const ScalarQuantParams& params, const Rotation& rotation) {
  require(params.bits >= 1 && params.bits <= kMaxScalarBits, "[scalar_quantize] bits: got ",
          params.bits, ", wanted 1 to ", kMaxScalarBits);
  turboquant::RowEncoder encoder;
  encoder.dim = params.dim;
  encoder.signs = params.rotate ? rotation.signs() : nullptr;
  encoder.scale = params.scale;
  encoder.stage[0] = scalar_quantizer(lloyd_max_levels(params.dim, params.bits), params.bits);
  return encoder;
}

const uint8_t* offset(const void* x, DType dtype, int64_t n) {
  return static_cast<const uint8_t*>(x) + n * dtype_bytes(dtype);
}

// Sums of integers, which every compiler vectorises: the carry of an exponent of all ones, which
// is what infinities and NaN have, sets the top bit.
bool all_finite(const float* x, int64_t n) {
  uint32_t carries = 0;
  for (int64_t i = 0; i < n; ++i) carries |= (bits_of(x[i]) & 0x7f800000u) + 0x00800000u;
  return carries < 0x80000000u;
}

void make_finite(float* x, int64_t n) {
  if (all_finite(x, n)) return;
  for (int64_t i = 0; i < n; ++i) x[i] = finite_or_clamped(x[i]);
}

}  // namespace

void scalar_quantize(Backend backend, const ScalarQuantParams& params, DType dtype, const void* x,
                     int64_t n, uint32_t* words, uint16_t* scalars) {
  const Rotation rotation(params.dim, params.seed);
  const turboquant::RowEncoder encoder = encoder_of(params, rotation);
  const int dim = params.dim;
  const int64_t row_words = words_per_row(dim, params.bits);
  parallel_ranges(n, kRows, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<float> rows(count * dim);
    std::vector<uint8_t> codes(count * dim);
    cpu::to_float(dtype, offset(x, dtype, begin * dim), count * dim, rows.data());
    make_finite(rows.data(), count * dim);
    kernels_of(backend).encode_rows(encoder, rows.data(), count, codes.data(), 0, scalars + begin,
                                    nullptr);
    pack_words(backend, codes.data(), count, dim, params.bits, words + begin * row_words);
  });
}

void scalar_dequantize(Backend backend, const ScalarQuantParams& params, const uint32_t* words,
                       const uint16_t* scalars, int64_t n, DType dtype, void* x) {
  const Rotation rotation(params.dim, params.seed);
  const turboquant::RowEncoder encoder = encoder_of(params, rotation);
  const int dim = params.dim, padded = (dim + 7) / 8 * 8;
  const int64_t row_words = words_per_row(dim, params.bits);
  const turboquant::Kernels& kernels = kernels_of(backend);
  parallel_ranges(n, kRows, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<uint8_t> codes(count * padded), packed(count * padded);
    std::vector<float> padded_rows(count * padded), rows;
    unpack_words(backend, words + begin * row_words, count, row_words, dim, params.bits,
                 codes.data());
    for (int64_t r = count - 1; padded != dim && r >= 0; --r) {
      std::memmove(&codes[r * padded], &codes[r * dim], dim);
      std::memset(&codes[r * padded + dim], 0, padded - dim);
    }
    kernels.pack_codes(codes.data(), count * padded, params.bits, packed.data());
    turboquant::DecodeRowsArgs args{};
    args.plane[0] = packed.data();
    args.quantizer[0] = &encoder.stage[0];
    args.rows = static_cast<int>(count);
    args.columns = padded;
    args.scalars = scalars + begin;
    args.by_row = true;
    kernels.decode_rows(args, padded_rows.data(), padded);
    for (int64_t r = 1; padded != dim && r < count; ++r) {
      std::memmove(&padded_rows[r * dim], &padded_rows[r * padded], sizeof(float) * dim);
    }
    if (params.rotate) rotation.inverse(backend, padded_rows.data(), count);
    uint8_t* out = static_cast<uint8_t*>(x) + begin * dim * dtype_bytes(dtype);
    if (dtype == DType::float32) {
      std::memcpy(out, padded_rows.data(), sizeof(float) * count * dim);
    } else {
      cpu::to_finite_16bit(dtype, padded_rows.data(), count * dim,
                           reinterpret_cast<uint16_t*>(out));
    }
  });
}

namespace {

// nearest_centroids, with codes of one byte.
void nearest_directly(Backend backend, const float* values, int64_t n, const float* centroids,
                      int n_centroids, uint8_t* codes) {
  std::vector<uint16_t> nearest(n);
  nearest_centroids(backend, values, n, n, centroids, n_centroids, 1, nearest.data(), nullptr);
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(nearest[i]);
}

// body(floats, begin, count) for pieces of [0, n) of x as floats: x itself where it is float32.
template <class Body>
void for_floats(DType dtype, const void* x, int64_t n, int64_t step, int64_t row,
                const Body& body) {
  parallel_ranges(n, step, [&](int64_t begin, int64_t end) {
    const int64_t count = (end - begin) * row;
    if (dtype == DType::float32) {
      return body(static_cast<const float*>(x) + begin * row, begin, end - begin);
    }
    std::vector<float> values(count);
    cpu::to_float(dtype, offset(x, dtype, begin * row), count, values.data());
    body(values.data(), begin, end - begin);
  });
}

}  // namespace

void nearest_scalar(Backend backend, DType dtype, const void* x, int64_t n, const float* centroids,
                    int n_centroids, uint8_t* codes) {
  turboquant::ScalarSteps steps;
  const bool stepwise =
      backend == Backend::cpu && turboquant::find_steps(centroids, n_centroids, steps);
  for_floats(dtype, x, n, kValues, 1, [&](const float* values, int64_t begin, int64_t count) {
    if (stepwise) return turboquant::nearest_by_steps(steps, values, count, codes + begin);
    nearest_directly(backend, values, count, centroids, n_centroids, codes + begin);
  });
}

void nearest_scalar_of_hadamard(Backend backend, DType dtype, const void* x, int64_t n_rows,
                                int dim, const float* diag, const float* centroids, int n_centroids,
                                uint8_t* codes) {
  turboquant::ScalarSteps steps;
  const bool stepwise =
      backend == Backend::cpu && turboquant::find_steps(centroids, n_centroids, steps);
  for_floats(dtype, x, n_rows, kRows, dim, [&](const float* rows, int64_t begin, int64_t count) {
    if (stepwise) {
      return turboquant::nearest_of_hadamard_by_steps(steps, rows, count, dim, diag,
                                                      codes + begin * dim);
    }
    std::vector<float> rotated(rows, rows + count * dim);
    for (int64_t r = 0; r < count; ++r) {
      for (int d = 0; d < dim; ++d) rotated[r * dim + d] = mul(rotated[r * dim + d], diag[d]);
    }
    hadamard_rows(backend, dim, rotated.data(), count);
    nearest_directly(backend, rotated.data(), count * dim, centroids, n_centroids,
                     codes + begin * dim);
  });
}

void scalar_centroids(const uint8_t* codes, int64_t n, const float* centroids, int n_centroids,
                      uint16_t* values) {
  uint16_t table[256];
  for (int c = 0; c < 256; ++c) table[c] = f32_to_f16(centroids[std::min(c, n_centroids - 1)]);
  parallel_ranges(n, 8 * kValues, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = table[codes[i]];
  });
}

}  // namespace veloxquant
