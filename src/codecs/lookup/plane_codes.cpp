#include "src/codecs/lookup/plane_codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "src/codecs/lookup/chunks.h"
#include "src/codecs/lookup/plane_kernels.h"
#include "veloxquant/error.h"

namespace veloxquant::lookup {
namespace {

// Codes of a chunk of keys and tables of a row (at head_dim 128 and 2 bits 32 and 16 KB) stay in
// the L1 cache, or nearly. Of values the weights of a chunk do (16 KB for 4 rows).
constexpr int kKeyBlocks = 16;
constexpr int kUnits = 2;
int unit_blocks() { return kVectorsAUnit * plane_lanes() / kBlockTokens; }

constexpr int kKeyZero = 1 << 13, kKeyMost = kKeyZero - 1;  // 14 bits, in planes of 7
constexpr int kKeyLowBits = 7, kValueLowBits = 8;
constexpr int kValueMost = (1 << 13) - 1;  // 14 bits

// Rounding the entries moves a score by step * sqrt(digits / 12): this is 6e-4 of a weight.
constexpr float kMostScoreError = 8.6e-4f;

PlaneUse use_of_environment() {
  const char* text = std::getenv("VELOXQUANT_LOOKUPS");
  const std::string use = text == nullptr ? "" : text;
  require(use.empty() || use == "memory" || use == "registers",
          "[environment] VELOXQUANT_LOOKUPS: got '", use, "', wanted 'memory' or 'registers'");
  return use == "registers" ? PlaneUse::fast : PlaneUse::never;
}

std::atomic<PlaneUse>& chosen_use() {
  static std::atomic<PlaneUse> use{use_of_environment()};
  return use;
}

PlaneDigits digits_of(const ByteCodes& codes) { return {codes.digit_bits, codes.n_digits}; }
int table_bytes(const ByteCodes& codes) { return 2 * plane_size(codes.digit_bits); }
int rows_of_panel(int n_rows, int first) { return std::min(kPlaneRows, n_rows - first); }

bool is_used(const ByteCodes& codes) {
  const PlaneUse use = chosen_use();
  if (use == PlaneUse::never || plane_lanes() == 0 || codes.digit_bits < 2) return false;
  if (codes.digit_bits <= 4) return true;
  // Wide tables take whole bytes.
  return codes.n_digits == 1 && (use == PlaneUse::always || has_wide_tables());
}

uint8_t* bytes_of(const Buffer& buffer) { return reinterpret_cast<uint8_t*>(buffer.get()); }
Buffer take_bytes(int64_t n) {
  return take_buffer((n + static_cast<int64_t>(sizeof(float)) - 1) /
                     static_cast<int64_t>(sizeof(float)));
}

class PlaneScores final : public CodeScores {
 public:
  PlaneScores(const ByteCodes& codes, const float* q, int n_rows)
      : codes_(codes), n_rows_(n_rows), n_digits_(codes.n_codes * codes.n_digits) {
    const int n = codes.digit_values();
    Buffer entries = take_buffer(int64_t{n_digits_} * kPlaneRows * n);
    planes_ = take_bytes(int64_t{n_rows} * n_digits_ * table_bytes(codes));
    for (int first = 0; first < n_rows && error_ <= kMostScoreError; first += kPlaneRows) {
      const int rows = rows_of_panel(n_rows, first);
      make_entries_of(q, first, rows, entries.get());
      split(entries.get(), first, rows);
    }
  }

  bool is_exact_enough() const { return error_ <= kMostScoreError; }

  void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const override {
    const int64_t row_bytes = int64_t{n_digits_} * table_bytes(codes_);
    for_each_chunk(codes_, blocks, n_blocks, kKeyBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     for (int r = 0; r < n_rows_; ++r) {
                       score_planes(chunk, digits_of(codes_), bytes_of(planes_) + r * row_bytes,
                                    n_digits_ * kKeyZero, step_[r], factors,
                                    scores + r * stride + token);
                     }
                   });
  }

 private:
  // entries [digits][rows][values]
  void make_entries_of(const float* q, int first, int rows, float* entries) const {
    const int n = codes_.digit_values(), dim = codes_.digit_dim(), all = codes_.head_dim();
    Buffer table = take_buffer(int64_t{codes_.n_digits} * n * dim);
    Buffer by_value = take_buffer(int64_t{n} * kPlaneRows);
    Buffer q_part = take_buffer(int64_t{dim} * kPlaneRows);
    for (int m = 0; m < codes_.n_codes; ++m) {
      if (!codes_.shared_table || m % codes_.codes_a_part() == 0) codes_.table(m, table.get());
      for (int digit = 0; digit < codes_.n_digits; ++digit, entries += rows * n) {
        for (int d = 0; d < dim; ++d) {
          for (int r = 0; r < kPlaneRows; ++r) {
            const int at = codes_.first_dim(m) + digit * dim + d;
            q_part[d * kPlaneRows + r] = r < rows ? q[int64_t{first + r} * all + at] : 0.0f;
          }
        }
        make_entries(table.get() + int64_t{digit} * n * dim, n, dim, q_part.get(), kPlaneRows,
                     by_value.get());
        tokens_to_rows(by_value.get(), kPlaneRows, n, nullptr, rows, entries, n);
      }
    }
  }

  void split(const float* entries, int first, int rows) {
    const int n = codes_.digit_values(), size = plane_size(codes_.digit_bits);
    std::vector<float> most(rows, 0.0f);
    for (int k = 0; k < n_digits_; ++k) {
      for (int r = 0; r < rows; ++r) {
        most[r] = std::max(most[r], largest_magnitude(entries + (int64_t{k} * rows + r) * n, n));
      }
    }
    for (float largest : most) {
      step_.push_back(largest / kKeyMost);
      error_ = std::max(error_, step_.back() * std::sqrt(static_cast<float>(n_digits_) / 12.0f));
    }
    if (!(error_ <= kMostScoreError)) return;
    for (int k = 0; k < n_digits_; ++k) {
      for (int r = 0; r < rows; ++r, entries += n) {
        uint8_t* to =
            bytes_of(planes_) + (int64_t{first + r} * n_digits_ + k) * table_bytes(codes_);
        if (n < size) std::fill(to, to + 2 * size, uint8_t{0});
        // Entries of a row without products at all are 0: no reciprocal of what is next to nothing.
        const float factor = most[r] > 1e-30f ? kKeyMost / most[r] : 0.0f;
        split_planes(entries, n, factor, kKeyZero, kKeyLowBits, to, to + size);
      }
    }
  }

  ByteCodes codes_;
  int n_rows_, n_digits_;
  float error_ = 0;
  std::vector<float> step_;  // of each row
  Buffer planes_;            // [rows][digits][planes]
};

class PlaneSums final : public CodeSums {
 public:
  PlaneSums(const ByteCodes& codes, int n_rows) : codes_(codes), n_rows_(n_rows) {
    make_tables();
    sums_ = take_buffer(sums_size());
    clear();
  }

  void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) override {
    const int most = kUnits * unit_blocks();
    const int64_t tokens = int64_t{std::min(n_blocks, most)} * kBlockTokens;
    Buffer integers = take_bytes(kPlaneRows * tokens * static_cast<int64_t>(sizeof(int16_t)));
    int16_t* p = reinterpret_cast<int16_t*>(integers.get());
    for_each_chunk(
        codes_, blocks, n_blocks, most,
        [&](const Blocks& chunk, int64_t token, const float* factors) {
          const int64_t left = n_blocks * int64_t{kBlockTokens} - token;
          const bool is_last = left <= int64_t{chunk.n} * kBlockTokens;
          const uint8_t* next = blocks + (token / kBlockTokens + chunk.n) * codes_.block_bytes;
          float* sums = sums_.get();
          for (int first = 0; first < n_rows_; first += kPlaneRows) {
            const int rows = rows_of_panel(n_rows_, first);
            float units[kUnits * kPlaneRows];
            load_weights(chunk.n, weights + first * stride + token, stride, factors, rows, p,
                         units);
            add_panel(chunk, p, units, rows, sums, is_last || first > 0 ? nullptr : next);
            sums += int64_t{n_dims()} * kPlaneRows * kPlaneFloats;
          }
        });
  }

  void take(float* y, int64_t y_stride) override {
    const int dim = codes_.head_dim();
    const float* panel = sums_.get();
    Buffer folded = take_buffer(int64_t{n_dims()} * kPlaneRows);
    for (int first = 0; first < n_rows_; first += kPlaneRows) {
      const int rows = rows_of_panel(n_rows_, first);
      fold_plane_sums(panel, n_dims() * rows, folded.get());
      for (int d = 0; d < n_dims(); ++d) {
        const float step = step_[table_of(d)];
        for (int r = 0; r < rows; ++r) {
          float& to = y[(first + r) * y_stride + d % dim];
          const float sum = folded[d * rows + r] * step;
          to = d < dim ? sum : to + sum;
        }
      }
      panel += int64_t{n_dims()} * kPlaneRows * kPlaneFloats;
    }
    clear();
  }

 private:
  int n_dims() const { return codes_.n_codes * codes_.sub_dim; }  // of all parts
  int64_t sums_size() const {
    const int64_t panels = (n_rows_ + kPlaneRows - 1) / kPlaneRows;
    return panels * n_dims() * kPlaneRows * kPlaneFloats;
  }
  void clear() { std::fill(sums_.get(), sums_.get() + sums_size(), 0.0f); }
  int table_of(int d) const {
    if (!codes_.shared_table) return d;
    return d / codes_.head_dim() * codes_.sub_dim + d % codes_.sub_dim;
  }

  // [n][dim] -> [dim][n]
  static void turn(const float* table, int n, int dim, float* columns) {
    if (dim % 4 == 0) return tokens_to_rows(table, dim, n, nullptr, dim, columns, n);
    for (int v = 0; v < n; ++v) {
      for (int d = 0; d < dim; ++d) columns[int64_t{d} * n + v] = table[int64_t{v} * dim + d];
    }
  }

  void make_tables() {
    const int n = codes_.digit_values(), dim = codes_.digit_dim();
    const int size = plane_size(codes_.digit_bits);
    const int step = codes_.shared_table ? codes_.codes_a_part() : 1;
    Buffer table = take_buffer(int64_t{codes_.sub_dim} * n),
           columns = take_buffer(int64_t{dim} * n);
    planes_ = take_bytes(int64_t{codes_.n_codes / step} * codes_.sub_dim * 2 * size);
    uint8_t* to = bytes_of(planes_);
    for (int m = 0; m < codes_.n_codes; m += step) {
      codes_.table(m, table.get());
      for (int digit = 0; digit < codes_.n_digits; ++digit) {
        turn(table.get() + int64_t{digit} * n * dim, n, dim, columns.get());
        for (int d = 0; d < dim; ++d, to += 2 * size) {
          const float* column = columns.get() + int64_t{d} * n;
          const float most = largest_magnitude(column, n);
          step_.push_back(most / kValueMost);
          if (n < size) std::fill(to, to + 2 * size, uint8_t{0});
          split_planes(column, n, most > 1e-30f ? kValueMost / most : 0.0f, 0, kValueLowBits, to,
                       to + size);
        }
      }
    }
  }

  static void load_weights(int n_blocks, const float* weights, int64_t stride, const float* factors,
                           int rows, int16_t* integers, float* units) {
    for (int done = 0; done < n_blocks; done += unit_blocks()) {
      const int64_t t = int64_t{done} * kBlockTokens;
      const int n = std::min(n_blocks - done, unit_blocks()) * kBlockTokens;
      for (int r = 0; r < rows; ++r) {
        *units++ = weights_to_planes(weights + r * stride + t, n,
                                     factors == nullptr ? nullptr : factors + t, r, rows,
                                     integers + t * rows);
      }
    }
  }

  // next: blocks to fetch into the cache meanwhile, as many, or null. Rows of a code are read
  // across blocks, which no machine foresees.
  void add_panel(const Blocks& chunk, const int16_t* p, const float* units, int rows, float* sums,
                 const uint8_t* next) const {
    const int64_t step = chunk.n * codes_.block_bytes / codes_.n_codes;
    for (int m = 0; m < codes_.n_codes; ++m) {
      const int d = m * codes_.sub_dim;
      add_planes(chunk, m, digits_of(codes_), codes_.sub_dim,
                 bytes_of(planes_) + int64_t{table_of(d)} * table_bytes(codes_), p, units, rows,
                 sums + int64_t{d} * rows * kPlaneFloats);
      if (next == nullptr) continue;
      for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(next + m * step + i, 0, 2);
    }
  }

  ByteCodes codes_;
  int n_rows_;
  std::vector<float> step_;  // of each table
  Buffer planes_, sums_;     // sums: per panel [dimensions][rows][16]
};

}  // namespace

void set_plane_use(PlaneUse use) { chosen_use() = use; }
PlaneUse plane_use() { return chosen_use(); }

std::unique_ptr<const CodeScores> plane_code_scores(const ByteCodes& codes, const float* q,
                                                    int n_rows) {
  if (!is_used(codes) || codes.n_codes * codes.n_digits > kMaxPlaneDigits) return nullptr;
  auto scores = std::make_unique<PlaneScores>(codes, q, n_rows);
  if (!scores->is_exact_enough()) return nullptr;
  return scores;
}

std::unique_ptr<CodeSums> plane_code_sums(const ByteCodes& codes, int n_rows) {
  if (!is_used(codes)) return nullptr;
  return std::make_unique<PlaneSums>(codes, n_rows);
}

}  // namespace veloxquant::lookup
