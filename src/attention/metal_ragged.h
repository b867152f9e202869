// Decode attention where every sequence has lengths of its own, which only the device knows: what
// an item is follows from them, and the packed blocks lie where a caller keeps them
// (metal_placed.h). The arithmetic is that of metal_decode.h.
//
// A sequence is, in order of positions: sinks (the first exact tokens), packed tokens, the other
// exact ones. Its queries are the last positions.
#pragma once

#include "src/attention/metal_decode.h"
#include "src/codecs/metal_placed.h"
#include "src/codecs/vecinfer/metal_fragments.h"

namespace veloxquant {

template <int WORDS, class P>
VQ_FN P block_at(StridedBlocks<P> blocks, int n) {
  return blocks.at(n);
}
template <int WORDS, class P, class Table>
VQ_FN P block_at(PagedBlocks<P, Table> blocks, int n) {
  return blocks.at(n);
}

// The input `ragged`, int32: what the host decides for all sequences.
enum RaggedNumbers {
  kMostPacked,  // tokens that there is room for: lengths beyond count as these
  kMostExact,
  kSinks,        // exact tokens that stand in front
  kPackedItems,  // items of packed tokens; the rest are exact ones
  kCausal,
  kWindow,     // > 0: sliding
  kTableStep,  // block numbers of a sequence
  kPool,       // blocks that there are
  kRaggedNumbers
};
VQ_CONSTANT int kExactItem = 256;  // tokens
VQ_CONSTANT int kLeastBlocks = 4;  // of an item: a simdgroup takes one
VQ_CONSTANT int kFarAway = 0x7fffffff;

// first: block of the packed ones, or exact token. sinks: tokens in front that the item has as
// well.
struct RaggedItem {
  bool packed;
  int first, count, position, sinks;
};

// seen: [n_queries][4], written by all threads; complete after. Returns the tokens of the sequence.
template <class Ragged, class Seen>
VQ_FN int ragged_seen(Ragged ragged, int n_packed, int n_exact, int n_queries, Seen seen, uint self,
                      uint n_threads) {
  const int length = n_packed + n_exact, window = ragged[kWindow];
  for (uint i = self; i < (uint)n_queries; i += n_threads) {
    const int t = length - n_queries + (int)i;
    seen[kSeenNumbers * i] = window > 0 ? max(0, t + 1 - window) : 0;
    seen[kSeenNumbers * i + 1] = ragged[kCausal] != 0 ? min(length, t + 1) : length;
    seen[kSeenNumbers * i + 2] = kFarAway;
    seen[kSeenNumbers * i + 3] = kFarAway;
  }
  barrier_of_group();
  return length;
}

// Item `item` of a sequence; count and sinks are 0 where there is nothing that a query sees. begin:
// the first position that the first query sees.
template <class Ragged>
VQ_FN RaggedItem ragged_item(Ragged ragged, int item, int n_packed, int n_exact, int begin) {
  const int sinks = min((int)ragged[kSinks], n_exact), items = ragged[kPackedItems];
  RaggedItem it;
  it.packed = item < items;
  it.sinks = item == items && sinks > begin ? sinks : 0;
  if (it.packed) {
    const int hidden = max(0, begin - sinks) / 64;
    const int blocks = (n_packed + 63) / 64 - hidden;
    const int each = max((blocks + items - 1) / items, kLeastBlocks);
    it.first = hidden + item * each;
    it.position = sinks + 64 * it.first;
    it.count = min(n_packed - 64 * it.first, 64 * each);
  } else {
    it.first = sinks + (item - items) * kExactItem;
    it.count = min(n_exact - it.first, kExactItem);
    it.position = n_packed + it.first;
  }
  if (it.count < 0 || it.position + it.count <= begin) it.count = 0;
  return it;
}

}  // namespace veloxquant
