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

// The array row-major in `dtype`, itself where it already is: by the CPU, or on any stream.
mlx::core::array dense_on(const mlx::core::Stream& stream, const mlx::core::array& a,
                          mlx::core::Dtype dtype);
mlx::core::array dense(const mlx::core::array& a, mlx::core::Dtype dtype,
                       mlx::core::StreamOrDevice s = {});
// float32, float16 and bfloat16 stay, the rest becomes float32.
mlx::core::Dtype core_float(mlx::core::Dtype dtype);
// Row-major in core_float of its dtype.
mlx::core::array dense_floats(const mlx::core::array& a, mlx::core::StreamOrDevice s = {});

// The product of all dimensions but the last.
int64_t row_count(const mlx::core::array& a);

}  // namespace veloxquant
