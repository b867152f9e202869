// Attention where every sequence has lengths of its own, which only the device knows: what an item
// of work is follows from them, and the packed blocks lie where a caller keeps them
// (metal_placed.h). Tiles by tensor cores (metal_tiles.h): few query rows are all of every
// simdgroup, each with blocks of its own; of many, each simdgroup has rows of its own, and all
// decode a tile together.
//
// A sequence is, in order of positions: sinks (the first exact tokens), packed tokens, the other
// exact ones. Its queries are the last positions.
#pragma once

#include "src/attention/metal_tile_results.h"
#include "src/attention/metal_tile_rows.h"
#include "src/codecs/metal_placed.h"
#include "src/codecs/rabitq/metal_pairs.h"
#include "src/codecs/turboquant/metal_pairs.h"
#include "src/codecs/vecinfer/metal_pairs.h"

namespace veloxquant {

// The input `ragged`, int32: what the host decides for all sequences.
enum RaggedNumbers {
  kMostPacked,  // tokens that there is room for: lengths beyond count as these
  kMostExact,
  kSinks,        // exact tokens that stand in front
  kPackedItems,  // the others are of exact tokens, the first with the sinks
  kExactItems,
  kExactTokens,  // of an item
  kApart,        // 1: threadgroups of exact items are others, the first
  kCausal,
  kWindow,     // > 0: sliding
  kTableStep,  // block numbers of a sequence
  kPool,       // blocks that there are
  kRaggedNumbers
};
VQ_CONSTANT int kLeastBlocks = 4;  // of an item: a simdgroup takes one
VQ_CONSTANT int kExactCost = 8;    // blocks that an item of exact tokens takes as long as

// Tokens first .. of a form, at `position` on. sinks: tokens in front that the item has as well.
struct RaggedItem {
  int first, count, position, sinks;
};

// Positions that a query sees: [begin, end).
struct SeenRange {
  int begin, end;
};
template <class Ragged>
VQ_FN SeenRange seen_by(Ragged ragged, int length, int n_queries, int query) {
  const int t = length - n_queries + query, window = ragged[kWindow];
  SeenRange seen;
  seen.begin = window > 0 ? max(0, t + 1 - window) : 0;
  seen.end = ragged[kCausal] != 0 ? min(length, t + 1) : length;
  return seen;
}

// Where query row `row` of a KV head begins: row = query group + head of the group, q is
// [head][query][DIM].
VQ_FN int64_t query_at(int row, int group, int n_queries, int dim) {
  return ((int64_t)(row % group) * n_queries + row / group) * dim;
}

// The rows of this lane: first + 16 mt + 8 h + lane / 4. factor: of all scores.
template <int BIASED, int MT, class Ragged, class Units, class Bias>
VQ_FN void open_rows(VQ_THREAD TileRows<MT>& rows, Ragged ragged, int length, int n_queries,
                     int group, int n_rows, int first, float factor, Units units, Bias bias,
                     uint lane) {
  VQ_UNROLL for (int mt = 0; mt < MT; ++mt) {
    VQ_UNROLL for (int h = 0; h < 2; ++h) {
      const int own = 16 * mt + 8 * h + (int)lane / 4;
      const SeenRange seen =
          seen_by(ragged, length, n_queries, min(first + own, n_rows - 1) / group);
      rows.begin[mt][h] = seen.begin;
      rows.end[mt][h] = seen.end;
      rows.unit[mt][h] = units[own] * factor;
      rows.bias[mt][h] = BIASED ? bias[own] * factor : 0.0f;
      rows.mask[mt][h] = 0;
    }
  }
}

// Where the items of a sequence with exact tokens begin: how many have any.
template <class Ragged>
VQ_FN int used_exact_items(Ragged ragged, int n_exact) {
  const int tail = max(0, n_exact - (int)ragged[kSinks]), each = ragged[kExactTokens];
  return n_exact > 0 ? max(1, min((int)ragged[kExactItems], (tail + each - 1) / each)) : 0;
}

// Packed item `item` of a sequence, less what none of the rows sees, [begin, end). An item that has
// exact tokens as well has fewer blocks.
template <class Ragged>
VQ_FN RaggedItem packed_item(Ragged ragged, int item, int n_packed, int n_exact, int begin,
                             int end) {
  const int sinks = min((int)ragged[kSinks], n_exact), items = ragged[kPackedItems];
  const int used = ragged[kApart] != 0 ? 0 : min(used_exact_items(ragged, n_exact), items);
  const int hidden = max(0, begin - sinks) / 64;
  const int blocks = max(0, (n_packed + 63) / 64 - hidden);
  int cost = kExactCost;
  int each = max((blocks + used * cost + items - 1) / items, kLeastBlocks);
  if (each <= 2 * cost || items == 1) {
    cost = 0;
    each = max((blocks + items - 1) / items, kLeastBlocks);
  }
  const int before = item * each - min(item, used) * cost;
  RaggedItem it;
  it.sinks = 0;
  it.first = hidden + before;
  it.position = sinks + 64 * it.first;
  it.count = min(n_packed - 64 * it.first, 64 * (each - (item < used ? cost : 0)));
  it.count = max(0, min(it.count, end - it.position));
  return it;
}

// Item `item` of exact tokens, likewise; not less than none of its tokens or sinks.
template <class Ragged>
VQ_FN RaggedItem exact_item(Ragged ragged, int item, int n_packed, int n_exact, int begin,
                            int end) {
  const int sinks = min((int)ragged[kSinks], n_exact), each = ragged[kExactTokens];
  RaggedItem it;
  it.sinks = item == 0 && sinks > begin ? max(0, min(sinks, end)) : 0;
  it.first = sinks + item * each;
  it.position = n_packed + it.first;
  it.count = max(0, min(min(n_exact - it.first, each), end - it.position));
  if (it.position + it.count <= begin) it.count = 0;
  const int hidden = it.count > 0 ? max(0, begin - it.position) / 64 * 64 : 0;
  it.first += hidden;
  it.position += hidden;
  it.count -= hidden;
  return it;
}

// Tiles of 64 tokens, every n_simdgroups-th by this simdgroup. keys, values: tiles, at: where block
// or first token number n of them lies. factors: [2][64] of this simdgroup.
template <int SOFTCAP, int MASK, int STEPS, int PARTS, int MT, int NV, class Keys, class KeyBlocks,
          class Values, class ValueBlocks, class Queries, class Factors, class Mask>
VQ_FN void attend_apart(Keys keys, KeyBlocks key_blocks, Values values, ValueBlocks value_blocks,
                        int n_tokens, int position, Queries queries, Factors factors, float cap,
                        VQ_THREAD const TileRows<MT>& rows, Mask mask, int64_t mask_step,
                        VQ_THREAD TileSums<MT, NV>& sums, uint simdgroup, uint n_simdgroups,
                        uint lane) {
  TileOperands<Keys> k;
  TileOperands<Values> v;
  k.tile = keys;
  v.tile = values;
  for (int block = (int)simdgroup; 64 * block < n_tokens; block += (int)n_simdgroups) {
    const int n = min(64, n_tokens - 64 * block), next = block + (int)n_simdgroups;
    k.tile.open(key_blocks.at(block), n);
    v.tile.open(value_blocks.at(block), n);
    if (64 * next < n_tokens) {
      ask_for<Keys::WORDS>(key_blocks.at(next), lane);
      ask_for<Values::WORDS>(value_blocks.at(next), lane);
    }
    uint32_t words[4];
    VQ_UNROLL for (int i = 0; i < 4; ++i) words[i] = factor_word(k.tile, v.tile, lane + 32 * i);
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      put_factor(k.tile, v.tile, words[i], n, factors, lane + 32 * i);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    uint4 weights[MT][4];
    tile_softmax<SOFTCAP, MASK, STEPS, PARTS, Keys::FACTORED, Values::FACTORED, 8 / MT>(
        k, queries, factors, n, position + 64 * block, cap, rows, mask, mask_step, sums, weights,
        lane);
    tile_values<MT, NV>(v, weights, sums, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);  // before the next tile's factors
  }
}

// The same tiles for all simdgroups, at least four, decoded by all of them: codes of the next
// operands are on their way while products are made of these. KEPT_KEYS, KEPT_VALUES: units that a
// simdgroup decodes. key_store: [4 STEPS][32], value_store: [2 NV][32] operands. factors: [2][64]
// of the threadgroup. All threads; complete before and after.
template <int SOFTCAP, int MASK, int STEPS, int PARTS, int KEPT_KEYS, int KEPT_VALUES, int MT,
          int NV, class Keys, class KeyBlocks, class Values, class ValueBlocks, class Queries,
          class Factors, class Mask, class Store>
VQ_FN void attend_together(Keys keys, KeyBlocks key_blocks, Values values, ValueBlocks value_blocks,
                           int n_tokens, int position, Queries queries, Factors factors, float cap,
                           VQ_THREAD const TileRows<MT>& rows, Mask mask, int64_t mask_step,
                           VQ_THREAD TileSums<MT, NV>& sums, Store key_store, Store value_store,
                           uint simdgroup, uint n_simdgroups, uint lane) {
  const uint self = 32 * simdgroup + lane;
  const int own = (int)simdgroup, step = (int)n_simdgroups;
  TileOperands<Keys> k[KEPT_KEYS];
  TileOperands<Values> v[KEPT_VALUES];
  VQ_UNROLL for (int i = 0; i < KEPT_KEYS; ++i) k[i].tile = keys;
  VQ_UNROLL for (int i = 0; i < KEPT_VALUES; ++i) v[i].tile = values;
  StoredOperands<Store> stored_keys, stored_values;
  stored_keys.store = key_store;
  stored_values.store = value_store;
  const int n_blocks = (n_tokens + 63) / 64;
  for (int block = -1; block < n_blocks; ++block) {
    const int n = min(64, n_tokens - 64 * block), n_next = min(64, n_tokens - 64 * (block + 1));
    uint4 weights[MT][4];
    if (block >= 0) {
      VQ_UNROLL for (int i = 0; i < KEPT_VALUES; ++i) {
        v[i].tile.open(value_blocks.at(block), n);
        if (own + i * step < NV) v[i].load_values(NV / 4, own + i * step, lane);
      }
      tile_softmax<SOFTCAP, MASK, STEPS, PARTS, Keys::FACTORED, Values::FACTORED, 8>(
          stored_keys, queries, factors, n, position + 64 * block, cap, rows, mask, mask_step, sums,
          weights, lane);
      VQ_UNROLL for (int i = 0; i < KEPT_VALUES; ++i) {
        if (own + i * step >= NV) continue;
        uint32_t w[4][2];
        v[i].tile.arrive_values();
        v[i].tile.value_pairs(w);
        store_operands<4>(w, value_store, own + i * step, lane);
      }
      barrier_of_group();
    }
    const bool more = block + 1 < n_blocks;
    uint32_t word = 0u;
    if (more) {
      v[0].tile.open(value_blocks.at(block + 1), n_next);
      VQ_UNROLL for (int i = 0; i < KEPT_KEYS; ++i) {
        k[i].tile.open(key_blocks.at(block + 1), n_next);
        if (own + i * step < STEPS) k[i].load_keys(own + i * step, lane);
      }
      word = factor_word(k[0].tile, v[0].tile, self);
    }
    if (block >= 0) tile_values<MT, NV>(stored_values, weights, sums, lane);
    if (more) {
      put_factor(k[0].tile, v[0].tile, word, n_next, factors, self);
      VQ_UNROLL for (int i = 0; i < KEPT_KEYS; ++i) {
        if (own + i * step >= STEPS) continue;
        uint32_t w[8][2];
        k[i].tile.arrive_keys();
        k[i].tile.template key_pairs<8>(0, w);
        store_operands<8>(w, key_store, own + i * step, lane);
      }
    }
    barrier_of_group();
  }
}

}  // namespace veloxquant
