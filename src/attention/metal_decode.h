// Fused attention of few query rows over packed codes and exact tokens on Metal.
//
// First pass: a threadgroup takes one item of the plan (some blocks of a span, or up to 64 exact
// tokens a simdgroup) of one KV head, for up to ROWS query rows of its group: every code is loaded
// once for all of them. Each simdgroup keeps its own online softmax over whole blocks; no barrier
// of the threadgroup until they merge at the end. Partial results go to `parts` [..][DIM] in the
// coordinates of the item (codec or original), maximum and sum (base 2) to `sums`.
// Second pass: merges the items, inverts the codec's transform once per row.
#pragma once

#include "src/attention/metal_pieces.h"
#include "src/codecs/commvq/metal_tile.h"
#include "src/codecs/exact/metal_tile.h"
#include "src/codecs/metal_rows.h"
#include "src/codecs/qjl/metal_outlier_tile.h"
#include "src/codecs/rabitq/metal_tile.h"
#include "src/codecs/rope/metal_tile.h"
#include "src/codecs/turboquant/metal_sketch_tile.h"
#include "src/codecs/turboquant/metal_tile.h"
#include "src/codecs/vecinfer/metal_tile.h"

namespace veloxquant {

// An item of the plan is six numbers: 0 packed or 1 exact; which span or exact array; its first
// block or token there; tokens; position of the first; packed: blocks that the span has room for.
//
// What a query sees, four numbers: positions [begin, end); packed tokens below code_end; exact ones
// below tail_start or from code_end on.
VQ_CONSTANT int kSeenNumbers = 4;

template <class Seen>
VQ_FN bool sees(Seen seen, int query, bool packed, int position) {
  const int begin = seen[kSeenNumbers * query], end = seen[kSeenNumbers * query + 1];
  const int code_end = seen[kSeenNumbers * query + 2];
  const int tail_start = seen[kSeenNumbers * query + 3];
  const bool form = packed ? position < code_end : position < tail_start || position >= code_end;
  return position >= begin && position < end && form;
}

// Positions of a form that a query sees end here.
template <class Seen>
VQ_FN int end_of_seen(Seen seen, int query, bool packed) {
  const int end = seen[kSeenNumbers * query + 1];
  return packed ? min(end, seen[kSeenNumbers * query + 2]) : end;
}

// exp2 of a difference that may be -inf - -inf. A NaN stays one, though no maximum sees it.
VQ_FN float power_below(float x, float maximum) {
  return maximum == -INFINITY && x == x ? 0.0f : exp2(x - maximum);
}

// One row's scores of a block, 4 a lane (both halves of a simdgroup hold the same 64), into
// weights p[64] of this simdgroup, probabilities times the tokens' factors; returns what earlier
// sums are multiplied with.
template <class P>
VQ_FN float softmax_step(VQ_THREAD const float* score, VQ_THREAD const float* factor,
                         VQ_THREAD float* maximum, VQ_THREAD float* sum, P p, uint lane) {
  const float largest = max(max(score[0], score[1]), max(score[2], score[3]));
  const float next = max(*maximum, simd_max(largest));
  const float keep = power_below(*maximum, next);
  float own = 0.0f;
  for (uint i = 0; i < 4; ++i) {
    const float power = power_below(score[i], next);
    own += power;
    if (lane < 16) p[4 * lane + i] = power * factor[i];
  }
  *sum = *sum * keep + 0.5f * simd_sum(own);
  *maximum = next;
  return keep;
}

// The merge of simdgroups: out [ROWS][DIM] and sums [ROWS][2] of the threadgroup, where queries and
// weights were. All threads.
// own(row, k): this lane's value number k of a row; place(k): its dimension, or -1.
template <int ROWS, int DIM, int N, class Out, class Sums>
VQ_FN void merge_simdgroups(VQ_THREAD float (*own)[N], VQ_THREAD const int* place,
                            VQ_THREAD const float* maximum, VQ_THREAD const float* sum, Out out,
                            Sums sums, uint simdgroup, uint n_simdgroups, uint lane) {
  for (uint turn = 0; turn < n_simdgroups; ++turn) {
    barrier_of_group();
    if (turn != simdgroup) continue;
    for (int r = 0; r < ROWS; ++r) {
      const float before = turn == 0 ? -INFINITY : sums[2 * r];
      const float next = max(before, maximum[r]);
      const float keep = power_below(before, next), add = power_below(maximum[r], next);
      for (int k = 0; k < N; ++k) {
        if (place[k] < 0) continue;
        const float mine = own[r][k] * add;
        out[r * DIM + place[k]] = turn == 0 ? mine : out[r * DIM + place[k]] * keep + mine;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes have read the old maximum
      if (lane == 0) {
        sums[2 * r + 1] = (turn == 0 ? 0.0f : sums[2 * r + 1] * keep) + sum[r] * add;
        sums[2 * r] = next;
      }
    }
  }
  barrier_of_group();
}

// Scores become logits of base 2: scaled (the query carries the scale), capped, masked.
template <int SOFTCAP, int MASK, class Seen, class Mask>
VQ_FN float finished_score(float score, float cap, Seen seen, int query, bool packed, int position,
                           bool there, Mask mask, int64_t mask_row, int64_t mask_step) {
  if (!there || !sees(seen, query, packed, position)) return -INFINITY;
  if (SOFTCAP) score = cap * M_LOG2E_F * tanh(score / (cap * M_LOG2E_F));
  if (MASK) score += M_LOG2E_F * (float)mask[mask_row + position * mask_step];
  return score;
}

// Block n of a span.
template <int WORDS, class Blocks>
VQ_FN Blocks block_at(Blocks blocks, int n) {
  return blocks + (int64_t)n * WORDS;
}

// Packed blocks first .. of one head, every n_simdgroups-th by this simdgroup.
// keys, values: tiles (src/attention/README.md, "Tiles on a GPU") without their blocks.
// q: [ROWS][KeyTile::DIM], transformed, times scale log2(e). p: [ROWS][64] of this simdgroup.
template <int ROWS, int SOFTCAP, int MASK, int N, class KeyTile, class ValueTile, class KeyBlocks,
          class ValueBlocks, class Q, class P, class Seen, class Mask>
VQ_FN void attend_blocks(KeyTile keys, KeyBlocks key_blocks, ValueTile values,
                         ValueBlocks value_blocks, int n_tokens, int position, Q q, P p, float cap,
                         Seen seen, VQ_THREAD const int* query, Mask mask,
                         VQ_THREAD const int64_t* mask_row, int64_t mask_step,
                         VQ_THREAD float (*own)[N], VQ_THREAD float* maximum, VQ_THREAD float* sum,
                         uint simdgroup, uint n_simdgroups, uint lane) {
  const int VSUB = ValueTile::SUB, STRETCH = ValueTile::STRETCH;
  const int VM = ValueTile::DIM / VSUB / ValueTile::KINDS;
  const uint word = lane % 16;
  const int lanes = value_lanes(VM), parts = 32 / lanes, part = (int)lane / lanes;
  float shift[ROWS];
  score_shifts<ROWS>(keys, q, shift, lane);
  for (int block = (int)simdgroup; 64 * block < n_tokens; block += (int)n_simdgroups) {
    keys.open(block_at<KeyTile::WORDS>(key_blocks, block));
    values.open(block_at<ValueTile::WORDS>(value_blocks, block));
    float score[ROWS][4];
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < 4; ++i) score[r][i] = 0.0f;
    }
    score_tokens<ROWS>(keys, q, word, (int)lane / 16, score);
    const int at = 64 * block + 4 * (int)word;
    float k_factor[4], v_factor[4];
    keys.factors(word, k_factor);
    values.factors(word, v_factor);
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < 4; ++i) {
        const float both = score[r][i] + simd_shuffle_xor(score[r][i], 16);
        const float whole = fma(both, k_factor[i], shift[r]);
        score[r][i] =
            finished_score<SOFTCAP, MASK>(whole, cap, seen, query[r], true, position + at + i,
                                          at + i < n_tokens, mask, mask_row[r], mask_step);
      }
      const float keep = softmax_step(score[r], v_factor, &maximum[r], &sum[r], p + 64 * r, lane);
      for (int k = 0; k < N; ++k) own[r][k] *= keep;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int words = 16 / parts, stretch = min(STRETCH, words);
#pragma unroll(STRETCH == 1 ? 2 : 1)
    for (int from = 0; from < words; from += stretch) {
      for (int k = 0; k < N / VSUB; ++k) {
        const int m = value_piece(k, VM, (int)lane);
        if (m < 0) continue;
#pragma unroll 2
        for (int n = from; n < from + stretch; ++n) {
          const uint w = (uint)(part * words) + stretch_word<STRETCH>(n, words);
          values.load(m, w);
          for (uint i = 0; i < 4; ++i) {
            values.token(i);
            float y[VSUB];
            for (int j = 0; j < VSUB; ++j) y[j] = values.value(j);
            for (int r = 0; r < ROWS; ++r) {
              const float weight = p[64 * r + 4 * w + i];
              for (int j = 0; j < VSUB; ++j) {
                own[r][k * VSUB + j] = fma(weight, y[j], own[r][k * VSUB + j]);
              }
            }
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // before the next block's probabilities
  }
  // Lanes that split the tokens of a sub-vector: their sums together, kept by the first of them.
  for (int width = lanes; width < 32; width *= 2) {
    for (int r = 0; r < ROWS; ++r) {
      for (int k = 0; k < N; ++k) own[r][k] += simd_shuffle_xor(own[r][k], (ushort)width);
    }
  }
  if (!ValueTile::SHIFTED) return;
  for (int k = 0; k < N; ++k) {
    const int m = value_piece(k / VSUB, VM, (int)lane);
    const float y = m < 0 ? 0.0f : shift_of(values, m * VSUB + k % VSUB);
    for (int r = 0; r < ROWS; ++r) own[r][k] = fma(sum[r], y, own[r][k]);
  }
}

// Exact tokens: lanes are tokens for the scores (two each), dimensions for the values.
// keys, values: the first token's row, `key_step`, `value_step` elements from one to the next.
template <int DIM, int ROWS, int BFLOAT, int SOFTCAP, int MASK, int N, class Keys, class Values,
          class Q, class P, class Seen, class Mask>
VQ_FN void attend_exact(Keys keys, int64_t key_step, Values values, int64_t value_step,
                        int n_tokens, int position, Q q, P p, float cap, Seen seen,
                        VQ_THREAD const int* query, Mask mask, VQ_THREAD const int64_t* mask_row,
                        int64_t mask_step, VQ_THREAD float (*own)[N], VQ_THREAD float* maximum,
                        VQ_THREAD float* sum, uint simdgroup, uint n_simdgroups, uint lane) {
  for (int tile = (int)simdgroup; 64 * tile < n_tokens; tile += (int)n_simdgroups) {
    // Four tokens a lane as for packed blocks; the halves of the simdgroup share the dimensions.
    const uint word = lane % 16, side = lane / 16;
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    float score[ROWS][4];
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < 4; ++i) score[r][i] = 0.0f;
    }
    const int at = 64 * tile + 4 * (int)word;
    for (int i = 0; i < 4; ++i) {
      if (at + i >= n_tokens) continue;
      for (int d = (int)side * (DIM / 2); d < ((int)side + 1) * (DIM / 2); ++d) {
        const float y = as_kept<BFLOAT>(keys[(at + i) * key_step + d]);
        for (int r = 0; r < ROWS; ++r) score[r][i] = fma(q[r * DIM + d], y, score[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < 4; ++i) {
        const float whole = score[r][i] + simd_shuffle_xor(score[r][i], 16);
        score[r][i] =
            finished_score<SOFTCAP, MASK>(whole, cap, seen, query[r], false, position + at + i,
                                          at + i < n_tokens, mask, mask_row[r], mask_step);
      }
      const float keep = softmax_step(score[r], ones, &maximum[r], &sum[r], p + 64 * r, lane);
      for (int k = 0; k < N; ++k) own[r][k] *= keep;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int t = 0; t < min(64, n_tokens - 64 * tile); ++t) {
      for (int k = 0; k < N; ++k) {
        const int d = (int)lane + 32 * k;
        if (d >= DIM) continue;
        const float y = as_kept<BFLOAT>(values[(64 * tile + t) * value_step + d]);
        for (int r = 0; r < ROWS; ++r) own[r][k] = fma(p[64 * r + t], y, own[r][k]);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Query rows of a tile into threadgroup memory, times factor (and the codec's smooth factors). An
// infinity becomes a NaN, which every score of the row then is.
template <int DIM, int ROWS, class Source, class Scale, class Q>
VQ_FN void load_queries(Source q, int group_size, int n_queries, int first_row, int n_rows,
                        float factor, Scale smooth, bool smoothed, Q to, uint self,
                        uint n_threads) {
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first_row + (int)(i / DIM), d = (int)(i % DIM);
    float x = 0.0f;
    // Row = query * group_size + head in the group; q is [head][query][DIM] of this group.
    if (row < n_rows)
      x = finite_or_nan(
          (float)q[((int64_t)(row % group_size) * n_queries + row / group_size) * DIM + d]);
    if (smoothed) x = x * smooth[d];
    to[i] = x * factor;
  }
}

// to_j = sum_i matrix[j][i] from_i of one row, a row of the matrix a simdgroup; complete before and
// after.
template <int DIM, class Matrix, class Row>
VQ_FN void multiply_row(Matrix matrix, Row from, Row to, uint self, uint n_threads) {
  barrier_of_group();
  for (uint j = self / 32; j < DIM; j += n_threads / 32) {
    float total = 0.0f;
    for (uint i = self % 32; i < DIM; i += 32) {
      total = fma((float)from[i], (float)matrix[j * DIM + i], total);
    }
    total = simd_sum(total);
    if (self % 32 == 0) to[j] = total;
  }
  barrier_of_group();
}

// to_j = sum_i matrix[i][j] from_i, likewise.
template <int DIM, class Matrix, class Row>
VQ_FN void multiply_row_transposed(Matrix matrix, Row from, Row to, uint self, uint n_threads) {
  barrier_of_group();
  for (uint j = self; j < DIM; j += n_threads) {
    float total = 0.0f;
    for (uint i = 0; i < DIM; ++i) total = fma((float)from[i], (float)matrix[i * DIM + j], total);
    to[j] = total;
  }
  barrier_of_group();
}

// The result of `values` of all simdgroups, to all threads. partial: a number a simdgroup.
template <class Partial>
VQ_FN float largest_of_group(float own, Partial partial, uint self, uint n_threads) {
  own = simd_max(own);
  if (self % 32 == 0) partial[self / 32] = own;
  barrier_of_group();
  for (uint i = 0; i < n_threads / 32; ++i) own = max(own, (float)partial[i]);
  barrier_of_group();
  return own;
}
template <class Partial>
VQ_FN float sum_of_group(float own, Partial partial, uint self, uint n_threads) {
  own = simd_sum(own);
  if (self % 32 == 0) partial[self / 32] = own;
  barrier_of_group();
  own = 0.0f;
  for (uint i = 0; i < n_threads / 32; ++i) own += partial[i];
  barrier_of_group();
  return own;
}

// Merges the items of a row: parts [items][n_rows][DIM], sums [items][n_rows][2] of one KV head.
// packed, exact: sums over items in their coordinates, [SLICES][DIM] each of which the first row is
// the result, before inverse and division. A thread has a dimension and every SLICES-th item:
// n_threads is SLICES times STRIDE, at least DIM. weights: [n_threads]. Complete after.
template <int DIM, int STRIDE, int SLICES, class Parts, class Sums, class Row>
VQ_FN void merge_items(Parts parts, Sums sums, int n_items, int n_packed, int n_rows, int row,
                       float sink, Row packed, Row exact, Row weights, Row partial,
                       VQ_THREAD float* maximum, VQ_THREAD float* total, uint self,
                       uint n_threads) {
  float m = sink;
  for (int i = (int)self; i < n_items; i += (int)n_threads) {
    m = max(m, (float)sums[2 * ((int64_t)i * n_rows + row)]);
  }
  m = largest_of_group(m, partial, self, n_threads);
  const int d = (int)self % STRIDE, slice = (int)self / STRIDE;
  float l = self == 0 ? power_below(sink, m) : 0.0f, a = 0.0f, b = 0.0f;
  for (int first = 0; first < n_items; first += (int)n_threads) {
    const int own = first + (int)self, here = min((int)n_threads, n_items - first);
    if (own < n_items) {
      const int64_t at = 2 * ((int64_t)own * n_rows + row);
      const float weight = power_below(sums[at], m);
      weights[self] = weight;
      l += weight * sums[at + 1];
    }
    barrier_of_group();
    for (int i = slice; i < here && d < DIM; i += SLICES) {
      const float part = parts[((int64_t)(first + i) * n_rows + row) * DIM + d];
      const float y = weights[i] == 0.0f ? 0.0f : weights[i] * part;  // then never written, perhaps
      a += first + i < n_packed ? y : 0.0f;
      b += first + i < n_packed ? 0.0f : y;
    }
    barrier_of_group();
  }
  if (d < DIM) {
    packed[slice * DIM + d] = a;
    exact[slice * DIM + d] = b;
  }
  *maximum = m;
  *total = sum_of_group(l, partial, self, n_threads);
  for (uint i = self; i < DIM; i += n_threads) {
    for (int s = 1; s < SLICES; ++s) {
      packed[i] += packed[s * DIM + (int)i];
      exact[i] += exact[s * DIM + (int)i];
    }
  }
  barrier_of_group();
}

}  // namespace veloxquant
