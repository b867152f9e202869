// A side of packed decode attention as kernel text: the codec's tile and its table. side: k or v.
#pragma once

#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// Threadgroup memory for the table, if it is copied there.
std::string stage_text(const char* side, const CodeFormat& f);
// The copy, by all threads; a barrier must follow.
std::string table_text(const char* side, const CodeFormat& f);
// The variable k_tile or v_tile.
std::string tile_text(const char* side, const CodeFormat& f);
// Arguments of these texts; rows: of a side (head_dim, or the signs of a sketch).
void add_tile_arguments(const std::string& side, const CodeFormat& f, int rows,
                        std::vector<metal::TemplateArgument>& arguments);

// What first passes share. Rows of a threadgroup's tile, its item of the plan, what its rows see.
std::string rows_text(bool mask);
// Packed blocks `keys`, `values` by k_tile and v_tile, merged: NP values a lane, pieces of VPIECE.
// dims: the argument that says how many a value has.
std::string packed_text(const std::string& dims);
// The outputs parts and sums.
std::string store_text(const std::string& dims);

// Query rows of a tile; value sub-vectors of a lane, at most; simdgroups of a threadgroup.
int tile_rows(const DecodeShape& shape);
int values_a_lane(int n_subvectors);
constexpr int kMaxSimdgroups = 4;

// Bodies differ in which arrays there are: one kernel for each, built once.
const metal::Kernel* kernel_once(const std::string& name, const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& outputs, const char* header,
                                 const std::string& body, bool row_contiguous);

// Dimensions of a piece, as the tile has them.
int piece_dims(const CodeFormat& f);

// `name` replaced wherever it stands.
std::string replaced(std::string text, const std::string& name, const std::string& with);

}  // namespace veloxquant::attention
