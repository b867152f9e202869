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

// A slot of a token: its number among all heads', its row, and how it turns.
struct SlotPlace {
  int64_t own, row;
  int first, second;
  bool turns;
  float c, s;
};
template <int DIM, int ROTATING, class Slots, class Table>
VQ_FN SlotPlace slot_of(Slots slots, Table cosines, Table sines, int n_tokens, int n_heads,
                        uint3 at) {
  SlotPlace place;
  place.own = at.z % n_heads * (DIM / 2) + at.x;
  place.row = ((int64_t)at.z * n_tokens + at.y) * DIM;
  place.first = slots[3 * place.own + 1];
  place.second = slots[3 * place.own + 2];
  const int pair = slots[3 * place.own];
  place.turns = pair < ROTATING;
  const int64_t entry = place.turns ? ((int64_t)(at.y / 64) * ROTATING + pair) * 64 + at.y % 64 : 0;
  place.c = cosines[entry];
  place.s = sines[entry];
  return place;
}

// x [n_tokens][DIM] of a plane, any float -> z fp32. thread: (slot, token, plane).
template <int DIM, int ROTATING, int PLANES, class X, class Slots, class Weights, class Table,
          class Z>
VQ_FN void rope_to_slots(X x, int n_tokens, int n_heads, Slots slots, Weights weights,
                         Table cosines, Table sines, Z z, uint3 at) {
  const SlotPlace to = slot_of<DIM, ROTATING>(slots, cosines, sines, n_tokens, n_heads, at);
  float a = (float)x[to.row + to.first], b = (float)x[to.row + to.second];
  if (to.turns) {
    const float turned = mul(a, to.c) + mul(b, to.s);
    b = mul(b, to.c) - mul(a, to.s);
    a = turned;
  }
  z[to.row + slot_place(DIM, (int)at.x, 0, PLANES != 0)] = mul(a, weights[to.own]);
  z[to.row + slot_place(DIM, (int)at.x, 1, PLANES != 0)] = mul(b, weights[to.own]);
}

// And back; weights: the inverse ones.
template <int DIM, int ROTATING, int PLANES, class Z, class Slots, class Weights, class Table,
          class Y>
VQ_FN void rope_from_slots(Z z, int n_tokens, int n_heads, Slots slots, Weights weights,
                           Table cosines, Table sines, Y y, uint3 at) {
  const SlotPlace of = slot_of<DIM, ROTATING>(slots, cosines, sines, n_tokens, n_heads, at);
  float a = mul(z[of.row + slot_place(DIM, (int)at.x, 0, PLANES != 0)], weights[of.own]);
  float b = mul(z[of.row + slot_place(DIM, (int)at.x, 1, PLANES != 0)], weights[of.own]);
  if (of.turns) {
    const float turned = mul(a, of.c) - mul(b, of.s);
    b = mul(a, of.s) + mul(b, of.c);
    a = turned;
  }
  y[of.row + of.first] = a;
  y[of.row + of.second] = b;
}

}  // namespace veloxquant
