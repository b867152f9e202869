// Packed blocks and rows of tokens wherever the caller keeps them: strided storage, or a pool that
// a table of each sequence points into. For kernels that a codec's own text works inside of.
#pragma once

#include "src/math/portable.h"

namespace veloxquant {

// Where block n of a sequence and head lies: base + n * step, in units of what base points at.
template <class P>
struct StridedBlocks {
  P base;
  int64_t step;
  P at(int n) const { return base + n * step; }
};

// Number n of a table of blocks; one beyond the pool counts as its last.
template <class Table>
VQ_FN int64_t paged_number(Table table, int64_t n, int pool) {
  const int number = (int)table[n];
  return number < 0 ? 0 : number < pool ? number : pool - 1;
}

// The same through such a table.
template <class P, class Table>
struct PagedBlocks {
  P base;
  int64_t step;
  Table table;
  int pool;
  P at(int n) const { return base + paged_number(table, n, pool) * step; }
};

// Rows of DIM numbers, `step` from one to the next, as the codecs' texts read a dense plane: x[i],
// and x + 0, since a plane of one block has nothing before it.
template <int DIM, class X>
struct TokenRows {
  X x;
  int64_t step;
  float operator[](int64_t i) const { return (float)x[i / DIM * step + i % DIM]; }
  TokenRows operator+(int64_t) const { return *this; }
};

}  // namespace veloxquant
