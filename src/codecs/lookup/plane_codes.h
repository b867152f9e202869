// Attention on codes by look-ups in registers: tables as two planes of bytes, 16 bits together.
//
// Keys    an entry is the product of a query row with a code's vector, rounded to 14 bits of the
//         largest; two planes of 7 bits are looked up, and summed up as integers.
// Values  a dimension of 14 bits is looked up for every token and multiplied with the token's
//         weight of 12 to 15 bits, by integer products of two neighbours.
//
// A look-up costs a permutation or two for as many tokens as a register has bytes, where a load
// gives one token's: with 16 values a table on every SIMD level, with 256 on AVX-512 VBMI alone.
// Rounding moves a score by at most kMostScoreError (standard deviation), which moves an output row
// by 6e-4 of itself; what would be off by more, large queries or tokens of large factors, is looked
// up in fp32. VELOXQUANT_LOOKUPS=memory turns all of it off.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "src/codecs/lookup/byte_codes.h"

namespace veloxquant::lookup {

// fast: where tables fit registers; always: tables of 256 as well where that is slow, for tests.
enum class PlaneUse { never, fast, always };
// Instead of the environment's choice; not while attention runs.
void set_plane_use(PlaneUse use);

// What these look-ups make of the tables of one side and head: as large as fp16 tables. A codec
// whose tables do not change keeps it (ByteCodes::kept), else it is made for every call. Made at
// first use, by any thread.
class KeptTables {
 public:
  struct Keys;
  struct Values;
  KeptTables();
  ~KeptTables();
  const Keys& keys(const ByteCodes& codes);
  const Values& values(const ByteCodes& codes);
  int64_t nbytes() const { return nbytes_; }

 private:
  std::once_flag once_;  // a head has one side
  std::atomic<int64_t> nbytes_{0};
  std::unique_ptr<Keys> keys_;
  std::unique_ptr<Values> values_;
};

// Whether look-ups of these codes are made in registers, but for what is not exact enough.
bool looks_up_planes(const ByteCodes& codes, Side side);

constexpr float kMostScoreError = 8.6e-4f;  // of a score to base 2

// Null where such look-ups are off, not possible, slower or, of keys, not exact enough.
// q as in code_scores: a score is the logarithm of a weight, to base 2. exact: makes the scores in
// fp32, for tokens that need it.
using MakeScores = std::unique_ptr<const CodeScores> (*)(const ByteCodes& codes, const float* q,
                                                         int n_rows);
std::unique_ptr<const CodeScores> plane_code_scores(const ByteCodes& codes, const float* q,
                                                    int n_rows, MakeScores exact);
std::unique_ptr<CodeSums> plane_code_sums(const ByteCodes& codes, int n_rows);

}  // namespace veloxquant::lookup
