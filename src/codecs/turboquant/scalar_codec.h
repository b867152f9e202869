// The one Codec class of the scalar family: turboquant, its `prod` form, and rvq.
#pragma once

#include <string>

#include "src/codecs/turboquant/kernels.h"

namespace veloxquant::turboquant {

struct ScalarCodecParams {
  std::string method;  // for errors and name()
  Side side = Side::keys;
  int n_kv_heads = 0;
  int head_dim = 0;
  int n_stages = 1;
  int bits = 0;         // of each stage
  bool sketch = false;  // one more sign bit of a projection of what the stages leave
  ScalarScale scale = ScalarScale::norm_corrected;
  uint64_t seed = 0;
};

CodecPtr make_scalar_codec(const ScalarCodecParams& params);

}  // namespace veloxquant::turboquant
