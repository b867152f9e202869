// The decode kernels for head_dim 80 and 96.
#include "src/attention/cuda_launch.cuh"

namespace veloxquant::attention::cuda {
Launcher launcher_96(const Choice& choice) {
  return choice.by_lane ? find_launcher<96, true>(choice) : find_launcher<96, false>(choice);
}
}  // namespace veloxquant::attention::cuda
