// What a backend implements for the scalar codecs. `reference` is the executable specification,
// `cpu` the Highway kernels; both give the same bits.
#pragma once

#include <vector>

#include "src/codecs/turboquant/format.h"
#include "src/codecs/turboquant/math.h"
#include "veloxquant/turboquant.h"

namespace veloxquant::turboquant {

// How a row becomes codes: raw pointers, no ownership.
struct RowEncoder {
  int dim = 0;
  const float* signs = nullptr;  // of the rotation, [2][dim]; null: no rotation
  int n_stages = 1;
  ScalarQuantizer stage[kMaxPlanes];
  ScalarScale scale = ScalarScale::norm_corrected;
};

// x: fp32 [n][dim] finite. codes: one byte each, stage s of row r at codes + s * stage_stride +
// r * dim. scalars: [n] fp16. units: [n][dim] or null: u minus the levels of all stages.
using EncodeRows = void (*)(const RowEncoder& encoder, const float* x, int64_t n, uint8_t* codes,
                            int64_t stage_stride, uint16_t* scalars, float* left);

// n codes (a multiple of 8), one byte each, to n * bits / 8 bytes; bits 1..4 or 8.
using PackCodes = void (*)(const uint8_t* codes, int64_t n, int bits, uint8_t* packed);
using UnpackCodes = void (*)(const uint8_t* packed, int64_t n, int bits, uint8_t* codes);

// codes [rows][columns] -> [columns][rows]
using TransposeCodes = void (*)(const uint8_t* codes, int rows, int columns, uint8_t* out);

// Two code planes of `rows` rows (plane 1 may have 0 bits) to
//   y[r][c] = scalar * (level0 + level1),  scalar: fp16 of the row (by_row) or of the column.
// columns: a multiple of 8.
struct DecodeRowsArgs {
  const uint8_t* plane[kMaxPlanes];
  const ScalarQuantizer* quantizer[kMaxPlanes];  // null: no such plane
  int rows = 0, columns = 0;
  const uint16_t* scalars = nullptr;
  bool by_row = false;
};
using DecodeRows = void (*)(const DecodeRowsArgs& args, float* y, int64_t y_stride);

// out[j] = sum_i x[i] * matrix[i][j], ascending i, for j < dim.
using RowTimesMatrix = void (*)(const float* x, const float* matrix, int dim, float* out);

struct Kernels {
  EncodeRows encode_rows;
  PackCodes pack_codes;
  UnpackCodes unpack_codes;
  TransposeCodes transpose_codes;
  DecodeRows decode_rows;
  RowTimesMatrix row_times_matrix;
};

const Kernels& reference_kernels();
const Kernels& cpu_kernels();
inline const Kernels& kernels_of(Backend backend) {
  return backend == Backend::reference ? reference_kernels() : cpu_kernels();
}

}  // namespace veloxquant::turboquant
