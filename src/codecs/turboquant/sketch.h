// The random projection of the `prod` form: a matrix S of independent N(0, 1) entries.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace veloxquant::turboquant {

// S and its transpose, fp32 [dim][dim]. An entry is the sum of 16 uniform numbers of 16 bits,
// centred and scaled to variance 1 (SplitMix64 of `seed`, stream 2, four numbers an entry): no
// logarithm or cosine, which differ between machines. Excess kurtosis -0.075, without effect on
// sums over a row.
struct Sketch {
  std::vector<float> rows, columns;
};

// Shared by all codecs of the same dimension and seed that live at the same time.
std::shared_ptr<const Sketch> gaussian_sketch(int dim, uint64_t seed);

}  // namespace veloxquant::turboquant
