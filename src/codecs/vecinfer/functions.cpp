#include "veloxquant/vecinfer_functions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/codecs/vecinfer/kernels.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"

namespace veloxquant {
namespace {

using vecinfer::Kernels;
using vecinfer::kernels_of;

constexpr int kMaxFunctionCentroids = 65536;  // codes of nearest_centroids are uint16

// The sizes of one call, checked.
struct Rows {
  int64_t planes = 0;  // B * H
  int64_t heads = 0, rows = 0;
  int dim = 0, n_subvectors = 0, sub_dim = 0, n_centroids = 0;
  bool per_head = false, per_subvector = false;

  int64_t table_size() const { return int64_t{n_centroids} * sub_dim; }
  // Elements from the start of the codebook to the table of (plane, sub-vector).
  int64_t table_offset(int64_t plane, int m) const {
    const int64_t groups = per_subvector ? n_subvectors : 1;
    const int64_t head = per_head ? plane % heads : 0;
    return (head * groups + (per_subvector ? m : 0)) * table_size();
  }
};

template <class Pointer>
void require_dense(const BasicTensorView<Pointer>& view, const char* what, const char* name,
                   int ndim) {
  require(view.ndim == ndim, "[", what, "] ", name, ": got ", view.ndim, " dimensions, wanted ",
          ndim);
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    require(view.shape[d] == 1 || view.stride[d] == step, "[", what, "] ", name,
            ": got a strided view, wanted row-major");
    step *= view.shape[d];
  }
}

template <class Pointer>
Rows rows_of(const char* what, const BasicTensorView<Pointer>& x, const TensorView& codebook) {
  require_dense(x, what, "x", 4);
  require_dense(codebook, what, "codebook", 4);
  Rows r;
  r.planes = x.shape[0] * x.shape[1];
  r.heads = x.shape[1];
  r.rows = x.shape[2];
  r.dim = static_cast<int>(x.shape[3]);
  r.n_centroids = static_cast<int>(codebook.shape[2]);
  r.sub_dim = static_cast<int>(codebook.shape[3]);
  require(codebook.shape[2] >= 1 && codebook.shape[2] <= kMaxFunctionCentroids, "[", what,
          "] codebook: got ", codebook.shape[2], " centroids, wanted 1..", kMaxFunctionCentroids);
  require(r.sub_dim >= 1 && r.sub_dim <= vecinfer::kMaxSubDim, "[", what, "] sub_dim: got ",
          r.sub_dim, ", wanted 1..", vecinfer::kMaxSubDim);
  require(x.shape[3] >= 1 && x.shape[3] % r.sub_dim == 0, "[", what, "] sub_dim: got ", r.sub_dim,
          ", wanted a divisor of the ", x.shape[3], " dimensions of a row");
  r.n_subvectors = r.dim / r.sub_dim;
  r.per_head = codebook.shape[0] != 1;
  r.per_subvector = codebook.shape[1] != 1;
  require(!r.per_head || codebook.shape[0] == r.heads, "[", what, "] codebook: got ",
          codebook.shape[0], " heads, wanted 1 or ", r.heads);
  require(!r.per_subvector || codebook.shape[1] == r.n_subvectors, "[", what, "] codebook: got ",
          codebook.shape[1], " sub-vectors, wanted 1 or ", r.n_subvectors);
  return r;
}

template <class Pointer>
void require_shape(const char* what, const char* name, const BasicTensorView<Pointer>& view,
                   const Rows& r, std::initializer_list<int64_t> last) {
  require_dense(view, what, name, 3 + static_cast<int>(last.size()));
  bool ok = view.shape[0] * view.shape[1] == r.planes && view.shape[2] == r.rows;
  int d = 3;
  for (int64_t n : last) ok = ok && view.shape[d++] == n;
  require(ok, "[", what, "] ", name, ": got another shape, wanted that of x");
}

void require_float32(const char* what, const char* name, const TensorView& view) {
  require(view.dtype == DType::float32, "[", what, "] ", name, ": got ", dtype_name(view.dtype),
          ", wanted float32");
}

// body(plane, first row, rows) for pieces of at most `step` rows.
template <class Body>
void for_pieces(const Rows& r, int64_t step, const Body& body) {
  const int64_t pieces = (r.rows + step - 1) / step;
  parallel_for(static_cast<long>(r.planes * pieces), [&](long i) {
    const int64_t first = i % pieces * step;
    body(i / pieces, first, std::min(step, r.rows - first));
  });
}

// n values of `view` from element `offset` on.
void load(const TensorView& view, int64_t offset, int64_t n, float* to) {
  const auto* bytes = static_cast<const uint8_t*>(view.data);
  cpu::to_float(view.dtype, bytes + offset * dtype_bytes(view.dtype), n, to);
}

// [n][d] -> [d][stride]
template <int kSubDim>
void transpose(const float* rows, int64_t n, int sub_dim, float* columns, int64_t stride) {
  const int d = kSubDim == 0 ? sub_dim : kSubDim;
  for (int64_t t = 0; t < n; ++t) {
    for (int i = 0; i < d; ++i) columns[i * stride + t] = rows[t * d + i];
  }
}

void transpose_any(const float* rows, int64_t n, int sub_dim, float* columns, int64_t stride) {
  switch (sub_dim) {
    case 2:
      return transpose<2>(rows, n, sub_dim, columns, stride);
    case 4:
      return transpose<4>(rows, n, sub_dim, columns, stride);
    case 8:
      return transpose<8>(rows, n, sub_dim, columns, stride);
    default:
      return transpose<0>(rows, n, sub_dim, columns, stride);
  }
}

// One plane's rows -> codes [n][M]. y: [n][D], scratch kept between calls of a piece.
void encode_rows(const Kernels& kernels, const Rows& r, const float* codebook, int64_t plane,
                 const float* y, int64_t n, int32_t* codes) {
  const int M = r.n_subvectors;
  if (!r.per_subvector) {  // every sub-vector of every row is one more token of the same table
    const int64_t count = n * M;
    std::vector<float> columns(static_cast<size_t>(count) * r.sub_dim);
    std::vector<uint16_t> nearest(count);
    transpose_any(y, count, r.sub_dim, columns.data(), count);
    kernels.nearest_centroids(columns.data(), count, count, codebook + r.table_offset(plane, 0),
                              r.n_centroids, r.sub_dim, nearest.data(), nullptr);
    std::copy(nearest.begin(), nearest.end(), codes);
    return;
  }
  std::vector<float> columns(static_cast<size_t>(n) * r.dim);
  std::vector<uint16_t> nearest(n);
  transpose<0>(y, n, r.dim, columns.data(), n);
  for (int m = 0; m < M; ++m) {
    kernels.nearest_centroids(columns.data() + int64_t{m} * r.sub_dim * n, n, n,
                              codebook + r.table_offset(plane, m), r.n_centroids, r.sub_dim,
                              nearest.data(), nullptr);
    for (int64_t t = 0; t < n; ++t) codes[t * M + m] = nearest[t];
  }
}

int64_t clamped(int32_t code, int n_centroids) {
  return std::min<uint32_t>(static_cast<uint32_t>(code), static_cast<uint32_t>(n_centroids - 1));
}

// Entries of kBytes bytes (0: any size).
template <int kBytes>
void decode_rows(const Rows& r, const uint8_t* codebook, int item, int64_t plane,
                 const int32_t* codes, int64_t n, uint8_t* out) {
  const int64_t entry = kBytes == 0 ? int64_t{r.sub_dim} * item : kBytes;
  for (int64_t t = 0; t < n; ++t) {
    for (int m = 0; m < r.n_subvectors; ++m, ++codes, out += entry) {
      const uint8_t* table = codebook + r.table_offset(plane, m) * item;
      std::memcpy(out, table + clamped(*codes, r.n_centroids) * entry, entry);
    }
  }
}

void decode_any(const Rows& r, const uint8_t* codebook, int item, int64_t plane,
                const int32_t* codes, int64_t n, uint8_t* out) {
  switch (r.sub_dim * item) {
    case 4:
      return decode_rows<4>(r, codebook, item, plane, codes, n, out);
    case 8:
      return decode_rows<8>(r, codebook, item, plane, codes, n, out);
    case 16:
      return decode_rows<16>(r, codebook, item, plane, codes, n, out);
    case 32:
      return decode_rows<32>(r, codebook, item, plane, codes, n, out);
    default:
      return decode_rows<0>(r, codebook, item, plane, codes, n, out);
  }
}

// +-1/sqrt(D) in Sylvester order, to the rounding of whoever made it.
bool is_walsh_hadamard(const float* matrix, int dim) {
  if ((dim & (dim - 1)) != 0) return false;
  const float scale = hadamard_scale(dim);
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      const float wanted = __builtin_parity(static_cast<unsigned>(i & j)) ? -scale : scale;
      if (!(std::fabs(matrix[int64_t{i} * dim + j] - wanted) <= 1e-6f * scale)) return false;
    }
  }
  return true;
}

// y = matrix x, or y = matrix^T x, on tiles of 64 rows held dimension-major.
class TileTransform {
 public:
  TileTransform(const Kernels& kernels, const TensorView& matrix, int dim)
      : kernels_(kernels), dim_(dim) {
    if (matrix.empty()) return;
    const float* m = static_cast<const float*>(matrix.data);
    kind_ = is_walsh_hadamard(m, dim) ? Kind::hadamard : Kind::dense;
    if (kind_ != Kind::dense) return;
    matrix_ = m;
    transposed_.resize(static_cast<size_t>(dim) * dim);
    transpose<0>(m, dim, dim, transposed_.data(), dim);
  }

  void forward(std::vector<float>& tile) const { apply(transposed_.data(), tile); }
  void backward(std::vector<float>& tile) const { apply(matrix_, tile); }

 private:
  enum class Kind { none, hadamard, dense };

  // dense_tile computes y_j = sum_i x_i m[i][j].
  void apply(const float* m, std::vector<float>& tile) const {
    if (kind_ == Kind::hadamard) kernels_.hadamard_tile(nullptr, dim_, tile.data());
    if (kind_ != Kind::dense) return;
    std::vector<float> moved(tile.size());
    kernels_.dense_tile(m, dim_, tile.data(), moved.data());
    tile.swap(moved);
  }

  const Kernels& kernels_;
  int dim_;
  Kind kind_ = Kind::none;
  const float* matrix_ = nullptr;
  std::vector<float> transposed_;
};

}  // namespace

void vecinfer_quantize(Backend backend, const TensorView& x, const TensorView& codebook,
                       const MutableTensorView& codes) {
  const Rows r = rows_of("vecinfer_quantize", x, codebook);
  require_float32("vecinfer_quantize", "codebook", codebook);
  require_shape("vecinfer_quantize", "codes", codes, r, {r.n_subvectors});
  const Kernels& kernels = kernels_of(backend);
  auto* out = static_cast<int32_t*>(codes.data);
  // A table is prepared once per piece; a piece of a shared table has M times as many vectors.
  for_pieces(r, r.per_subvector ? 256 : 64, [&](long plane, int64_t first, int64_t n) {
    const int64_t row = plane * r.rows + first;
    std::vector<float> y(static_cast<size_t>(n) * r.dim);
    load(x, row * r.dim, n * r.dim, y.data());
    encode_rows(kernels, r, static_cast<const float*>(codebook.data), plane, y.data(), n,
                out + row * r.n_subvectors);
  });
}

void vecinfer_dequantize(const TensorView& codes, const TensorView& codebook,
                         const MutableTensorView& out) {
  const Rows r = rows_of("vecinfer_dequantize", out, codebook);
  require_shape("vecinfer_dequantize", "codes", codes, r, {r.n_subvectors});
  require(codes.dtype == DType::int32, "[vecinfer_dequantize] codes: got ", dtype_name(codes.dtype),
          ", wanted int32");
  require(codebook.dtype == out.dtype, "[vecinfer_dequantize] out: got ", dtype_name(out.dtype),
          ", wanted the dtype of the codebook, ", dtype_name(codebook.dtype));
  const int item = dtype_bytes(out.dtype);
  for_pieces(r, 512, [&](long plane, int64_t first, int64_t n) {
    const int64_t row = plane * r.rows + first;
    decode_any(r, static_cast<const uint8_t*>(codebook.data), item, plane,
               static_cast<const int32_t*>(codes.data) + row * r.n_subvectors, n,
               static_cast<uint8_t*>(out.data) + row * r.dim * item);
  });
}

void vecinfer_encode_decode(Backend backend, const TensorView& x, const TensorView& codebook,
                            const TensorView& matrix, const TensorView& lambda,
                            const MutableTensorView& decoded, const MutableTensorView& codes) {
  const char* what = "vecinfer_encode_decode";
  const Rows r = rows_of(what, x, codebook);
  require_float32(what, "codebook", codebook);
  require_shape(what, "decoded", decoded, r, {r.dim});
  require_shape(what, "codes", codes, r, {r.n_subvectors});
  require(decoded.dtype == DType::float16, "[", what, "] decoded: got ", dtype_name(decoded.dtype),
          ", wanted float16");
  if (!matrix.empty()) {
    require_float32(what, "matrix", matrix);
    require_dense(matrix, what, "matrix", 2);
    require(matrix.shape[0] == r.dim && matrix.shape[1] == r.dim, "[", what, "] matrix: got [",
            matrix.shape[0], ", ", matrix.shape[1], "], wanted [", r.dim, ", ", r.dim, "]");
  }
  if (!lambda.empty()) {
    require_float32(what, "lambda", lambda);
    require_dense(lambda, what, "lambda", 2);
    require((lambda.shape[0] == 1 || lambda.shape[0] == r.heads) && lambda.shape[1] == r.dim, "[",
            what, "] lambda: got [", lambda.shape[0], ", ", lambda.shape[1], "], wanted [1 or ",
            r.heads, ", ", r.dim, "]");
  }
  const Kernels& kernels = kernels_of(backend);
  const TileTransform transform(kernels, matrix, r.dim);
  for_pieces(r, kBlockTokens, [&](long plane, int64_t first, int64_t n) {
    const int64_t row = plane * r.rows + first;
    const float* scale = nullptr;
    if (!lambda.empty()) {
      scale = static_cast<const float*>(lambda.data) +
              (lambda.shape[0] == 1 ? 0 : plane % r.heads) * r.dim;
    }
    std::vector<float> rows(static_cast<size_t>(kBlockTokens) * r.dim, 0.0f), tile(rows.size());
    load(x, row * r.dim, n * r.dim, rows.data());
    for (int64_t t = 0; t < n && scale != nullptr; ++t) {
      for (int i = 0; i < r.dim; ++i) {
        if (scale[i] > 1e-8f) rows[t * r.dim + i] /= scale[i];
      }
    }
    transpose<0>(rows.data(), kBlockTokens, r.dim, tile.data(), kBlockTokens);
    transform.forward(tile);
    // The transposed tile is [D][64]: back to rows for the encoder, which wants [n][D].
    transpose<0>(tile.data(), r.dim, kBlockTokens, rows.data(), r.dim);
    int32_t* row_codes = static_cast<int32_t*>(codes.data) + row * r.n_subvectors;
    encode_rows(kernels, r, static_cast<const float*>(codebook.data), plane, rows.data(), n,
                row_codes);
    decode_any(r, static_cast<const uint8_t*>(codebook.data), 4, plane, row_codes, n,
               reinterpret_cast<uint8_t*>(rows.data()));
    transpose<0>(rows.data(), kBlockTokens, r.dim, tile.data(), kBlockTokens);
    transform.backward(tile);
    transpose<0>(tile.data(), r.dim, kBlockTokens, rows.data(), r.dim);
    for (int64_t t = 0; t < n && scale != nullptr; ++t) {
      for (int i = 0; i < r.dim; ++i) {
        rows[t * r.dim + i] = mul(rows[t * r.dim + i], scale[i]);
      }
    }
    cpu::to_finite_16bit(DType::float16, rows.data(), n * r.dim,
                         static_cast<uint16_t*>(decoded.data) + row * r.dim);
  });
}

void vecinfer_query_lut(Backend backend, const TensorView& q, const TensorView& codebook,
                        const MutableTensorView& lut) {
  const char* what = "vecinfer_query_lut";
  const Rows r = rows_of(what, q, codebook);
  require_float32(what, "codebook", codebook);
  require_shape(what, "lut", lut, r, {r.n_subvectors, r.n_centroids});
  require(lut.dtype == q.dtype, "[", what, "] lut: got ", dtype_name(lut.dtype),
          ", wanted the dtype of q, ", dtype_name(q.dtype));
  const Kernels& kernels = kernels_of(backend);
  // Every table once, dimension-major, so that the kernel runs along the centroids.
  std::vector<float> columns(static_cast<size_t>(codebook.size()));
  const int64_t size = r.table_size();
  parallel_for(static_cast<long>(codebook.size() / size), [&](long i) {
    transpose_any(static_cast<const float*>(codebook.data) + i * size, r.n_centroids, r.sub_dim,
                  columns.data() + i * size, r.n_centroids);
  });
  const int64_t row_entries = int64_t{r.n_subvectors} * r.n_centroids;
  for_pieces(r, 16, [&](long plane, int64_t first, int64_t n) {
    std::vector<float> row(r.dim), entries(r.n_centroids);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t index = plane * r.rows + first + t;
      load(q, index * r.dim, r.dim, row.data());
      for (int m = 0; m < r.n_subvectors; ++m) {
        const int64_t at = index * row_entries + int64_t{m} * r.n_centroids;
        float* to = q.dtype == DType::float32 ? static_cast<float*>(lut.data) + at : entries.data();
        kernels.query_lut(row.data() + m * r.sub_dim, columns.data() + r.table_offset(plane, m),
                          r.n_centroids, r.sub_dim, to);
        if (q.dtype == DType::float32) continue;
        auto* halves = static_cast<uint16_t*>(lut.data) + at;
        for (int c = 0; c < r.n_centroids; ++c) {
          halves[c] = q.dtype == DType::float16 ? f32_to_f16(to[c]) : f32_to_bf16(to[c]);
        }
      }
    }
  });
}

}  // namespace veloxquant
