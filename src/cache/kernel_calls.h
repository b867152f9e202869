// The GPU kernel of an append (metal_append.h): run_append of veloxquant/cache.h but for the
// encoding, whose kernels are each codec's own (src/codecs/<name>/kernel_calls.h).
#pragma once

#include <vector>

#include "src/backends/metal/kernel.h"
#include "veloxquant/cache.h"

namespace veloxquant {

struct AppendShape {
  int batch = 1, heads = 1, head_dim = 0;
  metal::Type kept = metal::Type::float16;  // of the exact storage
};

// The input `plan`, int32 [8].
std::vector<int32_t> append_numbers(const CacheGeometry& geometry, const AppendPlan& plan);

// inputs: keys, values [batch, heads, n, head_dim], any float and by strides; exact_keys,
// exact_values [batch, heads, slots, head_dim] row-major; counts int32 [2, batch * heads]; plan.
// outputs: next_keys, next_values as the exact ones; counts plus what was not finite of this
// append; where blocks are sealed also their tokens, keys and values [batch, heads, 64 blocks,
// head_dim].
metal::Call append_call(const AppendShape& shape, const CacheGeometry& geometry,
                        const AppendPlan& plan);

}  // namespace veloxquant
