#include "src/mlx/commvq_ops.h"

#include <mlx/ops.h>

#include "src/codecs/commvq/kernel_calls.h"
#include "src/codecs/rope/kernels.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/op_arguments.h"
#include "src/mlx/views.h"
#include "veloxquant/commvq.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

constexpr const char* kName = "[comm_vq_decode_metal] ";

// Cosines and sines fp32 [n, pairs] of positions int32 [n], as comm_vq_decode has them: in double
// precision, by the CPU on any device.
std::vector<mx::array> angles(const mx::array& positions, const mx::array& inv_freq) {
  const mx::Stream cpu = cpu_stream(mx::Device::cpu);
  const int n = positions.shape(0), pairs = inv_freq.shape(0);
  const OutputSpec table{{n, pairs}, mx::float32};
  return function_op(
      "comm_vq_decode_angles",
      {dense(positions, mx::int32, cpu), dense(inv_freq, mx::float32, cpu)}, {table, table},
      [n, pairs](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        constexpr int kTokens = rope::kTokens;
        parallel_ranges(n, kTokens, [&](int64_t begin, int64_t end) {
          std::vector<float> tile(2 * static_cast<size_t>(pairs) * kTokens);
          float scaled[kTokens] = {};
          for (int64_t t = begin; t < end; ++t) {
            scaled[t - begin] = static_cast<float>(in[0].data<int32_t>()[t]);
          }
          rope::kernels_of(default_backend())
              .tables(in[1].data<float>(), pairs, scaled, 1.0, tile.data(),
                      tile.data() + static_cast<size_t>(pairs) * kTokens);
          for (int table = 0; table < 2; ++table) {
            float* to = out[table].data<float>();
            for (int64_t t = begin; t < end; ++t) {
              for (int j = 0; j < pairs; ++j) {
                to[t * pairs + j] = tile[(table * pairs + j) * kTokens + (t - begin)];
              }
            }
          }
        });
      },
      cpu);
}

}  // namespace

mx::array comm_vq_decode_op(const mx::array& indices, const mx::array& codebook,
                            const mx::array& positions, const mx::array& inv_freq, int n_cb,
                            int sub_dim, int cb_size, mx::StreamOrDevice s) {
  require(n_cb >= 1 && sub_dim >= 1 && cb_size >= 1, kName, "n_cb, sub_dim, cb_size: got ", n_cb,
          ", ", sub_dim, ", ", cb_size, ", wanted at least 1 each");
  const int dims = n_cb * sub_dim;
  require(dims % 2 == 0, kName, "n_cb * sub_dim: got ", dims,
          ", which must be even (RoPE rotates dimension pairs)");
  const int books = static_cast<int>(codebook.ndim());
  require(mx::issubdtype(codebook.dtype(), mx::floating) && (books == 3 || books == 4) &&
              codebook.shape(books - 3) == n_cb && codebook.shape(books - 2) == cb_size &&
              codebook.shape(books - 1) == sub_dim && codebook.shape(0) >= 1,
          kName, "codebook: got ", shape_text(codebook), ", wanted floats [", n_cb, ", ", cb_size,
          ", ", sub_dim, "], or with an axis of stages in front");
  const int stages = books == 4 ? codebook.shape(0) : 1;
  require_integers("comm_vq_decode_metal", "indices", indices);
  const int axes = static_cast<int>(indices.ndim()), own = books == 4 ? 2 : 1;
  require(axes >= own && indices.shape(-1) == n_cb && (own == 1 || indices.shape(-2) == stages),
          kName, "indices: got ", shape_text(indices), ", wanted [..., ",
          own == 2 ? std::to_string(stages) + ", " : std::string(), n_cb, "]");
  const mx::Shape leading(indices.shape().begin(), indices.shape().end() - own);
  require_integers("comm_vq_decode_metal", "positions", positions);
  bool fits = positions.ndim() <= leading.size();
  for (size_t i = 0; fits && i < positions.ndim(); ++i) {
    const int size = positions.shape(static_cast<int>(i));
    fits = size == 1 || size == leading[leading.size() - positions.ndim() + i];
  }
  require(fits, kName, "positions: got ", shape_text(positions), ", wanted one for each of ",
          shape_text(indices), " but its last ", own, own == 1 ? " axis" : " axes");
  require(inv_freq.ndim() == 1 && inv_freq.shape(0) == dims / 2 &&
              mx::issubdtype(inv_freq.dtype(), mx::floating),
          kName, "inv_freq: got ", shape_text(inv_freq), ", wanted floats [", dims / 2, "]");

  mx::Shape shape = leading;
  shape.push_back(dims);
  int64_t n = 1;
  for (int size : leading) n *= size;
  const mx::Dtype dtype = core_float(codebook.dtype());
  const int rows = static_cast<int>(n);
  if (const auto out = on_gpu(
          "comm_vq_decode_metal", s, too_many(n * dims * stages),
          [&] { return commvq::look_up_call(rows, n_cb, sub_dim, metal_type(dtype)); },
          [&](const mx::Stream& gpu) {
            const mx::array flat =
                mx::reshape(mx::broadcast_to(positions, leading, gpu), {rows}, gpu);
            const std::vector<mx::array> turns = angles(flat, inv_freq);
            return std::vector<mx::array>{
                shaped(gpu, indices, mx::int32, {rows, stages, n_cb}),
                shaped(gpu, codebook, dtype, {stages, n_cb, cb_size, sub_dim}), turns[0], turns[1]};
          },
          {shape})) {
    return (*out)[0];
  }
  const mx::Stream stream = cpu_stream(s);
  const mx::array entries = dense_floats(codebook, stream);
  return function_op(
      "comm_vq_decode",
      {dense(indices, mx::int32, stream), entries,
       dense(mx::broadcast_to(positions, leading, stream), mx::int32, stream),
       dense(inv_freq, mx::float32, stream)},
      {{shape, entries.dtype()}},
      [=](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        const DType dtype = dtype_of(in[1].dtype());
        comm_vq_decode(default_backend(),
                       TensorView(in[0].data<void>(), DType::int32, {n, stages, n_cb}),
                       TensorView(in[1].data<void>(), dtype, {stages, n_cb, cb_size, sub_dim}),
                       TensorView(in[2].data<void>(), DType::int32, {n}),
                       TensorView(in[3].data<void>(), DType::float32, {dims / 2}),
                       MutableTensorView(out[0].data<void>(), dtype, {n, dims}));
      },
      stream)[0];
}

}  // namespace veloxquant
