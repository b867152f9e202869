// The bodies of the kernels of ragged_calls.h.
#pragma once

#include <string>
#include <vector>

#include "src/attention/ragged_calls.h"

namespace veloxquant::attention {

std::string ragged_body(const RaggedShape& shape, const RaggedCut& cut);
std::vector<std::string> ragged_inputs(const RaggedShape& shape);
extern const char* const kRaggedMergeBody;

}  // namespace veloxquant::attention
