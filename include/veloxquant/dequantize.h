// The dense form of what a cache holds: for models that cannot attend on codes, and for tests.
// Every call is counted, so that "attends on packed codes" is a number and not a promise.
#pragma once

#include "veloxquant/attention.h"

namespace veloxquant {

// out: [B, H_kv, source.length, D], fp32, fp16 or bf16, row-major: the keys or values that the
// first query of `source.visibility` sees, in the original coordinates. Positions that the source
// does not hold are written as 0.
void dequantize(Backend backend, const KeyValueSource& source, Side side,
                const MutableTensorView& out);

int64_t dequantize_calls();
void count_dequantize_call();  // one that a GPU makes

}  // namespace veloxquant
