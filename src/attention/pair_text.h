// A side of packed attention as text of the tensor-core kernels: the codec's tile
// (src/codecs/*/metal_pairs.h) and its table. side: k or v.
#pragma once

#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// Threadgroup memory for the table, if it is made there.
std::string pair_stage_text(const char* side, const CodeFormat& f);
// The table, by all threads, and the variable k_tile or v_tile; a barrier must follow.
std::string pair_tile_text(const char* side, const CodeFormat& f);
// Arguments of these texts, as add_tile_arguments() has them and what pairs want beside.
void add_pair_arguments(const std::string& side, const CodeFormat& f, int rows,
                        std::vector<metal::TemplateArgument>& arguments);

}  // namespace veloxquant::attention
