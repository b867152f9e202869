// Rows of tokens in a threadgroup's memory: into it, through a matrix or the seeded rotation, and
// their sums. All threads of the threadgroup call these; `self` is a thread's number.
#pragma once

#include "src/backends/metal/common.h"
#include "src/math/finite.h"
#include "src/math/rotation.h"
#include "src/math/row_sums.h"

namespace veloxquant {

// Rows first, first + 1, ... of a plane [n_rows][DIM] into a tile; 0 beyond the last.
template <int DIM, int ROWS, class X, class Rows>
VQ_FN void load_tile(X x, int first, int n_rows, Rows rows, uint self, uint n_threads) {
  for (uint i = self; i < ROWS * DIM; i += n_threads) {
    const int row = first + (int)(i / DIM);
    rows[i] = row < n_rows ? (float)x[(int64_t)row * DIM + i % DIM] : 0.0f;
  }
}

// to = matrix from, or its transpose times from, by rows; sums over ascending columns.
template <int DIM, bool TRANSPOSED, class Matrix, class From, class To>
VQ_FN void multiply_rows(Matrix matrix, From from, To to, uint n_rows, uint self, uint n_threads) {
  barrier_of_group();
  for (uint i = self; i < n_rows * DIM; i += n_threads) {
    const uint row = i / DIM, j = i % DIM;
    float sum = 0.0f;
    for (uint k = 0; k < DIM; ++k) {
      const float entry = matrix[TRANSPOSED ? k * DIM + j : j * DIM + k];
      const float product = mul(from[row * DIM + k], entry);
      sum = k == 0 ? product : sum + product;
    }
    to[i] = sum;
  }
  barrier_of_group();
}

// rotate_row of n_rows rows (src/math/rotation.h). moved: as large as the rows. Complete after.
template <int DIM, class Signs, class Rows>
VQ_FN void rotate_rows(Signs signs, Rows rows, Rows moved, uint n_rows, uint self, uint n_threads) {
  barrier_of_group();
  for (uint i = self; i < n_rows * DIM; i += n_threads) rows[i] = mul(rows[i], signs[i % DIM]);
  hadamard_rows<DIM>(rows, n_rows, self, n_threads);
  const uint step = (uint)rotation_step(DIM);
  if (step > 1) {
    for (uint i = self; i < n_rows * DIM; i += n_threads) {
      moved[i / DIM * DIM + i % DIM * step % DIM] = rows[i];
    }
    barrier_of_group();
  }
  for (uint i = self; i < n_rows * DIM; i += n_threads) {
    rows[i] = mul(step > 1 ? moved[i] : rows[i], signs[DIM + i % DIM]);
  }
  hadamard_rows<DIM>(rows, n_rows, self, n_threads);
}

// rotate_row_back, likewise.
template <int DIM, class Signs, class Rows>
VQ_FN void rotate_rows_back(Signs signs, Rows rows, Rows moved, uint n_rows, uint self,
                            uint n_threads) {
  hadamard_rows<DIM>(rows, n_rows, self, n_threads);
  const uint step = (uint)rotation_step(DIM);
  for (uint i = self; i < n_rows * DIM; i += n_threads) {
    moved[i] = mul(rows[i], signs[DIM + i % DIM]);
  }
  barrier_of_group();
  for (uint i = self; i < n_rows * DIM; i += n_threads) {
    rows[i] = moved[i / DIM * DIM + i % DIM * step % DIM];
  }
  hadamard_rows<DIM>(rows, n_rows, self, n_threads);
  for (uint i = self; i < n_rows * DIM; i += n_threads) rows[i] = mul(rows[i], signs[i % DIM]);
  barrier_of_group();
}

// dot_row (src/math/row_sums.h) by a simdgroup: lanes l and l + 16 hold partial sum l. Every lane
// gets the sum. All lanes of the simdgroup.
template <class A, class B>
VQ_FN float simd_dot_row(A a, B b, int n, uint lane) {
  float partial = 0.0f;
  for (int i = (int)lane % kRowLanes; i < n; i += kRowLanes) partial = partial + mul(a[i], b[i]);
  for (ushort width = kRowLanes / 2; width > 0; width /= 2) {
    partial = partial + simd_shuffle_xor(partial, width);
  }
  return partial;
}

// n bits at a bit of a stream of 32-bit words, least significant first; 1 <= n <= 31.
template <class Words>
VQ_FN uint32_t bits_at(Words words, int at, int n) {
  const int first = at / 32, shift = at % 32;
  uint32_t bits = words[first] >> shift;
  if (shift + n > 32) bits |= words[first + 1] << (32 - shift);
  return bits & ((1u << n) - 1u);
}

// Number i of the fp16 numbers from a word on.
template <class Words>
VQ_FN float half_at(Words words, int i) {
  return f16_to_f32((uint16_t)(words[i / 2] >> (16 * (i % 2))));
}
// Numbers 4 w .. 4 w + 3 of them by the GPU's own conversion, without a branch: for attention.
template <class Words>
VQ_FN void four_halves(Words words, uint w, VQ_THREAD float* to) {
  const uint32_t pairs[2] = {words[2u * w], words[2u * w + 1u]};
  for (int i = 0; i < 4; ++i)
    to[i] = (float)as_type<half>((ushort)(pairs[i / 2] >> (16 * (i % 2))));
}

// Factors of tokens that have none.
VQ_FN void all_ones(VQ_THREAD float* to) {
  for (int i = 0; i < 4; ++i) to[i] = 1.0f;
}

// Field number `field` of eight, each four codes of 3 bits, in three words: the middle one and that
// of the outer two which the field needs.
VQ_FN uint32_t field_of_three(uint32_t outer, uint32_t middle, uint field) {
  const uint64_t low = field < 4u ? outer : middle, high = field < 4u ? middle : outer;
  return (uint32_t)((high << 32 | low) >> (12u * (field % 4u) + (field < 4u ? 0u : 16u)));
}

// Field n of a stream of `bits` bits each, four codes of 1 to 4 bits. A simdgroup whose lanes read
// neighbouring fields loads every word once: eight fields of 12 bits are three words, the outer
// two by one load, the middle one by another.
template <int BITS, class Words>
VQ_FN uint32_t four_codes(Words words, uint n) {
  if (BITS != 3) return words[n * BITS / 8u] >> (n * BITS % 8u * 4u);
  Words three = words + n / 8u * 3u;
  return field_of_three(three[n % 8u < 4u ? 0 : 2], three[1], n % 8u);
}

// Fields m of tokens 4 w .. 4 w + 3 of a stream of FIELDS each. Of two tokens that end and begin in
// one word (eight fields are BITS words, of which it is the middle one) every lane reads that word
// for both.
template <int BITS, int FIELDS, class Words>
VQ_FN void four_tokens(Words words, uint w, uint m, VQ_THREAD uint32_t* to) {
  if (BITS % 2 == 0 || FIELDS % 8 != 4 || FIELDS < 8) {
    for (uint i = 0; i < 4; ++i) to[i] = four_codes<BITS>(words, (4u * w + i) * FIELDS + m);
    return;
  }
  const uint shared = FIELDS / 8, middle = BITS / 2, behind = shared + (m + 4u) / 8u;
  for (uint pair = 0; pair < 2; ++pair) {
    Words two = words + (2u * w + pair) * (uint)(FIELDS * BITS / 4);
    const uint32_t both = two[shared * BITS + middle];
    const uint32_t before = two[min(m / 8u, shared - 1u) * BITS + middle];
    const uint32_t after = two[max(behind, shared + 1u) * BITS + middle];
    const uint32_t here = m / 8u == shared ? both : before;
    const uint32_t next = behind == shared ? both : after;
    const uint field = m % 8u, other = (m + 4u) % 8u;
    if (BITS == 1) {
      to[2u * pair] = here >> (field * 4u);
      to[2u * pair + 1u] = next >> (other * 4u);
    } else {
      const uint32_t outer = two[m / 8u * BITS + (field < 4u ? 0u : 2u)];
      const uint32_t outer_next = two[behind * BITS + (other < 4u ? 0u : 2u)];
      to[2u * pair] = field_of_three(outer, here, field);
      to[2u * pair + 1u] = field_of_three(outer_next, next, other);
    }
  }
}

}  // namespace veloxquant
