// VecInfer as a Codec: validates what it is given, walks heads, moves tiles in and out of the
// dimension-major layout that the kernels use.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/lookup/plane_codes.h"
#include "src/codecs/registry.h"
#include "src/codecs/vecinfer/byte_codes.h"
#include "src/codecs/vecinfer/kernels.h"
#include "src/math/bitpack.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant {
namespace vecinfer {
namespace {

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.shape[d]);
  return text + "]";
}

void require_matrix(const TensorView& view, const char* name, int heads, int dim, int ndim) {
  bool ok = !view.empty() && view.dtype == DType::float32 && view.ndim == ndim &&
            view.shape[0] == heads && view.shape[1] == dim && (ndim < 3 || view.shape[2] == dim) &&
            view.stride[ndim - 1] == 1 && (ndim < 3 || view.stride[1] == dim);
  require(ok, "[vecinfer] ", name, ": got ", dtype_name(view.dtype), " ", shape_text(view),
          ", wanted row-major float32 [", heads, ", ", dim, ndim == 3 ? ", " : "",
          ndim == 3 ? std::to_string(dim) : std::string(), "]");
}

class VecInferCodec final : public Codec {
 public:
  VecInferCodec(Side side, int n_kv_heads, int head_dim, int n_subvectors, const TensorView& tables,
                const Transform& transform)
      : side_(side), heads_(n_kv_heads), dim_(head_dim), transform_(transform) {
    require(n_kv_heads >= 1, "[vecinfer] n_kv_heads: got ", n_kv_heads, ", wanted at least 1");
    require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0,
            "[vecinfer] head_dim: got ", head_dim, ", wanted a multiple of 8 up to ", kMaxHeadDim);
    require(n_subvectors >= 1 && head_dim % n_subvectors == 0, "[vecinfer] n_subvectors: got ",
            n_subvectors, ", wanted a divisor of head_dim = ", head_dim);
    require(head_dim / n_subvectors <= kMaxSubDim, "[vecinfer] n_subvectors: got ", n_subvectors,
            " (", head_dim / n_subvectors, " dimensions each), wanted at most ", kMaxSubDim,
            " dimensions each");
    set_tables(tables, n_subvectors);
    set_transform();
  }

  std::string name() const override {
    return "vecinfer d" + std::to_string(shape_.sub_dim) + "x" + std::to_string(shape_.n_centroids);
  }
  Side side() const override { return side_; }
  int n_kv_heads() const override { return heads_; }
  int head_dim() const override { return dim_; }
  int64_t n_sequences() const override { return sequences_; }
  int64_t block_bytes() const override { return shape_.n_subvectors * row_bytes(shape_.bits); }

  void encode_block(Backend backend, const BlockPlace& place, const float* x, int n_tokens,
                    uint8_t* block) const override {
    const Kernels& kernels = kernels_of(backend);
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens, 0.0f);
    for (int t = 0; t < n_tokens; ++t) {
      for (int d = 0; d < dim_; ++d) tile[d * kBlockTokens + t] = x[t * dim_ + d];
    }
    if (transform_.kind == TransformKind::hadamard) {
      kernels.hadamard_tile(inverse_scale(place.kv_head), dim_, tile.data());
    } else if (transform_.kind == TransformKind::dense) {
      std::vector<float> moved(tile.size());
      kernels.dense_tile(matrix(transform_.encode_matrix, place.kv_head), dim_, tile.data(),
                         moved.data());
      tile.swap(moved);
    }
    kernels.encode_block(head(place), tile.data(), block);
  }

  void decode_block(Backend backend, const BlockPlace& place, const uint8_t* block, int n_tokens,
                    float* y, int64_t y_stride) const override {
    kernels_of(backend).decode_block(head(place), block, n_tokens, y, y_stride);
  }

  void decode_block_transposed(Backend backend, const BlockPlace& place, const uint8_t* block,
                               int n_tokens, float* y_t) const override {
    kernels_of(backend).decode_block_transposed(head(place), block, n_tokens, y_t);
  }

  std::string code_kernel(Backend backend) const override {
    if (backend == Backend::reference || !has_byte_codes(shape_)) return {};
    return lookup::byte_code_kernel(byte_codes(shape_), side_);
  }
  std::unique_ptr<const CodeScores> code_scores(const BlockPlace& place, const float* q,
                                                int n_rows) const override {
    return lookup::byte_code_scores(kept_byte_codes(place), q, n_rows);
  }
  std::unique_ptr<CodeSums> code_sums(const BlockPlace& place, int n_rows) const override {
    return lookup::byte_code_sums(kept_byte_codes(place), n_rows);
  }

  int64_t kept_bytes() const override {
    int64_t bytes = 0;
    for (const lookup::KeptTables& tables : kept_) bytes += tables.nbytes();
    return bytes;
  }

  void transform_query(int kv_head, float* q, int64_t n) const override {
    if (transform_.kind == TransformKind::dense) return multiply_rows(kv_head, q, n, false);
    if (transform_.kind != TransformKind::hadamard) return;
    for (int64_t r = 0; r < n; ++r) {
      multiply(q + r * dim_, scale(kv_head));
      hadamard_row(q + r * dim_, dim_);
    }
  }

  void inverse(int kv_head, float* y, int64_t n) const override {
    if (transform_.kind == TransformKind::dense) return multiply_rows(kv_head, y, n, true);
    if (transform_.kind != TransformKind::hadamard) return;
    for (int64_t r = 0; r < n; ++r) {
      hadamard_row(y + r * dim_, dim_);
      multiply(y + r * dim_, scale(kv_head));
    }
  }

  void forward(int kv_head, float* x, int64_t n) const override {
    if (transform_.kind == TransformKind::dense) {
      dense_forward(kv_head, x, n);
    } else if (transform_.kind == TransformKind::hadamard) {
      for (int64_t r = 0; r < n; ++r) {
        float* row = x + r * dim_;
        multiply(row, inverse_scale(kv_head));
        hadamard_row(row, dim_);
      }
    }
  }

  int64_t token_bytes() const override { return packed_bytes(shape_.n_subvectors, shape_.bits); }

  void unpack_tokens(const uint8_t* block, int n_tokens, uint8_t* rows) const override {
    std::vector<uint16_t> codes(shape_.n_subvectors);
    for (int t = 0; t < n_tokens; ++t) {
      for (int m = 0; m < shape_.n_subvectors; ++m) {
        const uint8_t* row = block + m * row_bytes(shape_.bits);
        codes[m] = static_cast<uint16_t>(get_code(row, shape_.bits, t));
      }
      pack_bits(codes.data(), shape_.n_subvectors, shape_.bits, rows + t * token_bytes());
    }
  }

  void pack_tokens(const uint8_t* rows, int n_tokens, uint8_t* block) const override {
    std::memset(block, 0, block_bytes());
    std::vector<uint16_t> codes(shape_.n_subvectors);
    for (int t = 0; t < n_tokens; ++t) {
      unpack_bits(rows + t * token_bytes(), shape_.n_subvectors, shape_.bits, codes.data());
      for (int m = 0; m < shape_.n_subvectors; ++m) {
        set_code(block + m * row_bytes(shape_.bits), shape_.bits, t, codes[m]);
      }
    }
  }

 private:
  void set_tables(const TensorView& tables, int n_subvectors) {
    const int extra = tables.ndim == 5 ? 1 : 0;
    bool ok = !tables.empty() && tables.dtype == DType::float16 && (tables.ndim == 4 || extra) &&
              tables.shape[extra] == heads_ &&
              (tables.shape[extra + 1] == 1 || tables.shape[extra + 1] == n_subvectors) &&
              tables.shape[extra + 2] >= 2 && tables.shape[extra + 2] <= kMaxCentroids &&
              tables.shape[extra + 3] == dim_ / n_subvectors;
    require(ok, "[vecinfer] tables: got ", dtype_name(tables.dtype), " ", shape_text(tables),
            ", wanted float16 [", heads_, ", 1 or ", n_subvectors, ", 2..4096, ",
            dim_ / n_subvectors, "] with an optional leading batch axis");
    int64_t dense = 1;
    for (int d = tables.ndim - 1; d >= 0; --d) {
      require(tables.shape[d] == 1 || tables.stride[d] == dense,
              "[vecinfer] tables: got a strided view, wanted row-major");
      dense *= tables.shape[d];
    }
    shape_.head_dim = dim_;
    shape_.n_subvectors = n_subvectors;
    shape_.sub_dim = dim_ / n_subvectors;
    shape_.n_centroids = static_cast<int>(tables.shape[extra + 2]);
    shape_.bits = code_bits(shape_.n_centroids);
    shape_.tables = static_cast<const uint16_t*>(tables.data);
    const int64_t one_table = tables.shape[extra + 2] * tables.shape[extra + 3];
    shape_.table_stride = tables.shape[extra + 1] == 1 ? 0 : one_table;
    head_stride_ = tables.shape[extra + 1] * one_table;
    sequences_ = extra ? tables.shape[0] : 1;
    kept_ = std::vector<lookup::KeptTables>(sequences_ * heads_);
  }

  void set_transform() {
    if (transform_.kind == TransformKind::dense) {
      require_matrix(transform_.encode_matrix, "encode_matrix", heads_, dim_, 3);
      require_matrix(transform_.query_matrix, "query_matrix", heads_, dim_, 3);
    }
    if (transform_.kind != TransformKind::hadamard || transform_.scale.empty()) return;
    require_matrix(transform_.scale, "smooth_factors", heads_, dim_, 2);
    const float* lambda = static_cast<const float*>(transform_.scale.data);
    inverse_scale_.resize(static_cast<size_t>(heads_) * dim_);
    for (size_t i = 0; i < inverse_scale_.size(); ++i) {
      require(std::isfinite(lambda[i]) && lambda[i] > 0.0f, "[vecinfer] smooth_factors: got ",
              lambda[i], ", wanted finite positive factors");
      inverse_scale_[i] = 1.0f / lambda[i];
    }
  }

  int64_t index_of(const BlockPlace& place) const {
    return (sequences_ == 1 ? 0 : int64_t{place.sequence}) * heads_ + place.kv_head;
  }

  HeadTables head(const BlockPlace& place) const {
    HeadTables tables = shape_;
    tables.tables += index_of(place) * head_stride_;
    return tables;
  }

  lookup::ByteCodes kept_byte_codes(const BlockPlace& place) const {
    lookup::ByteCodes codes = byte_codes(head(place));
    codes.kept = &kept_[index_of(place)];
    return codes;
  }

  const float* scale(int kv_head) const {
    if (transform_.scale.empty()) return nullptr;
    return static_cast<const float*>(transform_.scale.data) + static_cast<int64_t>(kv_head) * dim_;
  }
  const float* inverse_scale(int kv_head) const {
    return inverse_scale_.empty() ? nullptr : inverse_scale_.data() + kv_head * dim_;
  }
  const float* matrix(const TensorView& view, int kv_head) const {
    return static_cast<const float*>(view.data) + static_cast<int64_t>(kv_head) * dim_ * dim_;
  }

  void multiply(float* row, const float* factors) const {
    if (factors == nullptr) return;
    for (int d = 0; d < dim_; ++d) row[d] = mul(row[d], factors[d]);
  }

  // With the kernel that encodes, 64 tokens at a time: training runs it over every token.
  void dense_forward(int kv_head, float* x, int64_t n) const {
    const Kernels& kernels = kernels_of(default_backend());
    std::vector<float> tile(static_cast<size_t>(dim_) * kBlockTokens, 0.0f), moved(tile.size());
    for (int64_t start = 0; start < n; start += kBlockTokens) {
      const int64_t count = std::min<int64_t>(kBlockTokens, n - start);
      float* rows = x + start * dim_;
      for (int64_t t = 0; t < count; ++t) {
        for (int d = 0; d < dim_; ++d) tile[d * kBlockTokens + t] = rows[t * dim_ + d];
      }
      kernels.dense_tile(matrix(transform_.encode_matrix, kv_head), dim_, tile.data(),
                         moved.data());
      for (int64_t t = 0; t < count; ++t) {
        for (int d = 0; d < dim_; ++d) rows[t * dim_ + d] = moved[d * kBlockTokens + t];
      }
    }
  }

  // Rows <- rows M, or rows M^T, of the query matrix.
  void multiply_rows(int kv_head, float* rows, int64_t n, bool transposed) const {
    const std::vector<float> from(rows, rows + n * dim_);
    kernels_of(default_backend())
        .dense_rows(matrix(transform_.query_matrix, kv_head), dim_, transposed, from.data(), n,
                    rows);
  }

  Side side_;
  int heads_;
  int dim_;
  Transform transform_;
  HeadTables shape_;
  int64_t head_stride_ = 0;
  int64_t sequences_ = 1;
  mutable std::vector<lookup::KeptTables> kept_;  // [sequences][heads]
  std::vector<float> inverse_scale_;
};

}  // namespace
}  // namespace vecinfer

CodecPtr make_vecinfer_codec(Side side, int n_kv_heads, int head_dim, int n_subvectors,
                             const TensorView& tables, const Transform& transform) {
  return std::make_shared<vecinfer::VecInferCodec>(side, n_kv_heads, head_dim, n_subvectors, tables,
                                                   transform);
}

CodecPtr vecinfer_from_spec(const CodecSpec& spec, const CodecTables& tables) {
  SpecReader reader(spec, tables);
  const int n_subvectors =
      static_cast<int>(reader.integer("n_subvectors", 1, vecinfer::kMaxHeadDim));
  Transform transform;
  transform.kind =
      static_cast<TransformKind>(reader.choice("transform", {"none", "hadamard", "dense"}));
  transform.scale = reader.table_or_empty("scale");
  transform.encode_matrix = reader.table_or_empty("encode_matrix");
  transform.query_matrix = reader.table_or_empty("query_matrix");
  // An orthogonal matrix is its own dual, and is given once.
  if (transform.query_matrix.empty()) transform.query_matrix = transform.encode_matrix;
  const TensorView entries = reader.table_or_empty("tables");
  reader.finish();
  const bool dense = transform.kind == TransformKind::dense;
  require(dense == !transform.encode_matrix.empty(), "[vecinfer] encode_matrix: got ",
          dense ? "none" : "one", ", wanted it with transform 'dense' only");
  require(transform.scale.empty() || transform.kind == TransformKind::hadamard,
          "[vecinfer] scale: got smooth factors, wanted them with transform 'hadamard' only");
  return make_vecinfer_codec(spec.side, spec.n_kv_heads, spec.head_dim, n_subvectors, entries,
                             transform);
}

void nearest_centroids(Backend backend, const float* x, int64_t x_stride, int64_t n,
                       const float* table, int n_centroids, int sub_dim, uint16_t* codes,
                       float* distance) {
  require(sub_dim >= 1 && sub_dim <= vecinfer::kMaxSubDim, "[nearest_centroids] sub_dim: got ",
          sub_dim, ", wanted 1..", vecinfer::kMaxSubDim);
  vecinfer::kernels_of(backend).nearest_centroids(x, x_stride, n, table, n_centroids, sub_dim,
                                                  codes, distance);
}

}  // namespace veloxquant
