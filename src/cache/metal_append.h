// The exact storage of a cache after an append, and the tokens that leave it to be sealed, on
// Metal: run_append of veloxquant/cache.h but for the encoding. A thread writes an element of one
// side of one KV head.
#pragma once

#include "src/backends/metal/common.h"

namespace veloxquant {

// The numbers of an append, int32 [8]: position of the first new token, new tokens, exact tokens
// for ever (sinks), first position of the tail before and after, slots, blocks to seal; one unused.
VQ_CONSTANT int kAppendFirst = 0;
VQ_CONSTANT int kAppendNew = 1;
VQ_CONSTANT int kAppendSinks = 2;
VQ_CONSTANT int kAppendTail = 3;
VQ_CONSTANT int kAppendNextTail = 4;
VQ_CONSTANT int kAppendSlots = 5;
VQ_CONSTANT int kAppendSealed = 6;

// Dimension d of the token at `position` after the append; 0 where there is none.
template <class T, int DIM, class Plan, class Fresh, class Exact>
VQ_FN T appended_element(Plan plan, Fresh fresh, int64_t token_step, int64_t dim_step, Exact exact,
                         int position, int d) {
  const int first = plan[kAppendFirst];
  if (position >= first + plan[kAppendNew]) return (T)0.0f;
  if (position >= first) {
    return FiniteNarrow<T>::of((float)fresh[(position - first) * token_step + d * dim_step]);
  }
  const int sinks = plan[kAppendSinks];
  const int slot = position < sinks ? position : sinks + position - plan[kAppendTail];
  return exact[(int64_t)slot * DIM + d];
}

// Slot i / DIM of the storage after the append, then tokens to seal: fresh [n][DIM] by strides,
// exact and next [slots][DIM], sealed [64 blocks][DIM], all of one KV head.
template <class T, int DIM, int SEAL, class Plan, class Fresh, class Exact, class Next,
          class Sealed>
VQ_FN void append_element(Plan plan, Fresh fresh, int64_t token_step, int64_t dim_step, Exact exact,
                          Next next, Sealed sealed, int i) {
  const int slots = plan[kAppendSlots], sinks = plan[kAppendSinks];
  const int slot = i / DIM, d = i % DIM;
  if (slot < slots) {
    const int position = slot < sinks ? slot : plan[kAppendNextTail] + slot - sinks;
    next[i] = appended_element<T, DIM>(plan, fresh, token_step, dim_step, exact, position, d);
  } else if (SEAL && slot < slots + 64 * plan[kAppendSealed]) {
    const int position = plan[kAppendTail] + slot - slots;
    sealed[i - slots * DIM] =
        appended_element<T, DIM>(plan, fresh, token_step, dim_step, exact, position, d);
  }
}

// How many of the new elements of a KV head a cache of T cannot keep as they are. All threads of a
// threadgroup; partial: a number a simdgroup. The first thread gets the count.
template <class T, int DIM, class Fresh, class Partial>
VQ_FN int count_nonfinite(Fresh fresh, int64_t token_step, int64_t dim_step, int n_new,
                          Partial partial, uint self, uint n_threads) {
  int own = 0;
  for (int i = (int)self; i < n_new * DIM; i += (int)n_threads) {
    const float x = (float)fresh[i / DIM * token_step + i % DIM * dim_step];
    own += kept_as_it_is<T>(x) ? 0 : 1;
  }
  own = simd_sum(own);
  if (self % 32 == 0) partial[self / 32] = own;
  barrier_of_group();
  int count = 0;
  for (uint i = 0; self == 0 && i < n_threads / 32; ++i) count += partial[i];
  return count;
}

}  // namespace veloxquant
