// Tables and transforms of one side -> the blob that the CUDA kernels read. Runs on the host,
// without CUDA.
//
// Entries, [sequence][head], each `entries_stride` bytes:
//   by_lane       [256 codes][4 (keys) or 8 (values) tables]
//   by_subvector  [8 chunks][256 codes]
// An entry is four int8 or two fp16, ascending dimensions.
#include <cmath>
#include <cstring>

#include "src/codecs/vecinfer/cuda_layout.h"
#include "src/codecs/vecinfer/format.h"
#include "src/math/float16.h"
#include "veloxquant/cuda.h"

namespace veloxquant::cuda {
namespace {

constexpr int kCodes = 256;

// x = k * 2^exponent with integers |k| <= 127 for the whole table, or false.
bool int8_scale(const uint16_t* table, int64_t n, int* exponent) {
  float top = 0.0f;
  for (int64_t i = 0; i < n; ++i) top = std::fmax(top, std::fabs(f16_to_f32(table[i])));
  if (!std::isfinite(top)) return false;
  int e = -24;  // the smallest fp16
  while (std::ldexp(127.0f, e) < top) ++e;
  *exponent = e;
  for (int64_t i = 0; i < n; ++i) {
    const float k = std::ldexp(f16_to_f32(table[i]), -e);
    if (k != std::nearbyint(k)) return false;
  }
  return true;
}

struct Source {
  const uint16_t* data;
  int n_tables;  // 1 or M
  int centroids, sub_dim;

  const uint16_t* table(int64_t head, int m) const {
    return data + (head * n_tables + (n_tables == 1 ? 0 : m)) * centroids * sub_dim;
  }
  size_t bytes() const { return sizeof(uint16_t) * centroids * sub_dim; }
};

// Sub-vector m uses the table of m % period in every head.
bool repeats(const Source& source, int64_t heads, int n_subvectors, int period) {
  if (source.n_tables == 1) return true;
  for (int64_t head = 0; head < heads; ++head) {
    for (int m = period; m < n_subvectors; ++m) {
      if (std::memcmp(source.table(head, m), source.table(head, m % period), source.bytes()) != 0) {
        return false;
      }
    }
  }
  return true;
}

void write_entry(const Source& source, const uint16_t* table, int code, Entry entry, int exponent,
                 uint8_t* to) {
  const uint16_t* from = table + std::min(code, source.centroids - 1) * source.sub_dim;
  if (entry != Entry::int8x4) {
    std::memcpy(to, from, 2 * source.sub_dim);
    return;
  }
  for (int i = 0; i < 4; ++i)
    to[i] = static_cast<uint8_t>(static_cast<int>(std::ldexp(f16_to_f32(from[i]), -exponent)));
}

// Appends n floats at a multiple of 16 bytes; returns where.
int64_t append_floats(std::vector<uint8_t>& blob, int64_t n) {
  const int64_t at = static_cast<int64_t>(blob.size());
  blob.resize(at + (n * 4 + 15) / 16 * 16);
  return at;
}

float* floats(std::vector<uint8_t>& blob, int64_t at) {
  return reinterpret_cast<float*>(blob.data() + at);
}

// A matrix [from][to] as operand B of the transform: each number a high and a low term in bf16.
void write_fragments(const float* matrix, int dim, uint8_t* to) {
  const int tiles = dim / 16;
  for (int e = 0; e < tiles * tiles * 64; ++e) {
    const int lane = e % 32, half = e / 32 % 2, step = e / 64 % tiles, tile = e / 64 / tiles;
    const int column = vecinfer::matrix_column(tile, half, lane);
    uint16_t terms[2][4];
    for (int n = 0; n < 4; ++n) {
      const float x = matrix[vecinfer::matrix_row(step, lane, n) * dim + column];
      terms[0][n] = f32_to_bf16(x);
      terms[1][n] = f32_to_bf16(x - bf16_to_f32(terms[0][n]));
    }
    std::memcpy(to + 16 * e, terms, 16);
  }
}

}  // namespace

PreparedSide prepare_side(Side side, int n_kv_heads, int head_dim, int n_subvectors,
                          const TensorView& tables, const Transform& transform) {
  // The codec checks shapes, dtypes and transforms.
  make_vecinfer_codec(side, n_kv_heads, head_dim, n_subvectors, tables, transform);
  PreparedSide prepared;
  SideFormat& f = prepared.format;
  const int extra = tables.ndim == 5 ? 1 : 0;
  f.side = side;
  f.n_kv_heads = n_kv_heads;
  f.head_dim = head_dim;
  f.n_subvectors = n_subvectors;
  f.sub_dim = head_dim / n_subvectors;
  f.n_sequences = extra ? static_cast<int>(tables.shape[0]) : 1;
  f.n_centroids = static_cast<int>(tables.shape[extra + 2]);
  f.transform = transform.kind;
  const bool known_dim =
      head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256;
  require(known_dim, "[cuda] head_dim: got ", head_dim, ", wanted 64, 80, 96, 128 or 256");
  require(f.sub_dim == 2 || f.sub_dim == 4, "[cuda] n_subvectors: got ", n_subvectors, " of ",
          f.sub_dim, " dimensions, wanted sub-vectors of 4 or 2 dimensions");
  require(f.n_centroids <= kCodes && vecinfer::code_bits(f.n_centroids) == 8, "[cuda] tables: got ",
          f.n_centroids, " centroids, wanted a number for which codes take 8 bits, up to 256");
  // head_dim 80 is stored as 96, so that one kernel serves both.
  const int padded_dim = head_dim == 80 ? 96 : head_dim;
  f.n_chunks = padded_dim / f.sub_dim / 8;

  const Source source{static_cast<const uint16_t*>(tables.data),
                      static_cast<int>(tables.shape[extra + 1]), f.n_centroids, f.sub_dim};
  const int64_t heads = int64_t{f.n_sequences} * n_kv_heads;
  const int period = lane_tables(side);
  f.lookup = repeats(source, heads, n_subvectors, period) ? Lookup::by_lane : Lookup::by_subvector;
  f.entry = f.sub_dim == 2 ? Entry::half2 : Entry::int8x4;
  constexpr int entry_bytes = 4;
  const int padded = 8 * f.n_chunks;
  const int stored = f.lookup == Lookup::by_lane ? period : padded;
  f.entries_stride = int64_t{entry_bytes} * kCodes * stored;

  std::vector<uint8_t>& blob = prepared.blob;
  f.entries = 0;
  blob.resize(heads * f.entries_stride);
  f.scales = append_floats(blob, heads * padded);
  for (int64_t head = 0; head < heads; ++head) {
    for (int m = 0; m < n_subvectors; ++m) {
      const uint16_t* table = source.table(head, m);
      int exponent = 0;
      if (f.entry == Entry::int8x4) {
        require(int8_scale(table, int64_t{f.n_centroids} * 4, &exponent),
                "[cuda] tables: got entries that are not int8 times one power of two (sub-vector ",
                m, "), wanted tables rounded by round_tables_to_int8");
      }
      floats(blob, f.scales)[head * padded + m] = std::ldexp(1.0f, exponent);
      if (f.lookup == Lookup::by_lane && m >= period) continue;
      for (int code = 0; code < kCodes; ++code) {
        const int64_t at =
            f.lookup == Lookup::by_lane ? int64_t{code} * period + m : int64_t{m} * kCodes + code;
        write_entry(source, table, code, f.entry, exponent,
                    blob.data() + head * f.entries_stride + at * entry_bytes);
      }
    }
  }

  const int64_t matrix = int64_t{n_kv_heads} * head_dim * head_dim;
  if (transform.kind == TransformKind::dense) {
    f.encode_matrix = append_floats(blob, matrix);
    std::memcpy(floats(blob, f.encode_matrix), transform.encode_matrix.data, matrix * 4);
    f.read_matrix = append_floats(blob, matrix);
    const float* from = static_cast<const float*>(transform.query_matrix.data);
    float* to = floats(blob, f.read_matrix);
    for (int64_t e = 0; e < matrix; ++e) {
      const int64_t head = e / head_dim / head_dim, i = e / head_dim % head_dim, j = e % head_dim;
      to[side == Side::keys ? e : (head * head_dim + j) * head_dim + i] = from[e];
    }
    f.read_fragments = append_floats(blob, matrix);
    for (int head = 0; head < n_kv_heads; ++head) {
      const int64_t at = int64_t{head} * head_dim * head_dim * 4;
      write_fragments(floats(blob, f.read_matrix + at), head_dim,
                      blob.data() + f.read_fragments + at);
    }
  }
  f.has_scale = transform.kind == TransformKind::hadamard && !transform.scale.empty();
  if (transform.kind == TransformKind::hadamard) {  // factors of 1 where there are none
    const int64_t n = int64_t{n_kv_heads} * head_dim;
    f.lambda = append_floats(blob, n);
    f.inverse_lambda = append_floats(blob, n);
    for (int64_t i = 0; i < n; ++i) {
      const float lambda = f.has_scale ? static_cast<const float*>(transform.scale.data)[i] : 1.0f;
      floats(blob, f.lambda)[i] = lambda;
      floats(blob, f.inverse_lambda)[i] = 1.0f / lambda;
    }
  }
  const int64_t table_bytes = heads * source.n_tables * static_cast<int64_t>(source.bytes());
  f.n_tables = source.n_tables;
  f.tables = append_floats(blob, (table_bytes + 3) / 4);
  std::memcpy(blob.data() + f.tables, source.data, table_bytes);
  return prepared;
}

double round_tables_to_int8(const MutableTensorView& tables) {
  require(!tables.empty() && tables.dtype == DType::float16 && tables.ndim >= 2,
          "[round_tables_to_int8] tables: got ", dtype_name(tables.dtype), " of ", tables.ndim,
          " dimensions, wanted float16 [..., C, d]");
  const int64_t n = tables.shape[tables.ndim - 2] * tables.shape[tables.ndim - 1];
  int64_t dense = 1;
  for (int d = tables.ndim - 1; d >= 0; --d) {
    require(tables.shape[d] == 1 || tables.stride[d] == dense,
            "[round_tables_to_int8] tables: got a strided view, wanted row-major");
    dense *= tables.shape[d];
  }
  double change = 0, energy = 0;
  for (int64_t first = 0; first < dense; first += n) {
    uint16_t* table = static_cast<uint16_t*>(tables.data) + first;
    float top = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float x = f16_to_f32(table[i]);
      require(std::isfinite(x), "[round_tables_to_int8] tables: got ", x,
              ", wanted finite entries");
      top = std::fmax(top, std::fabs(x));
    }
    int e = -24;
    // 127.49 rounds to 127: clipping the largest entry a little beats halving everyone's
    // resolution.
    while (std::ldexp(127.5f, e) <= top) ++e;
    for (int64_t i = 0; i < n; ++i) {
      const float x = f16_to_f32(table[i]);
      const float rounded = std::ldexp(std::nearbyint(std::ldexp(x, -e)), e);
      change += (double{rounded} - x) * (double{rounded} - x);
      energy += double{x} * x;
      table[i] = f32_to_f16(rounded);
    }
  }
  return energy > 0 ? change / energy : 0.0;
}

}  // namespace veloxquant::cuda
