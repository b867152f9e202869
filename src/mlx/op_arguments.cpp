#include "src/mlx/op_arguments.h"

#include <mlx/ops.h>

#include <climits>

#include "src/mlx/function_op.h"
#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;

void require_floats(const char* name, const char* argument, const mx::array& a) {
  require(mx::issubdtype(a.dtype(), mx::floating), "[", name, "] ", argument, ": got ",
          shape_text(a), ", wanted floats");
}

void require_integers(const char* name, const char* argument, const mx::array& a) {
  require(mx::issubdtype(a.dtype(), mx::integer) || a.dtype() == mx::bool_, "[", name, "] ",
          argument, ": got ", shape_text(a), ", wanted integers");
}

void require_bits(const char* name, int bits, int least, int most) {
  require(bits >= least && bits <= most, "[", name, "] bits: got ", bits, ", wanted ", least,
          " to ", most);
}

mx::Shape leading(const mx::array& a, std::initializer_list<int64_t> last) {
  mx::Shape shape(a.shape().begin(), a.shape().end() - 1);
  for (int64_t n : last) shape.push_back(static_cast<mx::ShapeElem>(n));
  return shape;
}

std::optional<std::string> too_many(int64_t elements) {
  if (elements > INT_MAX) return "more than 2^31 elements";
  return std::nullopt;
}

mx::array shaped(const mx::Stream& stream, const mx::array& a, mx::Dtype dtype, mx::Shape shape) {
  return mx::reshape(dense_on(stream, a, dtype), std::move(shape), stream);
}

mx::array code_bytes(const mx::Stream& stream, const mx::array& codes) {
  if (codes.dtype() == mx::uint8 || codes.dtype() == mx::bool_) {
    return dense_on(stream, codes, mx::uint8);
  }
  mx::array wide = mx::astype(codes, mx::int64, stream);
  const mx::array top(255, mx::int64);
  wide = mx::where(mx::less(wide, mx::array(0, mx::int64), stream), top,
                   mx::minimum(wide, top, stream), stream);
  return dense_on(stream, wide, mx::uint8);
}

}  // namespace veloxquant
