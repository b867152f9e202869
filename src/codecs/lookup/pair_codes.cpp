#include "src/codecs/lookup/pair_codes.h"

#include <algorithm>

#include "src/codecs/lookup/chunks.h"
#include "src/codecs/lookup/pair_kernels.h"

namespace veloxquant::lookup {
namespace {

// Tokens of a chunk (16 KB) and the tables of eight codes (16 KB) fit the L1 cache together.
constexpr int kChunkBlocks = 8;

int n_panels(int n_rows) { return (n_rows + kPairRows - 1) / kPairRows; }

// The tables of all codes, a pair for each value of the byte.
class Tables {
 public:
  explicit Tables(const ByteCodes& codes) {
    const int64_t size = 2 * int64_t{codes.n_values()};
    const int step = codes.shared_table ? codes.codes_a_part() : 1;
    data_ = take_buffer(codes.n_codes / step * size);
    Buffer digits = take_buffer(int64_t{codes.n_digits} * codes.digit_values() *
                                std::max(1, codes.digit_dim()));
    float* to = data_.get();
    for (int m = 0; m < codes.n_codes; m += step, to += size) {
      if (codes.n_digits == 1) {
        codes.table(m, to);
        continue;
      }
      codes.table(m, digits.get());  // two digits of one dimension each
      pair_digits(digits.get(), codes.digit_values(), to);
    }
    view_.data = data_.get();
    view_.stride = codes.shared_table ? 0 : size;
    view_.codes_a_part = codes.codes_a_part();
  }
  const PairTables& view() const { return view_; }

 private:
  Buffer data_;
  PairTables view_;
};

class PairScores final : public CodeScores {
 public:
  PairScores(const ByteCodes& codes, const float* q, int n_rows)
      : codes_(codes), n_rows_(n_rows), tables_(codes) {
    const int dim = codes.head_dim();
    q_ = take_buffer(int64_t{n_panels(n_rows)} * codes.n_codes * kPairLanes);
    float* to = q_.get();
    for (int first = 0; first < n_rows; first += kPairRows) {
      for (int m = 0; m < codes.n_codes; ++m) {
        for (int lane = 0; lane < kPairLanes; ++lane, ++to) {
          const int row = first + lane / 2;
          *to = row < n_rows ? q[int64_t{row} * dim + codes.first_dim(m) + lane % 2] : 0.0f;
        }
      }
    }
  }

  void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const override {
    Buffer tokens = take_buffer(int64_t{kChunkBlocks} * kBlockTokens * kPairLanes);
    for_each_chunk(codes_, blocks, n_blocks, kChunkBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     const int n = chunk.n * kBlockTokens;
                     const float* q = q_.get();
                     for (int first = 0; first < n_rows_; first += kPairRows) {
                       score_pairs(chunk, tables_.view(), q, tokens.get());
                       fold_pairs(n, tokens.get());
                       tokens_to_rows(tokens.get(), kPairRows, n, factors,
                                      std::min(kPairRows, n_rows_ - first),
                                      scores + first * stride + token, stride);
                       q += codes_.n_codes * kPairLanes;
                     }
                   });
  }

 private:
  ByteCodes codes_;
  int n_rows_;
  Tables tables_;
  Buffer q_;  // [panels][n_codes][8]
};

class PairSums final : public CodeSums {
 public:
  PairSums(const ByteCodes& codes, int n_rows) : codes_(codes), n_rows_(n_rows), tables_(codes) {
    sums_ = take_buffer(sums_size());
    clear();
  }

  void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) override {
    Buffer tokens = take_buffer(int64_t{kChunkBlocks} * kBlockTokens * kPairLanes);
    for_each_chunk(codes_, blocks, n_blocks, kChunkBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     const int n = chunk.n * kBlockTokens;
                     float* sums = sums_.get();
                     for (int first = 0; first < n_rows_; first += kPairRows) {
                       rows_to_tokens(weights + first * stride + token, stride,
                                      std::min(kPairRows, n_rows_ - first), n, factors, kPairRows,
                                      tokens.get());
                       double_pairs(n, tokens.get());
                       add_pairs(chunk, tables_.view(), tokens.get(), sums);
                       sums += codes_.n_codes * kPairLanes;
                     }
                   });
  }

  void take(float* y, int64_t y_stride) override {
    const int a_part = codes_.codes_a_part();
    for (int row = 0; row < n_rows_; ++row) {
      const float* sums = sums_.get() + int64_t{row / kPairRows} * codes_.n_codes * kPairLanes +
                          row % kPairRows * 2;
      float* to = y + row * y_stride;
      for (int m = 0; m < codes_.n_codes; ++m) {
        float* pair = to + codes_.first_dim(m);
        for (int d = 0; d < 2; ++d) {
          const float sum = sums[m * kPairLanes + d];
          pair[d] = m < a_part ? sum : pair[d] + sum;
        }
      }
    }
    clear();
  }

 private:
  int64_t sums_size() const { return int64_t{n_panels(n_rows_)} * codes_.n_codes * kPairLanes; }
  void clear() { std::fill(sums_.get(), sums_.get() + sums_size(), 0.0f); }

  ByteCodes codes_;
  int n_rows_;
  Tables tables_;
  Buffer sums_;  // [panels][n_codes][8]
};

}  // namespace

std::unique_ptr<const CodeScores> pair_code_scores(const ByteCodes& codes, const float* q,
                                                   int n_rows) {
  return std::make_unique<PairScores>(codes, q, n_rows);
}

std::unique_ptr<CodeSums> pair_code_sums(const ByteCodes& codes, int n_rows) {
  return std::make_unique<PairSums>(codes, n_rows);
}

}  // namespace veloxquant::lookup
