// The format that attention's kernels read, of the shape that a codec's own kernels are made for.
#pragma once

#include "src/attention/kernel_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/kernel_calls.h"

namespace veloxquant::attention {

CodeFormat code_format(const vecinfer::BlockShape& shape);
CodeFormat code_format(const turboquant::BlockKernelShape& shape);
CodeFormat code_format(const rabitq::BlockKernelShape& shape);
// fixed_channels: outlier channels are the head's.
CodeFormat code_format(const qjl::BlockKernelShape& shape, bool fixed_channels);

}  // namespace veloxquant::attention
