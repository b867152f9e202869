// The first pass of attention for chunks of queries (metal_prefill.h): when it is taken, its shape
// and its body.
#pragma once

#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// How a threadgroup of 128 threads works; no rows: such queries are left to the decode kernel.
struct PrefillShape {
  int rows = 0, tokens = 0;
  int key_stride = 0, value_stride = 0;  // of a tile, in numbers
};
PrefillShape prefill_shape(const DecodeShape& s);

std::string prefill_body(const DecodeShape& s);
std::vector<metal::TemplateArgument> prefill_arguments(const DecodeShape& s);

}  // namespace veloxquant::attention
