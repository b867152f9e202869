// The inner loops of byte_codes.h, compiled once per SIMD level.
//
// Query rows go in panels of `width` = 4 or 8 rows, a vector; missing rows are 0. An entry is the
// `width` floats of one code, a token the `width` floats of one token. Tables: [n_values][sub_dim].
#pragma once

#include <cstdint>

namespace veloxquant::lookup {

struct Blocks {
  const uint8_t* data = nullptr;
  int64_t stride = 0;  // bytes from one block to the next
  int n = 0;
  int n_codes = 0;  // rows of 64 codes, each below n_values
  int n_values = 0;
};

int widest_panel();  // 4 or 8; 0 where there is no kernel

// entries [n_values][width] = table . q, q [sub_dim][width]
void make_entries(const float* table, int n_values, int sub_dim, const float* q, int width,
                  float* entries);
// tokens [64 * n][width] = sum over m of entries[m][code]; entries [n_codes][n_values][width]
void look_up(const Blocks& blocks, const float* entries, int width, float* tokens);
// sums[m][code] += token; sums [n_codes][n_values][width]
void add_up(const Blocks& blocks, const float* tokens, int width, float* sums);
// out [sub_dim][width] = sum over codes of table x sums; sums [n_values][width]
void finish_sums(const float* table, int n_values, int sub_dim, float* sums, int width, float* out);

// Digits of a byte. entries [n_low][width] of the digits so far become [n_low * n_digit][width]
// with one more on top; and back: its sums [n_digit][width], and those of the digits below in
// place.
void add_digit(float* entries, int n_low, const float* digit, int n_digit, int width);
void split_digit(float* sums, int n_low, float* digit, int n_digit, int width);

// Bit planes [n_rows][n_planes][8 bytes] -> rows [n_rows][64]: bit t of plane p is bit p of token
// t.
void spread_planes(const uint8_t* planes, int n_rows, int n_planes, uint8_t* rows);

// tokens [n][width] <-> rows [n_rows][stride], n a multiple of 4. factors [n] or null.
void tokens_to_rows(const float* tokens, int width, int n, const float* factors, int n_rows,
                    float* rows, int64_t stride);
void rows_to_tokens(const float* rows, int64_t stride, int n_rows, int n, const float* factors,
                    int width, float* tokens);

}  // namespace veloxquant::lookup
