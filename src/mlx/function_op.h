// Lazy operations whose work is one call of a core function: arrays in, new arrays out, on the CPU.
//
//   array y = function_op("turboquant_bit_pack", {dense(codes, uint8)}, {{shape, uint32}},
//                         [=](const auto& in, auto& out) { pack(in[0].template data<uint8_t>(),
//                         ...); })[0];
//
// Everything is checked before, when the graph is built. The function runs later on the stream's
// thread, and spreads its rows over the cores with parallel_ranges (veloxquant/backend.h).
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <functional>
#include <string>
#include <vector>

namespace veloxquant {

struct OutputSpec {
  mlx::core::Shape shape;
  mlx::core::Dtype dtype;
};

// inputs: evaluated. outputs: allocated, row-major, to be written completely.
using ArrayFunction = std::function<void(const std::vector<mlx::core::array>& inputs,
                                         std::vector<mlx::core::array>& outputs)>;

// `run` is not called where every output is empty.
std::vector<mlx::core::array> function_op(const std::string& name,
                                          const std::vector<mlx::core::array>& inputs,
                                          const std::vector<OutputSpec>& outputs, ArrayFunction run,
                                          mlx::core::StreamOrDevice s = {});

// The array row-major in `dtype`, itself where it already is.
mlx::core::array dense(const mlx::core::array& a, mlx::core::Dtype dtype,
                       mlx::core::StreamOrDevice s = {});
// Row-major in its own dtype where that is float32, float16 or bfloat16, else in float32.
mlx::core::array dense_floats(const mlx::core::array& a, mlx::core::StreamOrDevice s = {});

// The product of all dimensions but the last.
int64_t row_count(const mlx::core::array& a);

}  // namespace veloxquant
