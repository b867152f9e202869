// The executable specification of VecInfer: plain loops over the shared arithmetic of src/math.
#include <cstring>
#include <vector>

#include "src/codecs/vecinfer/kernels.h"
#include "src/math/centroids.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"

namespace veloxquant::vecinfer {
namespace {

void nearest_centroids(const float* x, int64_t x_stride, int64_t n, const float* table,
                       int n_centroids, int sub_dim, uint16_t* codes, float* distance) {
  for (int64_t t = 0; t < n; ++t) {
    float best;
    codes[t] = static_cast<uint16_t>(
        nearest_centroid(x + t, x_stride, table, n_centroids, sub_dim, &best));
    if (distance != nullptr) distance[t] = best;
  }
}

void encode_block(const HeadTables& head, const float* y_t, uint8_t* block) {
  const int table_size = head.n_centroids * head.sub_dim;
  std::vector<float> table(table_size);
  uint16_t codes[kBlockTokens];
  std::memset(block, 0, head.n_subvectors * row_bytes(head.bits));
  for (int m = 0; m < head.n_subvectors; ++m) {
    for (int i = 0; i < table_size; ++i) table[i] = f16_to_f32(head.table(m)[i]);
    nearest_centroids(y_t + m * head.sub_dim * kBlockTokens, kBlockTokens, kBlockTokens,
                      table.data(), head.n_centroids, head.sub_dim, codes, nullptr);
    uint8_t* row = block + m * row_bytes(head.bits);
    for (int t = 0; t < kBlockTokens; ++t) set_code(row, head.bits, t, codes[t]);
  }
}

// Calls write(token, dimension, value) for every element of the first n_tokens tokens.
template <class Write>
void decode(const HeadTables& head, const uint8_t* block, int n_tokens, const Write& write) {
  for (int m = 0; m < head.n_subvectors; ++m) {
    const uint8_t* row = block + m * row_bytes(head.bits);
    for (int t = 0; t < n_tokens; ++t) {
      uint32_t code = get_code(row, head.bits, t);
      if (code >= static_cast<uint32_t>(head.n_centroids)) code = head.n_centroids - 1;
      const uint16_t* centroid = head.table(m) + code * head.sub_dim;
      for (int i = 0; i < head.sub_dim; ++i) {
        write(t, m * head.sub_dim + i, f16_to_f32(centroid[i]));
      }
    }
  }
}

void decode_block(const HeadTables& head, const uint8_t* block, int n_tokens, float* y,
                  int64_t y_stride) {
  decode(head, block, n_tokens, [&](int t, int d, float value) { y[t * y_stride + d] = value; });
}

void decode_block_transposed(const HeadTables& head, const uint8_t* block, int n_tokens,
                             float* y_t) {
  std::memset(y_t, 0, sizeof(float) * head.head_dim * kBlockTokens);
  decode(head, block, n_tokens,
         [&](int t, int d, float value) { y_t[d * kBlockTokens + t] = value; });
}

void hadamard_tile(const float* inverse_scale, int head_dim, float* x_t) {
  std::vector<float> row(head_dim);
  for (int t = 0; t < kBlockTokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      float x = x_t[d * kBlockTokens + t];
      row[d] = inverse_scale == nullptr ? x : mul(x, inverse_scale[d]);
    }
    hadamard_row(row.data(), head_dim);
    for (int d = 0; d < head_dim; ++d) x_t[d * kBlockTokens + t] = row[d];
  }
}

void dense_tile(const float* matrix, int head_dim, const float* x_t, float* y_t) {
  for (int t = 0; t < kBlockTokens; ++t) {
    for (int j = 0; j < head_dim; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < head_dim; ++i) {
        float product = mul(x_t[i * kBlockTokens + t], matrix[i * head_dim + j]);
        sum = i == 0 ? product : sum + product;
      }
      y_t[j * kBlockTokens + t] = sum;
    }
  }
}

void dense_rows(const float* matrix, int head_dim, bool transposed, const float* x, int64_t n,
                float* y) {
  for (int64_t r = 0; r < n; ++r) {
    for (int j = 0; j < head_dim; ++j) {
      float sum = 0.0f;
      for (int i = 0; i < head_dim; ++i) {
        const float factor = transposed ? matrix[j * head_dim + i] : matrix[i * head_dim + j];
        const float product = mul(x[r * head_dim + i], factor);
        sum = i == 0 ? product : sum + product;
      }
      y[r * head_dim + j] = sum;
    }
  }
}

void query_lut(const float* q, const float* columns, int n_centroids, int sub_dim, float* out) {
  for (int c = 0; c < n_centroids; ++c) {
    float sum = mul(q[0], columns[c]);
    for (int i = 1; i < sub_dim; ++i) sum += mul(q[i], columns[int64_t{i} * n_centroids + c]);
    out[c] = sum;
  }
}

}  // namespace

const Kernels& reference_kernels() {
  static const Kernels kernels{encode_block, decode_block, decode_block_transposed, hadamard_tile,
                               dense_tile,   dense_rows,   nearest_centroids,       query_lut};
  return kernels;
}

}  // namespace veloxquant::vecinfer
