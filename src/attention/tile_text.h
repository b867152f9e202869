// A side of packed decode attention as kernel text: the codec's tile and its table. side: k or v.
#pragma once

#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// Threadgroup memory for the table, if it is copied there.
std::string stage_text(const char* side, const CodeFormat& f);
int stage_bytes(const CodeFormat& f);
// The copy, by all threads; a barrier must follow.
std::string table_text(const char* side, const CodeFormat& f);
// The variable k_tile or v_tile.
std::string tile_text(const char* side, const CodeFormat& f);
// Arguments of these texts; rows: of a side (head_dim, or the signs of a sketch).
void add_tile_arguments(const std::string& side, const CodeFormat& f, int rows,
                        std::vector<metal::TemplateArgument>& arguments);

// What its blocks are read as.
const char* word_type(const CodeFormat& f);

// Dimensions of a piece, as the tile has them.
int piece_dims(const CodeFormat& f);

// `name` replaced wherever it stands.
std::string replaced(std::string text, const std::string& name, const std::string& with);

}  // namespace veloxquant::attention
