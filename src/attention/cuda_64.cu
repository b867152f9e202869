// The decode kernels for head_dim 64.
#include "src/attention/cuda_launch.cuh"

namespace veloxquant::attention::cuda {
Launcher launcher_64(const Choice& choice) {
  return choice.by_lane ? find_launcher<64, true>(choice) : find_launcher<64, false>(choice);
}
}  // namespace veloxquant::attention::cuda
