// A call of cuda::attend() before it reaches a device: its checks, its scratch, and which kernels
// take it. Without CUDA too, so that continuous integration tests it.
#pragma once

#include "src/attention/cuda_general.h"
#include "src/attention/ragged_calls.h"

namespace veloxquant::cuda {

// Throws Error with one sentence where an argument does not fit.
attention::RaggedShape checked_call(const AttendArgs& args);

// Scratch, in bytes from its beginning.
struct Workspace {
  int64_t turned = 0, parts = 0, sums = 0, lse = 0, bytes = 0;
};
Workspace workspace_of(const attention::RaggedShape& shape, const attention::RaggedItems& items);

// Whether the tensor-core kernels' shared memory fits a multiprocessor: what their layout asks for
// (cuda_shape.cuh, which the test holds this against) without nvcc. heads: of a KV head, that a
// kernel takes together, up to 8; head_dim: as the kernels pad it; table_bytes: of both sides.
bool fits_shared_memory(Lookup lookup, int64_t table_bytes, int head_dim, int heads,
                        int shared_per_block);
// Why the tensor-core kernels do not take the call; nullptr where they do. shared_per_block: bytes.
const char* not_fast_because(const AttendArgs& args, int shared_per_block);
DecodeArgs fast_args(const AttendArgs& args);

}  // namespace veloxquant::cuda
