// The GPU kernels that undo and redo RoPE around a codec (metal.h): which text, which grid.
#pragma once

#include <vector>

#include "src/backends/metal/kernel.h"
#include "veloxquant/rope.h"

namespace veloxquant::rope {

struct SlotShape {
  int batch = 1, heads = 1, n_tokens = 0, dim = 0;
  int rotating = 0;     // pairs
  bool planes = false;  // all first members of the pairs, then all second ones
};

// The input `slots`, int32 [heads, dim / 2, 3]: of head h, slot k holds pair order[h * dim / 2 +
// k].
std::vector<int32_t> slot_numbers(const Rope& rope, const std::vector<int32_t>& order);
// The inputs `cosines` and `sines`, fp32 [blocks, rotating, 64], of blocks of 64 positions.
struct BlockTables {
  std::vector<float> cosines, sines;
};
BlockTables block_tables(const Rope& rope, RopeDirection direction, int64_t first, int n_blocks);

// What attention turns keys by (Turning in metal_tile.h), fp32 [1 + heads dim]: the scale of
// positions, then of each head's slots the frequency and the factor.
std::vector<float> turn_numbers(const Rope& rope, const std::vector<int32_t>& order);
// Queries in the order of the slots, times the inverse weights of these: fp32 [heads, dim, dim].
std::vector<float> slot_queries(const Rope& rope, const std::vector<int32_t>& order,
                                const std::vector<float>& inverse_weights);

// inputs: x [batch, heads, n_tokens, dim] of any float; slots; weights fp32 [heads, dim / 2];
// cosines, sines (one number where nothing rotates). outputs: fp32 like x.
metal::Call to_slots_call(const SlotShape& shape);
// inputs: z fp32, slots, inverse weights, cosines, sines. outputs: fp32 like z.
metal::Call from_slots_call(const SlotShape& shape);

}  // namespace veloxquant::rope
