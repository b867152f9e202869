// The inner loops of the CPU path, compiled once per SIMD level and picked at run time.
// Every matrix is fp32, row-major; strides count elements.
#pragma once

#include <cstdint>

#include "veloxquant/tensor_view.h"

namespace veloxquant::attention {

// Columns of `multiply` come in multiples of this: the widest vector, in floats.
constexpr int kColumnStep = 16;

constexpr int64_t padded_columns(int64_t n) {
  return (n + kColumnStep - 1) / kColumnStep * kColumnStep;
}

// Tokens of an exact run -> rows [count][row_stride], rounded to `keep` as the cache keeps them
// (see as_kept in element.h). head_dim is a multiple of 8.
void load_exact_rows(const void* tokens, DType dtype, int64_t token_stride, DType keep, int count,
                     int head_dim, float* rows, int64_t row_stride);

// rows [count][row_stride] -> columns [head_dim][64]. Tokens up to the next multiple of 4 are
// read and written too.
void transpose_rows(const float* rows, int64_t row_stride, int count, int head_dim, float* columns);

// c[r] = row_scale[r] * c[r] + a[r] b, or c[r] = a[r] b where row_scale is null;
// a [n_rows][depth], b [depth][n_columns].
struct MatrixProduct {
  int n_rows = 0, n_columns = 0, depth = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t b_stride = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  const float* row_scale = nullptr;
};
void multiply(const MatrixProduct& product);

// One step of the online softmax on a tile of scores [n_rows][64], in units of log 2: replaces them
// by exp2(score - new max), moves max and sum on, and says by how much earlier output shrinks.
struct SoftmaxStep {
  int n_rows = 0;
  float* scores = nullptr;     // in: q . k; out: probabilities, 0 where invisible
  int64_t stride = 64;         // from one row of scores to the next
  const int* begin = nullptr;  // per row, columns [begin, end) are visible
  const int* end = nullptr;
  const float* mask = nullptr;  // [n_rows][64], added to the score (not in log 2); or null
  float scale = 1;              // scale * log2(e), or the plain scale with a softcap
  float softcap = 0;            // > 0: score = softcap * log2(e) * tanh(scale * q.k / softcap)
  float* max = nullptr;         // in and out; -inf at the start
  float* sum = nullptr;         // in and out; 0 at the start
  float* shrink = nullptr;      // out: exp2(old max - new max)
};
void softmax_step(const SoftmaxStep& step);

// The same in two passes, where all scores are known before the first value is needed. First:
// scaled and masked scores in place, max moves on. Then: exp2(score - max), sum moves on.
void mask_scores(const SoftmaxStep& step);
void exponentiate(const SoftmaxStep& step);

}  // namespace veloxquant::attention
