#include "src/mlx/vecinfer_ops.h"

#include <mlx/ops.h>

#include <climits>

#include "src/codecs/vecinfer/kernel_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/views.h"
#include "veloxquant/vecinfer_functions.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

// x [..., D] seen as [B, H, S, D], and a codebook as [H or 1, M or 1, C, d].
struct Layout {
  int64_t batches = 1, heads = 1, rows = 1, dim = 0;
  int n_subvectors = 0;
  mx::Shape codebook;

  mx::Shape leading;  // of x
  mx::Shape with(std::initializer_list<int64_t> last) const {
    mx::Shape shape = leading;
    for (int64_t n : last) shape.push_back(static_cast<mx::ShapeElem>(n));
    return shape;
  }
};

void require_floats(const char* name, const char* argument, const mx::array& a) {
  require(mx::issubdtype(a.dtype(), mx::floating), "[", name, "] ", argument, ": got ",
          shape_text(a), ", wanted floats");
}

// `rows` is x, or indices where `sub_dim` is that of the codebook and D is not known yet.
Layout layout_of(const char* name, const char* argument, const mx::array& rows, bool are_indices,
                 const mx::array& codebook, int sub_dim) {
  require(rows.ndim() >= 1, "[", name, "] ", argument, ": got a scalar, wanted [..., ",
          are_indices ? "n_sub" : "D", "]");
  require(codebook.ndim() >= 2 && codebook.ndim() <= 4 && codebook.shape(-1) >= 1 &&
              codebook.shape(-2) >= 1,
          "[", name, "] codebook: got ", shape_text(codebook),
          ", wanted [C, sub_dim], [n_sub, C, sub_dim] or [H, n_sub or 1, C, sub_dim]");
  require(codebook.shape(-1) == sub_dim, "[", name, "] codebook: got ", shape_text(codebook),
          ", wanted ", sub_dim, " columns (sub_dim)");
  Layout layout;
  layout.leading = mx::Shape(rows.shape().begin(), rows.shape().end() - 1);
  if (are_indices) {
    layout.n_subvectors = rows.shape(-1);
    layout.dim = int64_t{sub_dim} * layout.n_subvectors;
  } else {
    layout.dim = rows.shape(-1);
    require(sub_dim >= 1 && layout.dim >= 1 && layout.dim % sub_dim == 0, "[", name,
            "] sub_dim: got ", sub_dim, ", wanted a divisor of D = ", layout.dim);
    layout.n_subvectors = static_cast<int>(layout.dim / sub_dim);
  }
  layout.codebook = codebook.shape();
  while (layout.codebook.size() < 4) layout.codebook.insert(layout.codebook.begin(), 1);
  const int64_t heads = layout.codebook[0], groups = layout.codebook[1];
  require(groups == 1 || groups == layout.n_subvectors, "[", name, "] codebook: got ",
          shape_text(codebook), ", wanted one table, or one for each of the ", layout.n_subvectors,
          " sub-vectors");
  const int ndim = static_cast<int>(rows.ndim());
  layout.rows = ndim >= 2 ? rows.shape(ndim - 2) : 1;
  if (heads != 1) {
    require(ndim >= 3 && rows.shape(ndim - 3) == heads, "[", name, "] codebook: got ",
            shape_text(codebook), " for ", shape_text(rows), ", wanted as many heads (axis -3)");
    layout.heads = heads;
  }
  layout.batches = 1;
  for (int d = 0; d < ndim - (heads != 1 ? 3 : 2); ++d) layout.batches *= rows.shape(d);
  return layout;
}

template <class View, class Data>
View view4(Data* data, DType dtype, const Layout& layout, int64_t last) {
  return View(data, dtype, {layout.batches, layout.heads, layout.rows, last});
}

// The same for the GPU kernels. Where all heads share the tables, all rows are one plane.
vecinfer::RowShape row_shape(const Layout& layout, bool keep_heads = false) {
  vecinfer::RowShape s;
  s.heads = static_cast<int>(layout.heads);
  s.planes = static_cast<int>(layout.batches * layout.heads);
  s.rows = static_cast<int>(layout.rows);
  s.dim = static_cast<int>(layout.dim);
  s.sub_dim = layout.codebook[3];
  s.n_centroids = layout.codebook[2];
  s.tables = layout.codebook[1];
  s.table_heads = layout.codebook[0];
  const int64_t all_rows = layout.batches * layout.heads * layout.rows;
  if (s.table_heads == 1 && !keep_heads && all_rows <= INT_MAX) {
    s.rows = static_cast<int>(all_rows);
    s.planes = s.heads = 1;
  }
  return s;
}

// elements: of the largest array.
std::optional<std::string> no_kernel_because(const vecinfer::RowShape& s, int64_t elements) {
  if (elements > INT_MAX) return "more than 2^31 elements";
  return vecinfer::no_kernel_because(s);
}

mx::array as_planes(const mx::Stream& gpu, const mx::array& a, const vecinfer::RowShape& s,
                    int64_t last) {
  return mx::reshape(a, {s.planes, s.rows, static_cast<mx::ShapeElem>(last)}, gpu);
}

mx::array as_tables(const mx::Stream& gpu, const mx::array& codebook, mx::Dtype dtype,
                    const Layout& layout) {
  return mx::reshape(dense_on(gpu, codebook, dtype), layout.codebook, gpu);
}

mx::array floats_on(const mx::Stream& gpu, const mx::array& a) {
  return dense_on(gpu, a, core_float(a.dtype()));
}

TensorView codebook_view(const mx::array& a, const Layout& layout) {
  const mx::Shape& c = layout.codebook;
  return TensorView(a.data<uint8_t>(), dtype_of(a.dtype()), {c[0], c[1], c[2], c[3]});
}

}  // namespace

mx::array vecinfer_quantize_op(const mx::array& x, const mx::array& codebook, int sub_dim,
                               mx::StreamOrDevice s) {
  const char* name = "vecinfer_quantize_metal";
  require_floats(name, "x", x);
  const Layout layout = layout_of(name, "x", x, false, codebook, sub_dim);
  const mx::Dtype rounded = x.dtype() == mx::float16 ? mx::float16 : mx::float32;
  const vecinfer::RowShape shape = row_shape(layout);
  if (const auto out = on_gpu(
          name, s, no_kernel_because(shape, static_cast<int64_t>(x.size())),
          [&] { return vecinfer::quantize_call(shape); },
          [&](const mx::Stream& gpu) {
            const mx::array table = as_tables(gpu, codebook, rounded, layout);
            return std::vector<mx::array>{as_planes(gpu, floats_on(gpu, x), shape, layout.dim),
                                          dense_on(gpu, table, mx::float32)};
          },
          {layout.with({layout.n_subvectors})})) {
    return (*out)[0];
  }
  const mx::array table = dense(codebook, rounded, s);
  return function_op(
      name, {dense_floats(x, s), dense(table, mx::float32, s)},
      {{layout.with({layout.n_subvectors}), mx::int32}},
      [layout](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        vecinfer_quantize(
            default_backend(),
            view4<TensorView>(in[0].data<uint8_t>(), dtype_of(in[0].dtype()), layout, layout.dim),
            codebook_view(in[1], layout),
            view4<MutableTensorView>(out[0].data<int32_t>(), DType::int32, layout,
                                     layout.n_subvectors));
      },
      s)[0];
}

mx::array vecinfer_dequant_op(const mx::array& indices, const mx::array& codebook,
                              std::optional<mx::Dtype> out_dtype, mx::StreamOrDevice s) {
  const char* name = "vecinfer_dequant_metal";
  require(mx::issubdtype(indices.dtype(), mx::integer), "[", name, "] indices: got ",
          shape_text(indices), ", wanted integers");
  const mx::Dtype dtype = out_dtype.value_or(codebook.dtype());
  require(dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16, "[", name,
          "] out_dtype: got ", dtype_text(dtype), ", wanted float32, float16 or bfloat16");
  const int sub_dim = codebook.ndim() == 0 ? 0 : codebook.shape(-1);
  const Layout layout = layout_of(name, "indices", indices, true, codebook, sub_dim);
  // The bits of a 32-bit index are read as unsigned: a negative one is out of range, as published.
  const bool is_32bit = indices.dtype() == mx::int32 || indices.dtype() == mx::uint32;
  const mx::Dtype code_dtype = is_32bit ? indices.dtype() : mx::int32;
  const vecinfer::RowShape shape = row_shape(layout);
  if (const auto out = on_gpu(
          name, s, no_kernel_because(shape, static_cast<int64_t>(indices.size()) * sub_dim),
          [&] { return vecinfer::dequantize_call(shape, metal_type(dtype)); },
          [&](const mx::Stream& gpu) {
            const mx::array codes = dense_on(gpu, indices, code_dtype);
            return std::vector<mx::array>{as_planes(gpu, codes, shape, layout.n_subvectors),
                                          as_tables(gpu, codebook, dtype, layout)};
          },
          {layout.with({layout.dim})})) {
    return (*out)[0];
  }
  return function_op(
      name, {dense(indices, code_dtype, s), dense(codebook, dtype, s)},
      {{layout.with({layout.dim}), dtype}},
      [layout](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        vecinfer_dequantize(
            view4<TensorView>(in[0].data<uint8_t>(), DType::int32, layout, layout.n_subvectors),
            codebook_view(in[1], layout),
            view4<MutableTensorView>(out[0].data<uint8_t>(), dtype_of(out[0].dtype()), layout,
                                     layout.dim));
      },
      s)[0];
}

std::pair<mx::array, mx::array> vecinfer_encode_decode_op(const char* name, const mx::array& x,
                                                          const mx::array& codebook, int sub_dim,
                                                          const std::optional<mx::array>& matrix,
                                                          const std::optional<mx::array>& smooth,
                                                          mx::Dtype code_dtype,
                                                          mx::StreamOrDevice s) {
  require_floats(name, "x", x);
  require(x.ndim() == 4, "[", name, "] x: got ", shape_text(x), ", wanted [B, H, S, D]");
  Layout layout = layout_of(name, "x", x, false, codebook, sub_dim);
  layout.batches = x.shape(0);
  layout.heads = x.shape(1);
  if (matrix) {
    require(matrix->ndim() == 2 && matrix->shape(0) == layout.dim && matrix->shape(1) == layout.dim,
            "[", name, "] H_mat: got ", shape_text(*matrix), ", wanted [", layout.dim, ", ",
            layout.dim, "]");
  }
  if (smooth) {
    require((smooth->ndim() == 1 || smooth->ndim() == 2) && smooth->shape(-1) == layout.dim &&
                smooth->size() > 0,
            "[", name, "] smooth: got ", shape_text(*smooth), ", wanted [", layout.dim, "] or [R, ",
            layout.dim, "]");
  }
  const int given_rows = smooth ? static_cast<int>(smooth->size() / layout.dim) : 0;
  const int64_t smooth_rows = given_rows == layout.heads ? layout.heads : 1;
  // [R, D] per head where R = H, else their mean [1, D].
  auto lambda_rows = [&](const mx::Stream& stream) {
    mx::array rows = mx::reshape(mx::astype(*smooth, mx::float32, stream),
                                 {-1, static_cast<mx::ShapeElem>(layout.dim)}, stream);
    if (given_rows != layout.heads) rows = mx::mean(rows, 0, true, stream);
    return dense_on(stream, rows, mx::float32);
  };
  const vecinfer::RowShape shape = row_shape(layout, true);
  const int lambdas = smooth ? static_cast<int>(smooth_rows) : 0;
  if (auto out = on_gpu(
          name, s, no_kernel_because(shape, static_cast<int64_t>(x.size())),
          [&] {
            return vecinfer::encode_decode_call(shape, matrix.has_value(), lambdas,
                                                metal_type(code_dtype));
          },
          [&](const mx::Stream& gpu) {
            const mx::array none = mx::zeros({1}, mx::float32, gpu);
            const mx::array flat = matrix ? dense_on(gpu, *matrix, mx::float32) : none;
            const mx::array flag =
                matrix ? launch(vecinfer::is_hadamard_call(shape.dim), {flat}, *gpu_stream(gpu))[0]
                       : mx::zeros({1}, mx::uint32, gpu);
            return std::vector<mx::array>{floats_on(gpu, x),
                                          as_tables(gpu, codebook, mx::float32, layout), flat, flag,
                                          smooth ? lambda_rows(gpu) : none};
          },
          {layout.with({layout.dim}), layout.with({layout.n_subvectors})})) {
    return {(*out)[0], (*out)[1]};
  }
  std::vector<mx::array> inputs = {dense_floats(x, s), dense(codebook, mx::float32, s)};
  if (matrix) inputs.push_back(dense(*matrix, mx::float32, s));
  if (smooth) inputs.push_back(lambda_rows(cpu_stream(s)));
  const bool has_matrix = matrix.has_value(), has_smooth = smooth.has_value();
  std::vector<mx::array> out = function_op(
      name, inputs,
      {{layout.with({layout.dim}), mx::float16}, {layout.with({layout.n_subvectors}), code_dtype}},
      [layout, has_matrix, has_smooth, smooth_rows](const std::vector<mx::array>& in,
                                                    std::vector<mx::array>& out) {
        size_t next = 2;
        TensorView matrix, lambda;
        if (has_matrix) {
          matrix = TensorView(in[next++].data<float>(), DType::float32, {layout.dim, layout.dim});
        }
        if (has_smooth) {
          lambda = TensorView(in[next].data<float>(), DType::float32, {smooth_rows, layout.dim});
        }
        vecinfer_encode_decode(
            default_backend(),
            view4<TensorView>(in[0].data<uint8_t>(), dtype_of(in[0].dtype()), layout, layout.dim),
            codebook_view(in[1], layout), matrix, lambda,
            view4<MutableTensorView>(out[0].data<uint8_t>(), DType::float16, layout, layout.dim),
            view4<MutableTensorView>(out[1].data<uint8_t>(), DType::int32, layout,
                                     layout.n_subvectors));
      },
      s);
  return {out[0], out[1]};
}

mx::array vecinfer_query_lut_op(const mx::array& q, const mx::array& codebook, int sub_dim,
                                mx::StreamOrDevice s) {
  const char* name = "compute_query_lut";
  require_floats(name, "q", q);
  const Layout layout = layout_of(name, "q", q, false, codebook, sub_dim);
  const int64_t n_centroids = layout.codebook[2];
  const mx::Dtype row_dtype = core_float(q.dtype());
  const vecinfer::RowShape shape = row_shape(layout);
  if (const auto out = on_gpu(
          name, s, no_kernel_because(shape, static_cast<int64_t>(q.size()) / sub_dim * n_centroids),
          [&] { return vecinfer::query_lut_call(shape, metal_type(row_dtype)); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{as_planes(gpu, floats_on(gpu, q), shape, layout.dim),
                                          as_tables(gpu, codebook, mx::float32, layout)};
          },
          {layout.with({layout.n_subvectors, n_centroids})})) {
    return mx::astype((*out)[0], q.dtype(), s);
  }
  const mx::array rows = dense_floats(q, s);
  const mx::array lut = function_op(
      name, {rows, dense(codebook, mx::float32, s)},
      {{layout.with({layout.n_subvectors, n_centroids}), rows.dtype()}},
      [layout, n_centroids](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        const DType dtype = dtype_of(in[0].dtype());
        vecinfer_query_lut(
            default_backend(), view4<TensorView>(in[0].data<uint8_t>(), dtype, layout, layout.dim),
            codebook_view(in[1], layout),
            MutableTensorView(
                out[0].data<uint8_t>(), dtype,
                {layout.batches, layout.heads, layout.rows, layout.n_subvectors, n_centroids}));
      },
      s)[0];
  return mx::astype(lut, q.dtype(), cpu_stream(s));
}

}  // namespace veloxquant
