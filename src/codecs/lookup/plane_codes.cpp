#include "src/codecs/lookup/plane_codes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/backends/environment.h"
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

std::atomic<PlaneUse>& chosen_use() {
  static std::atomic<PlaneUse> use{environment().lookups_in_registers ? PlaneUse::fast
                                                                      : PlaneUse::never};
  return use;
}

PlaneDigits digits_of(const ByteCodes& codes) { return {codes.digit_bits, codes.n_digits}; }
int table_bytes(const ByteCodes& codes) { return 2 * plane_size(codes.digit_bits); }
int rows_of_panel(int n_rows, int first) { return std::min(kPlaneRows, n_rows - first); }

uint8_t* bytes_of(const Buffer& buffer) { return reinterpret_cast<uint8_t*>(buffer.get()); }
Buffer take_bytes(int64_t n) {
  return take_buffer((n + static_cast<int64_t>(sizeof(float)) - 1) /
                     static_cast<int64_t>(sizeof(float)));
}

// The digits of all tables: those of byte m come one after the other.
int n_tables(const ByteCodes& codes) {
  const int a_part = codes.shared_table ? 1 : codes.codes_a_part();
  return codes.n_parts * a_part * codes.n_digits;
}
int table_of(const ByteCodes& codes, int m, int digit) {
  if (codes.shared_table) m /= codes.codes_a_part();
  return m * codes.n_digits + digit;
}

// body(first table of byte m, fp32 columns [digit_dim][plane_size], aligned) for every digit.
template <class Body>
void for_each_table(const ByteCodes& codes, const Body& body) {
  const int n = codes.digit_values(), dim = codes.digit_dim(), size = plane_size(codes.digit_bits);
  Buffer table = take_buffer(int64_t{codes.sub_dim} * n),
         columns = take_buffer(int64_t{dim} * size);
  std::fill(columns.get(), columns.get() + int64_t{dim} * size, 0.0f);
  for (int m = 0; m < codes.n_codes; m += codes.shared_table ? codes.codes_a_part() : 1) {
    codes.table(m, table.get());
    const float* values = table.get();
    for (int digit = 0; digit < codes.n_digits; ++digit) {
      for (int v = 0; v < n; ++v) {
        for (int d = 0; d < dim; ++d) columns[d * size + v] = *values++;
      }
      body(table_of(codes, m, digit), columns.get());
    }
  }
}

}  // namespace

struct KeptTables::Keys {
  Buffer columns;  // of every table: fp32 or, where codes.fp16_tables, fp16
  int64_t nbytes = 0;

  explicit Keys(const ByteCodes& codes) {
    const int64_t one = int64_t{codes.digit_dim()} * plane_size(codes.digit_bits);
    const int64_t element = codes.fp16_tables ? 2 : 4;
    nbytes = n_tables(codes) * one * element;
    columns = take_bytes(nbytes);
    for_each_table(codes, [&](int t, const float* x) {
      uint8_t* to = bytes_of(columns) + t * one * element;
      if (codes.fp16_tables) {
        cpu::to_finite_16bit(DType::float16, x, one, reinterpret_cast<uint16_t*>(to));
      } else {
        std::memcpy(to, x, one * sizeof(float));
      }
    });
  }
};

struct KeptTables::Values {
  Buffer planes;            // of every table and dimension
  std::vector<float> step;  // likewise
  int64_t nbytes = 0;

  explicit Values(const ByteCodes& codes) {
    const int dim = codes.digit_dim(), size = plane_size(codes.digit_bits);
    const int64_t n = int64_t{n_tables(codes)} * dim;
    nbytes = n * (2 * size + static_cast<int64_t>(sizeof(float)));
    planes = take_bytes(n * 2 * size);
    step.resize(n);
    for_each_table(codes, [&](int t, const float* columns) {
      for (int d = t * dim; d < (t + 1) * dim; ++d, columns += size) {
        const float most = largest_magnitude(columns, size);
        step[d] = most / kValueMost;
        split_planes(columns, 1, size, most > 1e-30f ? kValueMost / most : 0.0f, 0, kValueLowBits,
                     bytes_of(planes) + int64_t{d} * 2 * size);
      }
    });
  }
};

KeptTables::KeptTables() = default;
KeptTables::~KeptTables() = default;

const KeptTables::Keys& KeptTables::keys(const ByteCodes& codes) {
  std::call_once(once_, [&] {
    keys_ = std::make_unique<Keys>(codes);
    nbytes_ = keys_->nbytes;
  });
  return *keys_;
}
const KeptTables::Values& KeptTables::values(const ByteCodes& codes) {
  std::call_once(once_, [&] {
    values_ = std::make_unique<Values>(codes);
    nbytes_ = values_->nbytes;
  });
  return *values_;
}

namespace {

class PlaneScores final : public CodeScores {
 public:
  PlaneScores(const ByteCodes& codes, const float* q, int n_rows, MakeScores exact)
      : codes_(codes),
        n_rows_(n_rows),
        n_digits_(codes.n_codes * codes.n_digits),
        q_(q, q + int64_t{n_rows} * codes.head_dim()),
        make_exact_(std::move(exact)) {
    const int64_t stride = int64_t{n_digits_} * plane_size(codes.digit_bits);
    Buffer entries = take_buffer(kPlaneRows * stride);
    planes_ = take_bytes(2 * n_rows * stride);
    KeptTables own;
    const KeptTables::Keys& tables = (codes.kept == nullptr ? own : *codes.kept).keys(codes);
    for (int first = 0; first < n_rows; first += kPlaneRows) {
      const int rows = rows_of_panel(n_rows, first);
      float most[kPlaneRows] = {};
      make_entries(tables, q + int64_t{first} * codes.head_dim(), rows, entries.get(), stride,
                   most);
      for (int r = 0; r < rows; ++r) {
        step_.push_back(most[r] / kKeyMost);
        error_ = std::max(error_, step_.back() * std::sqrt(static_cast<float>(n_digits_) / 12.0f));
        if (is_given_up()) return;
        // Entries of a row without products at all are 0: no reciprocal of what is next to nothing.
        split_planes(entries.get() + r * stride, n_digits_, plane_size(codes.digit_bits),
                     most[r] > 1e-30f ? kKeyMost / most[r] : 0.0f, kKeyZero, kKeyLowBits,
                     bytes_of(planes_) + (first + r) * 2 * stride);
      }
    }
  }

  // No token is looked up in registers. Factors decide for each token, without them the queries.
  bool is_given_up() const { return !codes_.factors && error_ > kMostScoreError; }

  void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const override {
    const int64_t row_bytes = int64_t{n_digits_} * table_bytes(codes_);
    for_each_chunk(codes_, blocks, n_blocks, kKeyBlocks,
                   [&](const Blocks& chunk, int64_t token, const float* factors) {
                     if (!is_exact_enough_with(factors, chunk.n * kBlockTokens)) {
                       const uint8_t* first = blocks + token / kBlockTokens * codes_.block_bytes;
                       return exact().score(first, chunk.n, scores + token, stride);
                     }
                     for (int r = 0; r < n_rows_; ++r) {
                       score_planes(chunk, digits_of(codes_), bytes_of(planes_) + r * row_bytes,
                                    n_digits_ * kKeyZero, step_[r], factors,
                                    scores + r * stride + token);
                     }
                   });
  }

 private:
  // The error of a score grows with its token's factor.
  bool is_exact_enough_with(const float* factors, int n) const {
    return factors == nullptr || largest_magnitude(factors, n) * error_ <= kMostScoreError;
  }
  const CodeScores& exact() const {
    std::call_once(once_, [&] { exact_ = make_exact_(codes_, q_.data(), n_rows_); });
    return *exact_;
  }

  void make_entries(const KeptTables::Keys& tables, const float* q, int rows, float* entries,
                    int64_t stride, float* most) const {
    PlaneColumns columns;
    columns.in_fp16 = codes_.fp16_tables;
    columns.size = plane_size(codes_.digit_bits);
    columns.dim = codes_.digit_dim();
    const int64_t bytes = int64_t{columns.dim} * columns.size * (columns.in_fp16 ? 2 : 4);
    for (int m = 0; m < codes_.n_codes; ++m) {
      for (int digit = 0; digit < codes_.n_digits; ++digit, entries += columns.size) {
        columns.data = bytes_of(tables.columns) + table_of(codes_, m, digit) * bytes;
        make_plane_entries(columns, q + codes_.first_dim(m) + digit * columns.dim,
                           codes_.head_dim(), rows, entries, stride, most);
      }
    }
  }

  ByteCodes codes_;
  int n_rows_, n_digits_;
  float error_ = 0;
  std::vector<float> step_;  // of each row
  Buffer planes_;            // [rows][digits][planes]
  std::vector<float> q_;
  MakeScores make_exact_;
  mutable std::once_flag once_;
  mutable std::unique_ptr<const CodeScores> exact_;  // made if a token needs it
};

class PlaneSums final : public CodeSums {
 public:
  PlaneSums(const ByteCodes& codes, int n_rows)
      : codes_(codes),
        n_rows_(n_rows),
        tables_((codes.kept == nullptr ? own_ : *codes.kept).values(codes)),
        sums_(take_buffer(sums_size())) {}

  void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) override {
    clear_once();
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
    clear_once();
    const int dim = codes_.head_dim();
    const float* panel = sums_.get();
    Buffer folded = take_buffer(int64_t{n_dims()} * kPlaneRows);
    for (int first = 0; first < n_rows_; first += kPlaneRows) {
      const int rows = rows_of_panel(n_rows_, first);
      fold_plane_sums(panel, n_dims() * rows, folded.get());
      for (int d = 0; d < n_dims(); ++d) {
        const float step = tables_.step[first_plane(d / codes_.sub_dim) + d % codes_.sub_dim];
        for (int r = 0; r < rows; ++r) {
          float& to = y[(first + r) * y_stride + d % dim];
          const float sum = folded[d * rows + r] * step;
          to = d < dim ? sum : to + sum;
        }
      }
      panel += int64_t{n_dims()} * kPlaneRows * kPlaneFloats;
    }
    is_clear_ = false;
  }

 private:
  int n_dims() const { return codes_.n_codes * codes_.sub_dim; }  // of all parts
  int64_t sums_size() const {
    const int64_t panels = (n_rows_ + kPlaneRows - 1) / kPlaneRows;
    return panels * n_dims() * kPlaneRows * kPlaneFloats;
  }
  void clear_once() {
    if (!is_clear_) std::fill(sums_.get(), sums_.get() + sums_size(), 0.0f);
    is_clear_ = true;
  }
  // Of what the first dimension of byte m is looked up in.
  int64_t first_plane(int m) const { return int64_t{table_of(codes_, m, 0)} * codes_.digit_dim(); }

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
      add_planes(chunk, m, digits_of(codes_), codes_.sub_dim,
                 bytes_of(tables_.planes) + first_plane(m) * table_bytes(codes_), p, units, rows,
                 sums + int64_t{m} * codes_.sub_dim * rows * kPlaneFloats);
      if (next == nullptr) continue;
      for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(next + m * step + i, 0, 2);
    }
  }

  ByteCodes codes_;
  int n_rows_;
  KeptTables own_;
  const KeptTables::Values& tables_;
  bool is_clear_ = false;  // or begun
  Buffer sums_;            // per panel [dimensions][rows][16]
};

}  // namespace

void set_plane_use(PlaneUse use) { chosen_use() = use; }

bool looks_up_planes(const ByteCodes& codes, Side side) {
  const PlaneUse use = chosen_use();
  if (use == PlaneUse::never || plane_lanes() == 0 || codes.digit_bits < 2) return false;
  // With 16 bytes a register loads are as quick.
  if (use == PlaneUse::fast && plane_lanes() < 32) return false;
  if (side == Side::keys && codes.n_codes * codes.n_digits > kMaxPlaneDigits) return false;
  if (codes.digit_bits > 4) {  // wide tables take whole bytes
    return codes.n_digits == 1 && (use == PlaneUse::always || has_wide_tables());
  }
  // Registers of 32 bytes and less look up as many dimensions a digit more slowly than weights of
  // equal codes are added up in memory.
  const bool wide = plane_lanes() == kBlockTokens || use == PlaneUse::always;
  return side == Side::keys || wide || codes.digit_dim() <= 2;
}

std::unique_ptr<const CodeScores> plane_code_scores(const ByteCodes& codes, const float* q,
                                                    int n_rows, MakeScores exact) {
  if (!looks_up_planes(codes, Side::keys)) return nullptr;
  auto scores = std::make_unique<PlaneScores>(codes, q, n_rows, exact);
  if (scores->is_given_up()) return nullptr;
  return scores;
}

std::unique_ptr<CodeSums> plane_code_sums(const ByteCodes& codes, int n_rows) {
  if (!looks_up_planes(codes, Side::values)) return nullptr;
  return std::make_unique<PlaneSums>(codes, n_rows);
}

}  // namespace veloxquant::lookup
