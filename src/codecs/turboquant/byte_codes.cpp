#include "src/codecs/turboquant/byte_codes.h"

#include <utility>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/codecs/lookup/scalar_codes.h"
#include "src/codecs/lookup/stream_kernels.h"

namespace veloxquant::turboquant {
namespace {

using lookup::ByteCodes;

void join(const BlockShape& shape, const uint8_t* block, int plane, uint8_t* rows) {
  const uint8_t* streams = block + shape.plane_offset(plane);
  shape.by_token() ? lookup::join_tokens(streams, shape.head_dim, shape.bits[plane], rows)
                   : lookup::join_columns(streams, shape.head_dim, shape.bits[plane], rows);
}

// Planes [first, first + levels.size()) with the scalars of index `scalar` as factors.
ByteCodes planes_of(const BlockShape& shape, int first, std::vector<std::vector<float>> levels,
                    int scalar) {
  const int n_planes = static_cast<int>(levels.size());
  ByteCodes codes =
      lookup::scalar_codes(shape.head_dim, shape.bits[first], levels, shape.block_bytes());
  const int64_t plane_rows = int64_t{codes.codes_a_part()} * kBlockTokens;
  codes.rows = [=](const uint8_t* block, uint8_t* to) {
    for (int p = 0; p < n_planes; ++p) join(shape, block, first + p, to + p * plane_rows);
  };
  const int64_t at = shape.scalar_offset() + 2 * kBlockTokens * scalar;
  codes.factors = [at](const uint8_t* block, float* to) {
    cpu::to_float(DType::float16, block + at, kBlockTokens, to);
  };
  return codes;
}

ByteCodes stages_of(const CodeView& view) {
  std::vector<std::vector<float>> levels(view.encoder->n_stages);
  for (int s = 0; s < view.encoder->n_stages; ++s) {
    const ScalarQuantizer& stage = view.encoder->stage[s];
    for (uint32_t c = 0; c < 1u << stage.bits; ++c) levels[s].push_back(scalar_level(stage, c));
  }
  return planes_of(view.shape, 0, std::move(levels), 0);
}

// The last plane, signs of S r.
ByteCodes signs_of(const CodeView& view) {
  return planes_of(view.shape, view.shape.n_planes - 1, {{-1.0f, 1.0f}}, 1);
}

// `prod`: y^ = f z + gamma S^T sign, so that scores are q . (f z) + (S q) . (gamma sign).
class ProdScores final : public CodeScores {
 public:
  ProdScores(const CodeView& view, const float* q, int n_rows) : n_rows_(n_rows) {
    const int dim = view.shape.head_dim;
    if (view.encoder->stage[0].bits > 0) {
      table_ = lookup::byte_code_scores(stages_of(view), q, n_rows);
    }
    std::vector<float> projected(static_cast<size_t>(n_rows) * dim);
    for (int r = 0; r < n_rows; ++r) {
      cpu_kernels().row_times_matrix(q + r * dim, view.sketch->columns.data(), dim,
                                     projected.data() + r * dim);
    }
    signs_ = lookup::byte_code_scores(signs_of(view), projected.data(), n_rows);
  }

  void score(const uint8_t* blocks, int n_blocks, float* scores, int64_t stride) const override {
    if (table_ == nullptr) return signs_->score(blocks, n_blocks, scores, stride);
    table_->score(blocks, n_blocks, scores, stride);
    const int64_t n = int64_t{kBlockTokens} * n_blocks;
    std::vector<float> more(n_rows_ * n);
    signs_->score(blocks, n_blocks, more.data(), n);
    for (int r = 0; r < n_rows_; ++r) {
      for (int64_t t = 0; t < n; ++t) scores[r * stride + t] += more[r * n + t];
    }
  }

 private:
  int n_rows_;
  std::unique_ptr<const CodeScores> table_, signs_;  // no table: 0 bits
};

class ProdSums final : public CodeSums {
 public:
  ProdSums(const CodeView& view, int n_rows)
      : n_rows_(n_rows), dim_(view.shape.head_dim), sketch_(view.sketch) {
    if (view.encoder->stage[0].bits > 0) table_ = lookup::byte_code_sums(stages_of(view), n_rows);
    signs_ = lookup::byte_code_sums(signs_of(view), n_rows);
  }

  void add(const uint8_t* blocks, int n_blocks, const float* weights, int64_t stride) override {
    if (table_ != nullptr) table_->add(blocks, n_blocks, weights, stride);
    signs_->add(blocks, n_blocks, weights, stride);
  }

  void take(float* y, int64_t y_stride) override {
    std::vector<float> signs(static_cast<size_t>(n_rows_) * dim_), back(dim_);
    signs_->take(signs.data(), dim_);
    if (table_ != nullptr) table_->take(y, y_stride);
    for (int r = 0; r < n_rows_; ++r) {
      cpu_kernels().row_times_matrix(signs.data() + r * dim_, sketch_->rows.data(), dim_,
                                     back.data());
      float* to = y + r * y_stride;
      for (int d = 0; d < dim_; ++d) to[d] = table_ != nullptr ? to[d] + back[d] : back[d];
    }
  }

 private:
  int n_rows_, dim_;
  const Sketch* sketch_;
  std::unique_ptr<CodeSums> table_, signs_;
};

}  // namespace

std::string code_kernel(const CodeView& view, Side side) {
  const bool only_signs = view.encoder->stage[0].bits == 0;  // of the `prod` form at 1 bit
  return lookup::byte_code_kernel(only_signs ? signs_of(view) : stages_of(view), side);
}

std::unique_ptr<const CodeScores> code_scores(const CodeView& view, const float* q, int n_rows) {
  if (view.sketch != nullptr) return std::make_unique<ProdScores>(view, q, n_rows);
  return lookup::byte_code_scores(stages_of(view), q, n_rows);
}

std::unique_ptr<CodeSums> code_sums(const CodeView& view, int n_rows) {
  if (view.sketch != nullptr) return std::make_unique<ProdSums>(view, n_rows);
  return lookup::byte_code_sums(stages_of(view), n_rows);
}

}  // namespace veloxquant::turboquant
