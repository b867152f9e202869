// What codecs share that give tensor cores their operands: pairs of halves in a word.
#pragma once

#include "src/codecs/metal_mma.h"
#include "src/codecs/metal_rows.h"

namespace veloxquant {

// Quad u of the `quads` of a lane, of DIM / 4: beyond them the last, whose sums nobody asks for.
template <int DIM>
VQ_FN int value_quad(int quads, int u, uint g) {
  const int quad = quads * (int)g + u;
  return DIM % 32 == 0 ? quad : min(quad, DIM / 4 - 1);
}

// Four dimensions (two words) of tokens a, b and c, d: w[i] has dimension i of a and b, of c and d.
VQ_FN void turned_pairs(uint2 a, uint2 b, uint2 c, uint2 d, VQ_THREAD uint32_t (*w)[2]) {
  w[0][0] = first_halves(a.x, b.x);
  w[1][0] = second_halves(a.x, b.x);
  w[2][0] = first_halves(a.y, b.y);
  w[3][0] = second_halves(a.y, b.y);
  w[0][1] = first_halves(c.x, d.x);
  w[1][1] = second_halves(c.x, d.x);
  w[2][1] = first_halves(c.y, d.y);
  w[3][1] = second_halves(c.y, d.y);
}

}  // namespace veloxquant
