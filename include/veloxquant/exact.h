// The exact 16-bit "codec": the same cache and attention without compression, to compare with.
#pragma once

#include "veloxquant/codec.h"

namespace veloxquant {

// dtype: float16 or bfloat16, the dtype of the cache's exact tokens. Block: [64][head_dim].
CodecPtr make_exact_codec(Side side, int n_kv_heads, int head_dim, DType dtype);

}  // namespace veloxquant
