#include "src/codecs/lookup/byte_codes.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "src/codecs/lookup/chunks.h"
#include "src/codecs/lookup/pair_codes.h"
#include "src/codecs/lookup/plane_codes.h"

namespace veloxquant::lookup {
namespace {

// Tokens of a chunk and the entries of four rows of codes fit the L1 cache together.
constexpr int kChunkBlocks = 16;

// Query rows [first, first + n_rows) of a panel of `width`.
struct Panel {
  int first, n_rows, width;
};

std::vector<Panel> cut_panels(int n_rows) {
  const int widest = widest_panel();
  std::vector<Panel> panels;
  for (int first = 0; widest > 0 && first < n_rows;) {
    const int width = n_rows - first > 4 ? widest : 4;
    panels.push_back({first, std::min(width, n_rows - first), width});
    first += width;
  }
  return panels;
}

// The table of one m at a time, in ascending order.
class Table {
 public:
  explicit Table(const ByteCodes& codes)
      : codes_(codes), data_(take_buffer(int64_t{codes.digit_values()} * codes.sub_dim)) {}

  const float* of(int m) {
    if (!codes_.shared_table || m % codes_.codes_a_part() == 0) codes_.table(m, data_.get());
    return data_.get();
  }

 private:
  const ByteCodes& codes_;
  Buffer data_;
};

int64_t table_size(const ByteCodes& codes, int width) {
  return int64_t{codes.n_codes} * codes.n_values() * width;
}

class ByteCodeScores final : public CodeScores {
 public:
  ByteCodeScores(const ByteCodes& codes, const float* q, int n_rows)
      : codes_(codes), panels_(cut_panels(n_rows)) {
    const int head_dim = codes.head_dim();
    Table table(codes_);
    for (const Panel& panel : panels_) {
      entries_.push_back(take_buffer(table_size(codes_, panel.width)));
    }
    Buffer digit = take_buffer(int64_t{codes.digit_values()} * widest_panel());
    Buffer q_part = take_buffer(int64_t{codes.sub_dim} * widest_panel());
    for (int m = 0; m < codes.n_codes; ++m) {
      const float* vectors = table.of(m);
      for (size_t i = 0; i < panels_.size(); ++i) {
        const auto [first, n, width] = panels_[i];
        std::fill(q_part.get(), q_part.get() + codes.sub_dim * width, 0.0f);
        for (int d = 0; d < codes.sub_dim; ++d) {
          for (int r = 0; r < n; ++r) {
            q_part[d * width + r] = q[int64_t{first + r} * head_dim + codes.first_dim(m) + d];
          }
        }
        make_all_entries(vectors, q_part.get(), width, digit.get(),
                         entries_[i].get() + int64_t{m} * codes_.n_values() * width);
      }
    }
  }

  void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const override {
    const int chunk_tokens = std::min(n_blocks, kChunkBlocks) * kBlockTokens;
    Buffer tokens = take_buffer(int64_t{chunk_tokens} * panels_[0].width);
    for_each_chunk(codes_, blocks, n_blocks, kChunkBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     for (size_t i = 0; i < panels_.size(); ++i) {
                       const auto [first, n, width] = panels_[i];
                       look_up(chunk, entries_[i].get(), width, tokens.get());
                       tokens_to_rows(tokens.get(), width, chunk.n * kBlockTokens, factors, n,
                                      scores + first * stride + token, stride);
                     }
                   });
  }

 private:
  void make_all_entries(const float* vectors, const float* q, int width, float* digit,
                        float* entries) const {
    const int n = codes_.digit_values(), dim = codes_.digit_dim();
    make_entries(vectors, n, dim, q, width, entries);
    for (int i = 1, n_low = n; i < codes_.n_digits; ++i, n_low *= n) {
      make_entries(vectors + i * n * dim, n, dim, q + i * dim * width, width, digit);
      add_digit(entries, n_low, digit, n, width);
    }
  }

  ByteCodes codes_;
  std::vector<Panel> panels_;
  std::vector<Buffer> entries_;  // per panel [n_codes][n_values][width]
};

class ByteCodeSums final : public CodeSums {
 public:
  ByteCodeSums(const ByteCodes& codes, int n_rows) : codes_(codes), panels_(cut_panels(n_rows)) {
    for (const Panel& panel : panels_)
      sums_.push_back(take_buffer(table_size(codes_, panel.width)));
  }

  void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) override {
    clear_once();
    const int chunk_tokens = std::min(n_blocks, kChunkBlocks) * kBlockTokens;
    Buffer tokens = take_buffer(int64_t{chunk_tokens} * panels_[0].width);
    for_each_chunk(codes_, blocks, n_blocks, kChunkBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     for (size_t i = 0; i < panels_.size(); ++i) {
                       const auto [first, n, width] = panels_[i];
                       rows_to_tokens(weights + first * stride + token, stride, n,
                                      chunk.n * kBlockTokens, factors, width, tokens.get());
                       add_up(chunk, tokens.get(), width, sums_[i].get());
                     }
                   });
  }

  void take(float* y, int64_t y_stride) override {
    clear_once();  // nothing was added
    Table table(codes_);
    Buffer digit = take_buffer(int64_t{codes_.digit_values()} * panels_[0].width);
    Buffer out = take_buffer(int64_t{codes_.sub_dim} * panels_[0].width);
    for (int m = 0; m < codes_.n_codes; ++m) {
      const float* vectors = table.of(m);
      for (size_t i = 0; i < panels_.size(); ++i) {
        const auto [first, n, width] = panels_[i];
        finish_all_sums(vectors, width, digit.get(),
                        sums_[i].get() + int64_t{m} * codes_.n_values() * width, out.get());
        for (int r = 0; r < n; ++r) {
          float* to = y + int64_t{first + r} * y_stride + codes_.first_dim(m);
          for (int d = 0; d < codes_.sub_dim; ++d) {
            to[d] = m < codes_.codes_a_part() ? out[d * width + r] : to[d] + out[d * width + r];
          }
        }
      }
    }
    is_clear_ = false;
  }

 private:
  void clear_once() {
    if (is_clear_) return;
    for (size_t i = 0; i < panels_.size(); ++i) {
      float* sums = sums_[i].get();
      std::fill(sums, sums + table_size(codes_, panels_[i].width), 0.0f);
    }
    is_clear_ = true;
  }

  void finish_all_sums(const float* vectors, int width, float* digit, float* sums,
                       float* out) const {
    const int n = codes_.digit_values(), dim = codes_.digit_dim();
    for (int i = codes_.n_digits - 1, n_low = codes_.n_values() / n; i > 0; --i, n_low /= n) {
      split_digit(sums, n_low, digit, n, width);
      finish_sums(vectors + i * n * dim, n, dim, digit, width, out + i * dim * width);
    }
    finish_sums(vectors, n, dim, sums, width, out);
  }

  ByteCodes codes_;
  std::vector<Panel> panels_;
  bool is_clear_ = false;
  std::vector<Buffer> sums_;  // per panel [n_codes][n_values][width]
};

std::unique_ptr<const CodeScores> scores_in_memory(const ByteCodes& codes, const float* q,
                                                   int n_rows) {
  if (codes.sub_dim == 2) return pair_code_scores(codes, q, n_rows);
  return std::make_unique<ByteCodeScores>(codes, q, n_rows);
}

}  // namespace

std::string byte_code_kernel(const ByteCodes& codes, Side side) {
  if (widest_panel() == 0) return {};
  return looks_up_planes(codes, side) ? "register look-ups" : "byte look-ups";
}

std::unique_ptr<const CodeScores> byte_code_scores(const ByteCodes& codes, const float* q,
                                                   int n_rows) {
  if (auto scores = plane_code_scores(codes, q, n_rows, scores_in_memory)) return scores;
  return scores_in_memory(codes, q, n_rows);
}

std::unique_ptr<CodeSums> byte_code_sums(const ByteCodes& codes, int n_rows) {
  if (auto sums = plane_code_sums(codes, n_rows)) return sums;
  if (codes.sub_dim == 2) return pair_code_sums(codes, n_rows);
  return std::make_unique<ByteCodeSums>(codes, n_rows);
}

}  // namespace veloxquant::lookup
