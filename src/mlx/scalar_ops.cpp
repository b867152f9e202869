#include "src/mlx/scalar_ops.h"

#include <mlx/ops.h>

#include <algorithm>

#include "src/codecs/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/math/lloyd_max_tables.h"
#include "src/math/rotation.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/op_arguments.h"
#include "src/mlx/views.h"
#include "veloxquant/words.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

// How many centroids there are.
int centroid_count(const char* name, const mx::array& centroids, int bits) {
  require_floats(name, "centroids", centroids);
  require(bits == 0 || static_cast<int64_t>(centroids.size()) == int64_t{1} << bits, "[", name,
          "] centroids: got ", shape_text(centroids), ", wanted ", 1 << bits, " (2^bits)");
  require(centroids.size() >= 1 && centroids.size() <= 256, "[", name, "] centroids: got ",
          shape_text(centroids), ", wanted 1 to 256");
  return static_cast<int>(centroids.size());
}

// What the kernels of scalar_quant.h are told and given: rows, the rotation, the quantiser.
struct ScalarRows {
  turboquant::RowShape shape;
  std::optional<std::string> no_kernel_because;
  uint64_t seed;

  ScalarRows(const ScalarQuantParams& params, int64_t rows)
      : shape{static_cast<int>(rows), params.dim, params.bits, params.scale, params.rotate},
        no_kernel_because(too_many(rows * params.dim)),
        seed(params.seed) {
    if (!no_kernel_because) no_kernel_because = turboquant::no_kernel_because(shape);
  }
  mx::array signs() const {
    if (!shape.rotate) return mx::array({0.0f}, {1});
    const std::vector<float> signs = turboquant::rotation_signs(shape.dim, seed);
    return mx::array(signs.data(), {2, shape.dim}, mx::float32);
  }
  mx::array quantizer() const {
    const std::vector<float> numbers = turboquant::quantizer_numbers(shape.dim, shape.bits, 1);
    return mx::array(numbers.data(), {1, 16}, mx::float32);
  }
};

}  // namespace

std::pair<mx::array, mx::array> scalar_quantize_op(const char* name, const mx::array& x,
                                                   ScalarQuantParams params, mx::StreamOrDevice s) {
  require_floats(name, "x", x);
  require(x.ndim() >= 1 && x.shape(-1) >= 1, "[", name, "] x: got ", shape_text(x),
          ", wanted [..., D] with D at least 1");
  require_bits(name, params.bits, 1, kMaxScalarBits);
  params.dim = x.shape(-1);
  require(!params.rotate || (is_power_of_two(params.dim) && params.dim <= 1024), "[", name,
          "] x: got ", shape_text(x), ", wanted a power of two up to 1024 as its last dimension");
  const ScalarRows rows(params, row_count(x));
  if (const auto out = on_gpu(
          name, s, rows.no_kernel_because, [&] { return turboquant::quantize_call(rows.shape); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{
                shaped(gpu, x, core_float(x.dtype()), {rows.shape.n, params.dim}), rows.signs(),
                rows.quantizer()};
          },
          {leading(x, {words_per_row(params.dim, params.bits)}), leading(x, {})})) {
    return {(*out)[0], (*out)[1]};
  }
  std::vector<mx::array> out = function_op(
      name, {dense_floats(x, s)},
      {{leading(x, {words_per_row(params.dim, params.bits)}), mx::uint32},
       {leading(x, {}), mx::float16}},
      [params](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        scalar_quantize(default_backend(), params, dtype_of(in[0].dtype()), in[0].data<uint8_t>(),
                        row_count(in[0]), out[0].data<uint32_t>(),
                        reinterpret_cast<uint16_t*>(out[1].data<uint8_t>()));
      },
      s);
  return {out[0], out[1]};
}

mx::array scalar_dequantize_op(const mx::array& words, const mx::array& scalars,
                               const ScalarQuantParams& params, mx::Dtype dtype,
                               mx::StreamOrDevice s) {
  const char* name = "turboquant_scalar_dequantize";
  require_bits(name, params.bits, 1, kMaxScalarBits);
  require(params.dim >= 1 && words.dtype() == mx::uint32 && words.ndim() >= 1 &&
              words.shape(-1) == words_per_row(params.dim, params.bits),
          "[", name, "] words: got ", shape_text(words), ", wanted uint32 [..., ",
          words_per_row(std::max(1, params.dim), params.bits), "]");
  require(mx::issubdtype(scalars.dtype(), mx::floating) && scalars.shape() == leading(words, {}),
          "[", name, "] norms: got ", shape_text(scalars), ", wanted one for each row of words");
  const mx::Dtype row_dtype = core_float(dtype);
  const ScalarRows rows(params, row_count(words));
  if (const auto out = on_gpu(
          name, s, rows.no_kernel_because,
          [&] { return turboquant::dequantize_call(rows.shape, metal_type(row_dtype)); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{
                shaped(gpu, words, mx::uint32, {rows.shape.n, words.shape(-1)}),
                shaped(gpu, scalars, mx::float16, {rows.shape.n}), rows.signs(), rows.quantizer()};
          },
          {leading(words, {params.dim})})) {
    return mx::astype((*out)[0], dtype, s);
  }
  const mx::array out = function_op(
      name, {dense(words, mx::uint32, s), dense(scalars, mx::float16, s)},
      {{leading(words, {params.dim}), row_dtype}},
      [params](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        scalar_dequantize(default_backend(), params, in[0].data<uint32_t>(),
                          reinterpret_cast<const uint16_t*>(in[1].data<uint8_t>()),
                          row_count(in[0]), dtype_of(out[0].dtype()), out[0].data<uint8_t>());
      },
      s)[0];
  return mx::astype(out, dtype, cpu_stream(s));
}

mx::array nearest_scalar_op(const mx::array& x, const mx::array& centroids, int bits,
                            mx::StreamOrDevice s) {
  const char* name = "turboquant_scalar_quantize";
  require_floats(name, "x", x);
  require_bits(name, bits, 1, kMaxScalarBits);
  const int n = centroid_count(name, centroids, bits), size = static_cast<int>(x.size());
  if (const auto out = on_gpu(
          name, s, too_many(static_cast<int64_t>(x.size())),
          [&] { return turboquant::nearest_call(size, n); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{shaped(gpu, x, core_float(x.dtype()), {size}),
                                          shaped(gpu, centroids, mx::float32, {n})};
          },
          {x.shape()})) {
    return (*out)[0];
  }
  return function_op(
      name, {dense_floats(x, s), dense(centroids, mx::float32, s)}, {{x.shape(), mx::uint8}},
      [n](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        nearest_scalar(default_backend(), dtype_of(in[0].dtype()), in[0].data<uint8_t>(),
                       in[0].size(), in[1].data<float>(), n, out[0].data<uint8_t>());
      },
      s)[0];
}

mx::array hadamard_nearest_op(const mx::array& x, const mx::array& diag, const mx::array& centroids,
                              int bits, mx::StreamOrDevice s) {
  const char* name = "turboquant_hadamard_quantize";
  require_floats(name, "x", x);
  require(x.ndim() >= 1 && x.shape(-1) >= 1 && is_power_of_two(x.shape(-1)) && x.shape(-1) <= 1024,
          "[", name, "] x: got ", shape_text(x),
          ", wanted a power of two up to 1024 as its last dimension");
  require_bits(name, bits, 1, kMaxScalarBits);
  const int dim = x.shape(-1);
  require(
      (mx::issubdtype(diag.dtype(), mx::floating) || mx::issubdtype(diag.dtype(), mx::integer)) &&
          diag.ndim() == 1 && diag.shape(0) == dim,
      "[", name, "] diag: got ", shape_text(diag), ", wanted [", dim, "]");
  const int n = centroid_count(name, centroids, bits), rows = static_cast<int>(row_count(x));
  if (const auto out = on_gpu(
          name, s, too_many(static_cast<int64_t>(x.size())),
          [&] { return turboquant::hadamard_nearest_call(rows, dim, n); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{shaped(gpu, x, core_float(x.dtype()), {rows, dim}),
                                          dense_on(gpu, diag, mx::float32),
                                          shaped(gpu, centroids, mx::float32, {n})};
          },
          {x.shape()})) {
    return (*out)[0];
  }
  return function_op(
      name, {dense_floats(x, s), dense(diag, mx::float32, s), dense(centroids, mx::float32, s)},
      {{x.shape(), mx::uint8}},
      [n, dim](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        nearest_scalar_of_hadamard(
            default_backend(), dtype_of(in[0].dtype()), in[0].data<uint8_t>(), row_count(in[0]),
            dim, in[1].data<float>(), in[2].data<float>(), n, out[0].data<uint8_t>());
      },
      s)[0];
}

mx::array scalar_centroids_op(const mx::array& indices, const mx::array& centroids,
                              mx::StreamOrDevice s) {
  const char* name = "turboquant_scalar_dequantize";
  require_integers(name, "indices", indices);
  const int n = centroid_count(name, centroids, 0), size = static_cast<int>(indices.size());
  if (const auto out = on_gpu(
          name, s, too_many(static_cast<int64_t>(indices.size())),
          [&] { return turboquant::centroids_call(size, n); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{mx::reshape(code_bytes(gpu, indices), {size}, gpu),
                                          shaped(gpu, centroids, mx::float32, {n})};
          },
          {indices.shape()})) {
    return (*out)[0];
  }
  return function_op(
      name, {code_bytes(cpu_stream(s), indices), dense(centroids, mx::float32, s)},
      {{indices.shape(), mx::float16}},
      [n](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        scalar_centroids(in[0].data<uint8_t>(), in[0].size(), in[1].data<float>(), n,
                         reinterpret_cast<uint16_t*>(out[0].data<uint8_t>()));
      },
      s)[0];
}

mx::array pack_words_op(const mx::array& indices, int bits, mx::StreamOrDevice s) {
  const char* name = "turboquant_bit_pack";
  require_integers(name, "indices", indices);
  require_bits(name, bits, 1, 8);
  require(indices.ndim() >= 1, "[", name, "] indices: got a scalar, wanted [..., n]");
  const bool bytes = indices.dtype() == mx::uint8 || indices.dtype() == mx::bool_;
  const int64_t n = indices.shape(-1), row_words = words_per_row(n, bits);
  const mx::Dtype code_dtype = bytes ? mx::uint8 : mx::int32;
  const int n_rows = static_cast<int>(row_count(indices)), n_codes = static_cast<int>(n);
  if (const auto out = on_gpu(
          name, s, too_many(static_cast<int64_t>(indices.size())),
          [&] { return metal::pack_words_call(n_rows, n_codes, bits); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{
                mx::reshape(dense_on(gpu, indices, code_dtype), {n_rows, n_codes}, gpu)};
          },
          {leading(indices, {row_words})})) {
    return (*out)[0];
  }
  return function_op(
      name, {dense(indices, code_dtype, s)}, {{leading(indices, {row_words}), mx::uint32}},
      [n, bits, bytes](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        uint32_t* words = out[0].data<uint32_t>();
        const int64_t rows = row_count(in[0]);
        if (bytes) {
          pack_words(default_backend(), in[0].data<uint8_t>(), rows, n, bits, words);
        } else {
          pack_words(default_backend(), in[0].data<int32_t>(), rows, n, bits, words);
        }
      },
      s)[0];
}

mx::array unpack_words_op(const mx::array& packed, int bits, int64_t n, mx::StreamOrDevice s) {
  const char* name = "turboquant_bit_unpack";
  require_bits(name, bits, 1, 8);
  require(packed.dtype() == mx::uint32 && packed.ndim() >= 1, "[", name, "] packed: got ",
          shape_text(packed), ", wanted uint32 [..., words]");
  const int64_t row_words = packed.shape(-1), most = row_words * codes_per_word(bits);
  require(n >= 0 && n <= most, "[", name, "] original_length: got ", n, ", wanted 0 to ", most,
          " (", row_words, " words of ", codes_per_word(bits), " codes)");
  const int n_rows = static_cast<int>(row_count(packed)), n_codes = static_cast<int>(n);
  if (const auto out = on_gpu(
          name, s, too_many(n * n_rows),
          [&] { return metal::unpack_words_call(n_rows, n_codes, bits); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{mx::reshape(dense_on(gpu, packed, mx::uint32),
                                                      {n_rows, static_cast<int>(row_words)}, gpu)};
          },
          {leading(packed, {n})})) {
    return (*out)[0];
  }
  return function_op(
      name, {dense(packed, mx::uint32, s)}, {{leading(packed, {n}), mx::int32}},
      [n, bits, row_words](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
        unpack_words(default_backend(), in[0].data<uint32_t>(), row_count(in[0]), row_words, n,
                     bits, out[0].data<int32_t>());
      },
      s)[0];
}

// With 1, 2 or 4 bits a word holds whole bytes, so a row of words is the stream of bytes.
mx::array pack_bytes_op(const mx::array& indices, int bits, mx::StreamOrDevice s) {
  const char* name = "turboquant_bit_pack";
  require_integers(name, "indices", indices);
  require(bits == 1 || bits == 2 || bits == 4, "[", name, "] b: got ", bits, ", wanted 1, 2 or 4");
  const int64_t n = static_cast<int64_t>(indices.size()), per_byte = 8 / bits;
  require(n % per_byte == 0, "[", name, "] indices: got N=", n, ", wanted it divisible by ",
          per_byte, " (= 8/b)");
  const mx::Stream stream = mx::to_stream(s);
  const mx::array flat = mx::reshape(indices, {static_cast<mx::ShapeElem>(n)}, stream);
  const mx::array words = pack_words_op(flat, bits, s);
  return mx::slice(mx::view(words, mx::uint8, stream), {0},
                   {static_cast<mx::ShapeElem>(n / per_byte)}, stream);
}

mx::array unpack_bytes_op(const mx::array& packed, int64_t n, int bits, mx::StreamOrDevice s) {
  const char* name = "turboquant_bit_unpack";
  require_integers(name, "packed", packed);
  require(bits == 1 || bits == 2 || bits == 4, "[", name, "] b: got ", bits, ", wanted 1, 2 or 4");
  require(n >= 0, "[", name, "] N: got ", n, ", wanted at least 0");
  const int64_t needed = (n * bits + 7) / 8, size = static_cast<int64_t>(packed.size());
  require(size >= needed, "[", name, "] packed: got ", size, " byte(s) but N=", n, " at b=", bits,
          " needs ", needed);
  const mx::Stream stream = mx::to_stream(s);
  mx::array bytes = mx::reshape(mx::astype(packed, mx::uint8, stream),
                                {static_cast<mx::ShapeElem>(size)}, stream);
  bytes = mx::pad(bytes, std::vector<std::pair<int, int>>{{0, static_cast<int>(-size & 3)}},
                  mx::array(0, mx::uint8), "constant", stream);
  const mx::array words = mx::view(mx::contiguous(bytes, false, stream), mx::uint32, stream);
  return mx::astype(unpack_words_op(words, bits, n, s), mx::uint8, stream);
}

}  // namespace veloxquant
