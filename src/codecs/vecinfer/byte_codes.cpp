#include "src/codecs/vecinfer/byte_codes.h"

#include "src/backends/cpu/convert.h"
#include "src/codecs/lookup/stream_kernels.h"

namespace veloxquant::vecinfer {
namespace {

constexpr int kHalf = kBlockTokens / 2, kQuarter = kBlockTokens / 4;

// The vectors of one table, fp32 [n_values][sub_dim]; codes beyond the last centroid as decode
// clamps them.
void widen_table(const HeadTables& head, int m, int n_values, float* to) {
  const int n = head.n_centroids * head.sub_dim;
  cpu::to_float(DType::float16, head.table(m), n, to);
  for (int i = n; i < n_values * head.sub_dim; ++i) to[i] = to[i - head.sub_dim];
}

void expand_halves(const uint8_t* row, uint8_t* to) {
  for (int t = 0; t < kHalf; ++t) {
    to[t] = row[t] & 15;
    to[t + kHalf] = row[t] >> 4;
  }
}

void expand_six_bits(const uint8_t* row, uint8_t* to) {
  expand_halves(row, to);
  const uint8_t* high = row + kHalf;
  for (int k = 0; k < 4; ++k) {
    for (int t = 0; t < kQuarter; ++t) {
      to[t + kQuarter * k] |= static_cast<uint8_t>(((high[t] >> (2 * k)) & 3) << 4);
    }
  }
}

}  // namespace

lookup::ByteCodes byte_codes(const HeadTables& head) {
  const int64_t bytes = row_bytes(head.bits);
  const bool in_pairs = head.bits == 4 && head.n_subvectors % 2 == 0;
  lookup::ByteCodes codes;
  codes.n_digits = in_pairs ? 2 : 1;
  codes.digit_bits = head.bits;
  codes.n_codes = head.n_subvectors / codes.n_digits;
  codes.sub_dim = head.sub_dim * codes.n_digits;
  codes.block_bytes = head.n_subvectors * bytes;
  codes.shared_table = head.table_stride == 0;
  codes.fp16_tables = true;
  codes.table = [head, n = codes.n_digits](int m, float* to) {
    const int n_values = 1 << head.bits;
    for (int i = 0; i < n; ++i) {
      widen_table(head, n * m + i, n_values, to + i * n_values * head.sub_dim);
    }
  };
  if (in_pairs) {
    codes.rows = [n = codes.n_codes](const uint8_t* block, uint8_t* to) {
      lookup::join_folded(block, n, to);  // two rows as one, the first in the low bits
    };
  } else if (head.bits < 8) {
    codes.rows = [head, bytes](const uint8_t* block, uint8_t* to) {
      for (int m = 0; m < head.n_subvectors; ++m, block += bytes, to += kBlockTokens) {
        head.bits == 4 ? expand_halves(block, to) : expand_six_bits(block, to);
      }
    };
  }
  return codes;
}

}  // namespace veloxquant::vecinfer
