// Small arrays of numbers that kernels are given. The layers of a model ask for the same ones in
// turn, and an array costs an allocation: the latest are kept.
#pragma once

#include <mlx/array.h>

#include <vector>

namespace veloxquant {

// Row-major [.., columns]; one row where columns is 0.
mlx::core::array shared_ints(const std::vector<int32_t>& numbers, int columns = 0);
mlx::core::array shared_floats(const std::vector<float>& numbers);

}  // namespace veloxquant
