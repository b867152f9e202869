// The decode kernels for head_dim 128.
#include "src/attention/cuda_launch.cuh"

namespace veloxquant::attention::cuda {
Launcher launcher_128(const Choice& choice) {
  return choice.by_lane ? find_launcher<128, true>(choice) : find_launcher<128, false>(choice);
}
}  // namespace veloxquant::attention::cuda
