// What the functions' operations ask of their arguments, and how those go to kernels.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace veloxquant {

// Throw Error naming function and argument.
void require_floats(const char* name, const char* argument, const mlx::core::array& a);
void require_integers(const char* name, const char* argument, const mlx::core::array& a);
void require_bits(const char* name, int bits, int least, int most);

// The shape less its last axis, then `last`.
mlx::core::Shape leading(const mlx::core::array& a, std::initializer_list<int64_t> last);

// Why kernels do not take so many elements; nothing where they do.
std::optional<std::string> too_many(int64_t elements);

// Row-major in `dtype` and of this shape.
mlx::core::array shaped(const mlx::core::Stream& stream, const mlx::core::array& a,
                        mlx::core::Dtype dtype, mlx::core::Shape shape);

// Any integers as uint8 codes: what exceeds a byte, and what is negative, is out of every table's
// range and becomes 255.
mlx::core::array code_bytes(const mlx::core::Stream& stream, const mlx::core::array& codes);

}  // namespace veloxquant
