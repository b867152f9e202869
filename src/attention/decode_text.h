// The body of decode attention's first pass in pieces: items of a plan (kernel_calls.cpp), of
// arrays of the published form (rvq_calls.cpp).
#pragma once

#include <string>
#include <vector>

#include "src/attention/kernel_calls.h"

namespace veloxquant::attention {

// Numbers of a query in threadgroup memory, and of a row's sums.
int query_numbers(const DecodeShape& s);
// Query rows of a tile; value sub-vectors of a lane, at most; simdgroups of a threadgroup.
int tile_rows(const DecodeShape& s);
int values_a_lane(int n_subvectors);
constexpr int kMaxSimdgroups = 4;

// Memory of a threadgroup: query, power.
std::string memory_text();
// Where this threadgroup is, `factor` and `cap`.
std::string group_text();
// The item as the plan has it: first, position, most (its tokens), is_packed.
std::string plan_text();
// What is kept of each row, and `count`: tokens of the item up to the last that a row sees. Needs
// seen, is_packed, position and most.
std::string rows_text(bool mask);
// Before packed blocks: queries, k_tile, v_tile, then `blocks`, which makes the variables keys and
// values, block 0 being the item's first.
std::string sides_text(const DecodeShape& s, const std::string& blocks);
// Those variables, of an item of a span.
std::string span_blocks_text(const DecodeShape& s);
// Packed blocks `keys`, `values` by k_tile and v_tile, merged: NP values a lane, pieces of VPIECE.
// dims: the argument that says how many a value has.
std::string packed_text(const std::string& dims);
// An item of exact tokens, up to its merged rows; `calls` attend to them.
std::string exact_text(const std::string& calls);
// Attends to tokens first .. of an array.
std::string exact_call_text(int array, const std::string& first, const std::string& count,
                            const std::string& position);
// The outputs parts and sums. own: numbers of this item's rows, the others are zeros.
std::string store_text(const std::string& dims, const std::string& own);

// Of both sides' tiles and queries; with what the decode kernel has beside them.
std::vector<metal::TemplateArgument> side_arguments(const DecodeShape& s);
std::vector<metal::TemplateArgument> first_pass_arguments(const DecodeShape& s);

// Bodies differ in which arrays there are: one kernel for each, built once.
const metal::Kernel* kernel_once(const std::string& name, const std::vector<std::string>& inputs,
                                 const std::vector<std::string>& outputs, const char* header,
                                 const std::string& body, bool row_contiguous);

}  // namespace veloxquant::attention
