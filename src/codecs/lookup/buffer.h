// Floats that are taken and given back all the time: tables of some 100 KB, several a call. From
// the heap each would be mapped, faulted in page by page and unmapped, at the cost of a short
// context.
#pragma once

#include <hwy/aligned_allocator.h>

#include <cstdint>
#include <memory>

namespace veloxquant::lookup {

struct GiveBack {
  int64_t size = 0;
  void operator()(float* data) const;
};
using Buffer = std::unique_ptr<float[], GiveBack>;

// `size` floats with unknown contents, aligned to a cache line.
Buffer take_buffer(int64_t size);

}  // namespace veloxquant::lookup
