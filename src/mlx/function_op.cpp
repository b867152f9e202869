#include "src/mlx/function_op.h"

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include <algorithm>

#include "src/mlx/gpu_launch.h"
#include "src/mlx/primitives.h"
#include "src/mlx/views.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

class FunctionPrimitive : public CpuPrimitive {
 public:
  FunctionPrimitive(mx::Stream stream, std::string name, ArrayFunction run)
      : CpuPrimitive(stream), name_(std::move(name)), run_(std::move(run)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    // The task must not keep arrays alive itself: the scheduler does, until it has run.
    std::vector<mx::array> in, out;
    for (const mx::array& a : inputs) {
      encoder.set_input_array(a);
      in.push_back(mx::array::unsafe_weak_copy(a));
    }
    for (mx::array& a : outputs) {
      a.set_data(mx::allocator::malloc(a.nbytes()));
      encoder.set_output_array(a);
      out.push_back(mx::array::unsafe_weak_copy(a));
    }
    encoder.dispatch(
        [run = run_, in = std::move(in), out = std::move(out)]() mutable { run(in, out); });
  }

  const char* name() const override { return name_.c_str(); }

 private:
  std::string name_;
  ArrayFunction run_;
};

}  // namespace

std::vector<mx::array> function_op(const std::string& name, const std::vector<mx::array>& inputs,
                                   const std::vector<OutputSpec>& outputs, ArrayFunction run,
                                   mx::StreamOrDevice s) {
  note_cpu(name, s, "no GPU kernel for it yet");
  const mx::Stream stream = cpu_stream(s);
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  bool all_empty = true;
  for (const OutputSpec& output : outputs) {
    shapes.push_back(output.shape);
    dtypes.push_back(output.dtype);
    all_empty =
        all_empty && std::find(output.shape.begin(), output.shape.end(), 0) != output.shape.end();
  }
  if (all_empty) {
    std::vector<mx::array> empty;
    for (const OutputSpec& output : outputs) {
      empty.push_back(mx::zeros(output.shape, output.dtype, stream));
    }
    return empty;
  }
  return mx::array::make_arrays(
      shapes, dtypes, std::make_shared<FunctionPrimitive>(stream, name, std::move(run)), inputs);
}

mx::array dense(const mx::array& a, mx::Dtype dtype, mx::StreamOrDevice s) {
  return dense_on(cpu_stream(s), a, dtype);
}

mx::array dense_on(const mx::Stream& stream, const mx::array& a, mx::Dtype dtype) {
  // An operation of the graph that has nothing to do costs some 5 us, as much as a short kernel.
  if (a.dtype() == dtype && a.is_available() && a.flags().row_contiguous) return a;
  return mx::contiguous(mx::astype(a, dtype, stream), false, stream);
}

mx::Dtype core_float(mx::Dtype dtype) {
  const bool kept = dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
  return kept ? dtype : mx::float32;
}

mx::array dense_floats(const mx::array& a, mx::StreamOrDevice s) {
  return dense(a, core_float(a.dtype()), s);
}

int64_t row_count(const mx::array& a) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < static_cast<int>(a.ndim()); ++d) rows *= a.shape(d);
  return rows;
}

}  // namespace veloxquant
