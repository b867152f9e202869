// What the cross-compiled tests need of the libraries that Debian does not give us for AArch64
// without its packages: Highway's choice among the only target, its aligned memory, and
// parallel_for on one thread.
#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>

#include <cstdlib>

#include "veloxquant/backend.h"

namespace hwy {

int64_t SupportedTargets() { return HWY_TARGETS; }
void SetSupportedTargetsForTest(int64_t) {}
ChosenTarget& GetChosenTarget() {
  static ChosenTarget chosen;
  return chosen;
}

void* AllocateAlignedBytes(size_t n, AllocPtr, void*) {
  return std::aligned_alloc(HWY_ALIGNMENT, (n + HWY_ALIGNMENT - 1) / HWY_ALIGNMENT * HWY_ALIGNMENT);
}
void FreeAlignedBytes(const void* p, FreePtr, void*) { std::free(const_cast<void*>(p)); }

}  // namespace hwy

namespace veloxquant::detail {

void parallel_for_impl(long n, void (*call)(const void* context, long i), const void* context) {
  for (long i = 0; i < n; ++i) call(context, i);
}

}  // namespace veloxquant::detail
