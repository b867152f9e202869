// Attention on codes of one byte, for every codec whose block is rows of 64 such codes: a code
// stands for one of 256 vectors of `sub_dim` dimensions. Exact in fp32.
//
// Keys    for each code the scores it adds to are looked up, those of up to 8 query rows side by
//         side in one entry: one load and one addition a code, however many rows.
// Values  the weights of all tokens with the same code are added up first, 256 sums for each code
//         of a token (rows side by side again), and multiplied by the vectors once at the end.
//
// No code is ever replaced by its vector. README.md has the costs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "veloxquant/codec.h"

namespace veloxquant::lookup {

class KeptTables;  // plane_codes.h

struct ByteCodes {
  int n_codes = 0;  // per token
  int sub_dim = 0;  // code m stands for dimensions [first_dim(m), first_dim(m) + sub_dim)
  int64_t block_bytes = 0;

  // What stands for all dimensions, n_parts times over, is added up: the stages of a residual
  // quantiser, one after the other.
  int n_parts = 1;
  int codes_a_part() const { return n_codes / n_parts; }
  int first_dim(int m) const { return m % codes_a_part() * sub_dim; }
  int head_dim() const { return codes_a_part() * sub_dim; }

  // A byte holds n_digits codes of digit_bits each, the first in the low bits, each of them for its
  // sub_dim / n_digits dimensions: two sub-vectors of 4 bits, eight signs.
  int n_digits = 1;
  int digit_bits = 8;
  int digit_values() const { return 1 << digit_bits; }
  int digit_dim() const { return sub_dim / n_digits; }
  int n_values() const { return 1 << (n_digits * digit_bits); }

  // table(m, to): what the digits of m stand for, fp32 [n_digits][digit_values][digit_dim].
  std::function<void(int m, float* to)> table;
  bool shared_table = false;   // the same for every m of a part
  bool fp16_tables = false;    // fp16 holds them exactly
  KeptTables* kept = nullptr;  // of the codec, if these tables do not change

  // rows(block, to): the bytes, [n_codes][64]. Empty: the block starts with them.
  std::function<void(const uint8_t* block, uint8_t* to)> rows;

  // factors(block, to): a factor of each token's vector, fp32 [64]. Empty: 1.
  std::function<void(const uint8_t* block, float* to)> factors;
};

// The name of the kernel that runs on one side's codes; empty where the SIMD level has no vectors
// of four floats, then the other two must not be called.
std::string byte_code_kernel(const ByteCodes& codes, Side side);
std::unique_ptr<const CodeScores> byte_code_scores(const ByteCodes& codes, const float* q,
                                                   int n_rows);
std::unique_ptr<CodeSums> byte_code_sums(const ByteCodes& codes, int n_rows);

}  // namespace veloxquant::lookup
