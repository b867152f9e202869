// The inner loops of pair_codes.h, compiled once per SIMD level.
//
// A vector holds pairs [row 0][row 0][row 1][row 1]..., the two dimensions of a code for each query
// row: 4 rows are 8 floats. Tables are [n_values][2]; a code's pair is copied to all of a vector.
#pragma once

#include <cstdint>

#include "src/codecs/lookup/byte_kernels.h"

namespace veloxquant::lookup {

// digits [2][n] -> the table of bytes of two such digits, [n * n][2]; n a multiple of 4.
void pair_digits(const float* digits, int n, float* table);

constexpr int kPairRows = 4;  // query rows of a panel
constexpr int kPairLanes = 2 * kPairRows;

// tokens [64 * blocks.n][8] = sum over m of q[m] * pair of the code; q [n_codes][8]. The table of m
// starts at tables + m * table_stride (floats), or that of its part where the stride is 0: then
// parts are codes_a_part codes and n_values * 2 floats apart.
struct PairTables {
  const float* data = nullptr;
  int64_t stride = 0;  // 0: one for all codes of a part
  int codes_a_part = 0;
};
void score_pairs(const Blocks& blocks, const PairTables& tables, const float* q, float* tokens);
// sums [n_codes][8] += weight * pair of the code; tokens: weights, each twice, [64 * blocks.n][8].
void add_pairs(const Blocks& blocks, const PairTables& tables, const float* tokens, float* sums);

// In place: [n][8] -> [n][4], the two dimensions added up; n a multiple of 2.
void fold_pairs(int n, float* tokens);
// In place: [n][4] -> [n][8], every weight twice.
void double_pairs(int n, float* tokens);

}  // namespace veloxquant::lookup
