// Which calls the tensor-core kernels have shared memory for: fits_shared_memory() against the
// kernels' own layout, of every shape and architecture that they are compiled for.
#include <gtest/gtest.h>

#include "src/attention/cuda_general_call.h"
#if __has_include(<cuda_fp16.h>)
#include "src/attention/cuda_shape.cuh"
#define VELOXQUANT_HAVE_LAYOUT 1
#endif

namespace veloxquant::cuda {
namespace {

#if VELOXQUANT_HAVE_LAYOUT
namespace impl = attention::cuda;

template <class S, int kLimit>
void check_limit(bool dense) {
  const int wanted = impl::Layout<S, kLimit>::bytes(dense);
  const Lookup lookup = S::kByLane ? Lookup::by_lane : Lookup::by_subvector;
  EXPECT_EQ(fits_shared_memory(lookup, S::kTableBytes, S::DIM, S::HEADS, kLimit), wanted <= kLimit)
      << "keys " << S::kKey << " values " << S::kValue << " by lane " << S::kByLane << " head_dim "
      << S::DIM << " heads " << S::HEADS << ": " << wanted << " of " << kLimit << " bytes";
}

template <impl::Kind kKey, impl::Kind kValue, int kDim>
void check_kinds() {
  const auto check = []<class S>(S*) {
    for (const bool dense : {false, true}) {
      check_limit<S, impl::shared_limit(0)>(dense);
      check_limit<S, impl::shared_limit(800)>(dense);
      check_limit<S, impl::shared_limit(900)>(dense);
    }
  };
  check(static_cast<impl::Shape<kKey, kValue, 4, true, kDim, false>*>(nullptr));
  check(static_cast<impl::Shape<kKey, kValue, 8, true, kDim, false>*>(nullptr));
  check(static_cast<impl::Shape<kKey, kValue, 4, false, kDim, false>*>(nullptr));
  check(static_cast<impl::Shape<kKey, kValue, 8, false, kDim, false>*>(nullptr));
}

template <int kDim>
void check_dim() {
  check_kinds<impl::kInt8, impl::kInt8, kDim>();
  check_kinds<impl::kInt8, impl::kHalf2, kDim>();
  check_kinds<impl::kHalf2, impl::kInt8, kDim>();
  check_kinds<impl::kHalf2, impl::kHalf2, kDim>();
}

TEST(CudaSharedMemory, IsWhatTheLayoutOfTheKernelsAsksFor) {
  check_dim<64>();
  check_dim<96>();
  check_dim<128>();
  check_dim<256>();
}
#else
TEST(CudaSharedMemory, IsWhatTheLayoutOfTheKernelsAsksFor) {
  GTEST_SKIP() << "NOT TESTED: no cuda_fp16.h";
}
#endif

TEST(CudaSharedMemory, EightHeadsOf256DimensionsDoNotFit99Kilobytes) {
  EXPECT_TRUE(fits_shared_memory(Lookup::by_lane, 0, 256, 4, 101376));
  EXPECT_FALSE(fits_shared_memory(Lookup::by_lane, 0, 256, 5, 101376));
  EXPECT_TRUE(fits_shared_memory(Lookup::by_lane, 0, 256, 8, 166912));
  EXPECT_FALSE(fits_shared_memory(Lookup::by_lane, 0, 64, 1, 65536));
}

}  // namespace
}  // namespace veloxquant::cuda
