// Attention on codes of two dimensions (ByteCodes::sub_dim == 2): 4 bits an element and the like.
//
// With so few dimensions a code's own vector serves all query rows as well as an entry of products
// would: one load, copied to every pair of lanes, and one fused multiply-add. So there are no
// products to make before the first token, and no sums by code to finish after the last one, which
// for 256 values of two dimensions cost as much as hundreds of tokens.
#pragma once

#include <memory>

#include "src/codecs/lookup/byte_codes.h"

namespace veloxquant::lookup {

std::unique_ptr<const CodeScores> pair_code_scores(const ByteCodes& codes, const float* q,
                                                   int n_rows);
std::unique_ptr<CodeSums> pair_code_sums(const ByteCodes& codes, int n_rows);

}  // namespace veloxquant::lookup
