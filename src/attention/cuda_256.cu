// The decode kernels for head_dim 256.
#include "src/attention/cuda_launch.cuh"

namespace veloxquant::attention::cuda {
Launcher launcher_256(const Choice& choice) {
  return choice.by_lane ? find_launcher<256, true>(choice) : find_launcher<256, false>(choice);
}
}  // namespace veloxquant::attention::cuda
