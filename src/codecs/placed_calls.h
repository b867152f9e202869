// Encode and decode of packed blocks that lie where a caller keeps them (metal_placed.h), from and
// to strided rows: the codecs' own kernels, told one block at a time. CUDA launches them
// (src/attention/cuda_general_blocks.cu), the MSL machine tests them.
#pragma once

#include <string>
#include <variant>

#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/kernel_calls.h"

namespace veloxquant {

// A codec's kernels; of the shapes only what the codec fixes counts.
using BlockKernels =
    std::variant<std::monostate, vecinfer::BlockShape, turboquant::BlockKernelShape,
                 rabitq::BlockKernelShape, qjl::BlockKernelShape>;

struct PlacedShape {
  BlockKernels kernels;
  int batch = 1, heads = 1;
  int n_sequences = 1;  // with tables of their own (vecinfer)
  bool paged = false;
  // Encode: the block after a sequence's packed tokens, of those sequences alone whose step sealed
  // one; `lengths` int32 [4, batch] as advance_lengths() of veloxquant/cuda.h leaves it.
  bool seal = false;

  int dim() const;
};

// The input `range`: tokens, first block, blocks of the pool, block numbers of a sequence.
constexpr int kRangeNumbers = 4;

// inputs, in this order: x; x_steps int64 [3], elements from one sequence, head, token to the next;
// steps int64 [3], bytes from one sequence, head, block to the next; range int32 [4]; table int32
// (paged), lengths (seal), then the codec's as its encode_blocks_call has them. outputs: the
// storage of the blocks.
metal::Call placed_encode_call(const PlacedShape& shape, int n_blocks);
// inputs: blocks; out_steps int64 [2], elements from one sequence, head to the next; steps, range,
// table; the codec's as its decode_blocks_call has them. outputs: fp32 rows, dense within a head.
metal::Call placed_decode_call(const PlacedShape& shape, int n_blocks);

}  // namespace veloxquant
