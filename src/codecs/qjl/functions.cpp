// The functions of QJL on their own: sketch, encode, inner product.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/codecs/qjl/kernels.h"
#include "src/codecs/qjl/sketch.h"
#include "src/codecs/rabitq/format.h"
#include "src/math/finite.h"
#include "src/math/float16.h"
#include "veloxquant/qjl.h"

namespace veloxquant {
namespace qjl {

void column_norms(const float* x_t, int dim, float* norms) {
  float sums[kBlockTokens] = {};
  for (int d = 0; d < dim; ++d) {
    for (int t = 0; t < kBlockTokens; ++t) {
      sums[t] += mul(x_t[d * kBlockTokens + t], x_t[d * kBlockTokens + t]);
    }
  }
  for (int t = 0; t < kBlockTokens; ++t) norms[t] = std::sqrt(sums[t]);
}

namespace {

// Sums of +-q for every byte of signs: table[b][v] = sum of the 8 queries of byte b under v.
constexpr int kTableBytes = 16;  // 16 tables of 256: 16 KB, half of L1
void fill_tables(const float* q, int n_bytes, float (*table)[256]) {
  for (int b = 0; b < n_bytes; ++b, q += 8) {
    float sum = -q[0];
    for (int j = 1; j < 8; ++j) sum -= q[j];
    table[b][0] = sum;
    for (int v = 1; v < 256; ++v) {
      int lowest = 0;
      while (((v >> lowest) & 1) == 0) ++lowest;
      table[b][v] = table[b][v & (v - 1)] + mul(2.0f, q[lowest]);
    }
  }
}

// sums[i] += table sums of keys i; kKeys chains of additions at once.
template <int kKeys>
void add_keys(const float (*table)[256], int n_bytes, const uint8_t* signs, int64_t stride,
              float* sums) {
  float held[kKeys];
  for (int k = 0; k < kKeys; ++k) held[k] = sums[k];
  for (int b = 0; b < n_bytes; ++b) {
    for (int k = 0; k < kKeys; ++k) held[k] += table[b][signs[k * stride + b]];
  }
  for (int k = 0; k < kKeys; ++k) sums[k] = held[k];
}

void score_keys(const QjlScores& work, int head, int64_t begin, int64_t end) {
  const int key_head = head / (work.n_query_heads / work.n_key_heads);
  const float* q = work.queries + static_cast<int64_t>(head) * work.m;
  const float* norms = work.norms + key_head * work.norm_head_stride;
  float* scores = work.scores + head * work.n_keys;
  const float constant = static_cast<float>(kRootHalfPi / work.m);
  std::fill(scores + begin, scores + end, 0.0f);
  float table[kTableBytes][256];
  for (int first = 0; first < work.m / 8; first += kTableBytes) {
    const int n_bytes = std::min(kTableBytes, work.m / 8 - first);
    fill_tables(q + 8 * first, n_bytes, table);
    const uint8_t* signs = work.signs + key_head * work.sign_head_stride + first;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      add_keys<4>(table, n_bytes, signs + i * work.sign_key_stride, work.sign_key_stride,
                  scores + i);
    }
    for (; i < end; ++i) {
      add_keys<1>(table, n_bytes, signs + i * work.sign_key_stride, work.sign_key_stride,
                  scores + i);
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    scores[i] = mul(mul(constant, norms[i * work.norm_key_stride]), scores[i]);
  }
}

}  // namespace
}  // namespace qjl

void qjl_sketch(int head_dim, int m, uint64_t seed, float* sketch) {
  require(head_dim >= 1 && m >= head_dim && m % head_dim == 0, "[qjl_sketch] m: got ", m,
          ", wanted a multiple of head_dim = ", head_dim);
  const float length = std::sqrt(static_cast<float>(head_dim));
  const int64_t size = static_cast<int64_t>(head_dim) * head_dim;
  for (int block = 0; block < m / head_dim; ++block) {
    // Row j of R is R^T e_j.
    float* rows = sketch + block * size;
    std::fill(rows, rows + size, 0.0f);
    for (int j = 0; j < head_dim; ++j) rows[j * head_dim + j] = length;
    qjl::sketch_rotation(head_dim, seed, block).inverse(Backend::reference, rows, head_dim);
  }
}

void qjl_encode(Backend backend, const float* x, int64_t n, int dim, const float* sketch, int m,
                uint8_t* signs, uint16_t* norms) {
  require(dim >= 1, "[qjl_encode] dim: got ", dim, ", wanted at least 1");
  require(m >= 8 && m % 8 == 0, "[qjl_encode] m: got ", m, ", wanted a multiple of 8");
  parallel_ranges(n, kBlockTokens, [&](int64_t begin, int64_t end) {
    const int count = static_cast<int>(end - begin);
    std::vector<float> tile(static_cast<size_t>(dim) * kBlockTokens);
    rabitq::to_tile(x + begin * dim, count, dim, tile.data());
    for (float& value : tile) value = finite_or_clamped(value);
    std::vector<float> sketched(static_cast<size_t>(m) * kBlockTokens);
    qjl::project_of(backend)(sketch, m, dim, tile.data(), sketched.data());
    std::vector<uint8_t> planes(rabitq::plane_bytes(m, 1));
    float squares[kBlockTokens], sums[kBlockTokens], levels[kBlockTokens];
    rabitq::levels_of(backend).encode(sketched.data(), m, 1, planes.data(), squares, sums, levels);
    rabitq::planes_to_rows(planes.data(), m, count, signs + begin * (m / 8), m / 8);
    float lengths[kBlockTokens];
    qjl::column_norms(tile.data(), dim, lengths);
    for (int t = 0; t < count; ++t) {
      const uint16_t half = f32_to_f16(lengths[t]);
      norms[begin + t] = half >= 0x7c00u ? 0x7bffu : half;
    }
  });
}

void qjl_inner_product(const QjlScores& work) {
  require(work.m >= 8 && work.m % 8 == 0, "[qjl_inner_product] m: got ", work.m,
          ", wanted a multiple of 8");
  require(work.n_key_heads >= 1 && work.n_query_heads % work.n_key_heads == 0,
          "[qjl_inner_product] query heads: got ", work.n_query_heads,
          ", wanted a multiple of the key heads, ", work.n_key_heads);
  constexpr int64_t kPiece = 4096;  // keys: many times what its tables cost
  const int64_t pieces = (work.n_keys + kPiece - 1) / kPiece;
  parallel_for(work.n_query_heads * pieces, [&](long i) {
    const int64_t begin = i % pieces * kPiece;
    qjl::score_keys(work, static_cast<int>(i / pieces), begin,
                    std::min(begin + kPiece, work.n_keys));
  });
}

}  // namespace veloxquant
