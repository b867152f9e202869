// Rotary embeddings on Metal, undone before tokens are encoded and redone behind their decoding
// (src/codecs/vecinfer_rope, src/codecs/commvq). Cosines and sines are the CPU's (Rope::tables):
// they are decided in double precision, which Metal does not have.
//
// A slot holds a pair of dimensions. slots: int32 [heads][DIM / 2][3], the pair's place in the
// tables (or ROTATING and more: it does not rotate) and its dimensions; weights: of the slots.
// cosines, sines: [blocks][ROTATING][64]. planes: 1, all first members, then all second ones; 0,
// pairs.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

VQ_FN int slot_place(int dim, int slot, int member, bool planes) {
  return planes ? member * (dim / 2) + slot : 2 * slot + member;
}

// x [n_tokens][DIM] of a plane, any float -> z fp32. thread: (slot, token, plane).
template <int DIM, int ROTATING, int PLANES, class X, class Slots, class Weights, class Table,
          class Z>
VQ_FN void rope_to_slots(X x, int n_tokens, int n_heads, Slots slots, Weights weights,
                         Table cosines, Table sines, Z z, uint3 at) {
  const int64_t own = at.z % n_heads * (DIM / 2) + at.x,
                row = ((int64_t)at.z * n_tokens + at.y) * DIM;
  const int pair = slots[3 * own];
  float a = (float)x[row + slots[3 * own + 1]], b = (float)x[row + slots[3 * own + 2]];
  if (pair < ROTATING) {
    const int64_t place = ((int64_t)(at.y / 64) * ROTATING + pair) * 64 + at.y % 64;
    const float c = cosines[place], s = sines[place];
    const float turned = mul(a, c) + mul(b, s);
    b = mul(b, c) - mul(a, s);
    a = turned;
  }
  z[row + slot_place(DIM, (int)at.x, 0, PLANES != 0)] = mul(a, weights[own]);
  z[row + slot_place(DIM, (int)at.x, 1, PLANES != 0)] = mul(b, weights[own]);
}

// And back; weights: the inverse ones.
template <int DIM, int ROTATING, int PLANES, class Z, class Slots, class Weights, class Table,
          class Y>
VQ_FN void rope_from_slots(Z z, int n_tokens, int n_heads, Slots slots, Weights weights,
                           Table cosines, Table sines, Y y, uint3 at) {
  const int64_t own = at.z % n_heads * (DIM / 2) + at.x,
                row = ((int64_t)at.z * n_tokens + at.y) * DIM;
  const int pair = slots[3 * own];
  float a = mul(z[row + slot_place(DIM, (int)at.x, 0, PLANES != 0)], weights[own]);
  float b = mul(z[row + slot_place(DIM, (int)at.x, 1, PLANES != 0)], weights[own]);
  if (pair < ROTATING) {
    const int64_t place = ((int64_t)(at.y / 64) * ROTATING + pair) * 64 + at.y % 64;
    const float c = cosines[place], s = sines[place];
    const float turned = mul(a, c) - mul(b, s);
    b = mul(a, s) + mul(b, c);
    a = turned;
  }
  y[row + slots[3 * own + 1]] = a;
  y[row + slots[3 * own + 2]] = b;
}

}  // namespace veloxquant
