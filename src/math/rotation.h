// The seeded rotation of the codecs that assume no calibration: two rounds of random signs and the
// (block) Walsh-Hadamard transform of hadamard.h, y = H D2 P H D1 x.
//
// One round is not enough: it maps a vector with one large coordinate onto +-const, the worst case
// of a quantiser for Gaussian coordinates. Where head_dim is a power of two, P is the identity.
// Elsewhere H works in blocks (80 = 64 + 16) and P lets them mix: coordinate i goes to
// (i * step) mod head_dim, step near the golden section of head_dim, so that every block spreads
// evenly over all others. That costs 2 D log D additions and a permutation; a Haar matrix would
// cost D^2 multiplications and a table of D^2 numbers for the same distortion (measured in
// src/codecs/turboquant/README.md).
#pragma once

#include "src/math/hadamard.h"
#include "src/math/portable.h"

namespace veloxquant {

VQ_FN bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }

// The least step >= 0.618 head_dim that shares no divisor with it.
VQ_FN int rotation_step(int head_dim) {
  if (is_power_of_two(head_dim)) return 1;
  int step = (head_dim * 618 + 999) / 1000;
  for (;; ++step) {
    int a = head_dim, b = step;
    while (b != 0) {
      int rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) return step;
  }
}

// signs: +1 or -1, [2][head_dim] (D1, then D2). scratch: head_dim values. x in place.
template <class Signs, class Row>
VQ_FN void rotate_row(Signs signs, int head_dim, Row x, Row scratch) {
  for (int i = 0; i < head_dim; ++i) x[i] = mul(x[i], signs[i]);
  hadamard_row(x, head_dim);
  const int step = rotation_step(head_dim);
  int to = 0;
  for (int i = 0; i < head_dim; ++i) {
    scratch[to] = x[i];
    to = (to + step) % head_dim;
  }
  for (int i = 0; i < head_dim; ++i) x[i] = mul(scratch[i], signs[head_dim + i]);
  hadamard_row(x, head_dim);
}

// The inverse, D1 H P^T D2 H.
template <class Signs, class Row>
VQ_FN void rotate_row_back(Signs signs, int head_dim, Row x, Row scratch) {
  hadamard_row(x, head_dim);
  for (int i = 0; i < head_dim; ++i) scratch[i] = mul(x[i], signs[head_dim + i]);
  const int step = rotation_step(head_dim);
  int from = 0;
  for (int i = 0; i < head_dim; ++i) {
    x[i] = scratch[from];
    from = (from + step) % head_dim;
  }
  hadamard_row(x, head_dim);
  for (int i = 0; i < head_dim; ++i) x[i] = mul(x[i], signs[i]);
}

}  // namespace veloxquant
