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
  int n_codes = 0;   // rows of 64 codes, each below n_values
  int n_values = 0;  // a multiple of 4
};

int widest_panel();  // 4 or 8; 0 where there is no kernel

// entries [n_values][width] = table . q, q [sub_dim][width]
void make_entries(const float* table, int n_values, int sub_dim, const float* q, int width,
                  float* entries);
// tokens [64 * n][width] = sum over m of entries[m][code]; entries [n_codes][n_values][width]
void look_up(const Blocks& blocks, const float* entries, int width, float* tokens);
// sums[m][code] += token; sums [n_codes][n_values][width]
void add_up(const Blocks& blocks, const float* tokens, int width, float* sums);
// out [sub_dim][width] = sum over codes of table x sums; sums [n_values][width], 0 afterwards
void finish_sums(const float* table, int n_values, int sub_dim, float* sums, int width, float* out);

// tokens [n][width] <-> rows [n_rows][stride], n a multiple of 4. factors [n] or null.
void tokens_to_rows(const float* tokens, int width, int n, const float* factors, int n_rows,
                    float* rows, int64_t stride);
void rows_to_tokens(const float* rows, int64_t stride, int n_rows, int n, const float* factors,
                    int width, float* tokens);

}  // namespace veloxquant::lookup
