#include "src/mlx/sign_ops.h"

#include <mlx/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "src/backends/cpu/convert.h"
#include "src/codecs/kernel_calls.h"
#include "src/codecs/qjl/kernel_calls.h"
#include "src/codecs/rabitq/kernel_calls.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/op_arguments.h"
#include "src/mlx/shared_numbers.h"
#include "src/mlx/views.h"
#include "veloxquant/qjl.h"
#include "veloxquant/rabitq.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

bool is_float(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }
bool is_integer(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::integer); }

// The shape without its last n axes.
mx::Shape leading(const mx::array& a, int n) {
  return mx::Shape(a.shape().begin(), a.shape().end() - n);
}

int64_t product(const mx::Shape& shape) {
  int64_t size = 1;
  for (int64_t n : shape) size *= n;
  return size;
}

mx::Shape joined(mx::Shape shape, std::initializer_list<int> last) {
  shape.insert(shape.end(), last.begin(), last.end());
  return shape;
}

// For every index of `full`, row-major, the flat index in `own`, which broadcasts to it.
std::vector<int64_t> broadcast_index(const mx::Shape& full, const mx::Shape& own) {
  std::vector<int64_t> index(static_cast<size_t>(product(full)), 0);
  const size_t missing = full.size() - own.size();
  int64_t repeat = 1, stride = 1;  // of the axis in `full` and in `own`
  for (size_t axis = full.size(); axis-- > 0;) {
    const int64_t size = full[axis];
    const bool moves = axis >= missing && own[axis - missing] != 1;
    if (moves) {
      for (size_t i = 0; i < index.size(); ++i) {
        index[i] += static_cast<int64_t>(i) / repeat % size * stride;
      }
      stride *= size;
    }
    repeat *= size;
  }
  return index;
}

mx::array rotation_signs(int dim, uint64_t seed) {
  const std::vector<float> signs = turboquant::rotation_signs(dim, seed);
  return mx::array(signs.data(), {2, dim}, mx::float32);
}

}  // namespace

mx::array rabitq_hamming_score_op(const mx::array& qbits, const mx::array& bits,
                                  const mx::array& cx, const mx::array& scale,
                                  mx::StreamOrDevice s) {
  const char* const name = "[rabitq_hamming_score] ";
  require(is_integer(qbits) && qbits.ndim() >= 1 && qbits.shape(-1) >= 1 && qbits.shape(-1) <= 4096,
          name, "qbits: got ", shape_text(qbits), ", wanted uint8 [..., D/8], D up to 32768");
  const int n_bytes = qbits.shape(-1);
  require(is_integer(bits) && bits.ndim() >= 2 && bits.shape(-1) == n_bytes, name, "bits: got ",
          shape_text(bits), ", wanted uint8 [..., N, ", n_bytes, "]");
  const int n = bits.shape(-2);
  require(cx.ndim() >= 1 && cx.shape(-1) == n && !mx::issubdtype(cx.dtype(), mx::complexfloating),
          name, "Cx: got ", shape_text(cx), ", wanted floats [..., ", n, "]");
  require(scale.size() == 1, name, "scale: got ", shape_text(scale), ", wanted one number");
  mx::Shape lead;
  try {
    lead = mx::broadcast_shapes(mx::broadcast_shapes(leading(qbits, 1), leading(bits, 2)),
                                leading(cx, 1));
  } catch (const std::invalid_argument&) {
    fail(name, "leading axes: got qbits ", shape_text(qbits), ", bits ", shape_text(bits), ", Cx ",
         shape_text(cx), ", wanted axes that broadcast");
  }
  const auto one_query = [&]() -> std::optional<std::string> {
    if (product(lead) != 1) return "a launch takes one query and its keys, no leading axes";
    return std::nullopt;
  };
  if (const auto scores = on_gpu(
          "rabitq_hamming_score", s, one_query(),
          [&] { return metal::hamming_score_call(n, 8 * n_bytes); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{
                mx::reshape(dense_on(gpu, qbits, mx::uint8), {n_bytes}, gpu),
                mx::reshape(dense_on(gpu, bits, mx::uint8), {n, n_bytes}, gpu),
                mx::reshape(dense_on(gpu, cx, mx::float32), {n}, gpu),
                mx::reshape(dense_on(gpu, scale, mx::float32), {1}, gpu)};
          },
          {joined(lead, {n})})) {
    return (*scores)[0];
  }
  const std::vector<mx::array> inputs{dense(qbits, mx::uint8, s), dense(bits, mx::uint8, s),
                                      dense(cx, mx::float32, s), dense(scale, mx::float32, s)};
  return function_op(
      "rabitq_hamming_score", inputs, {{joined(lead, {n}), mx::float32}},
      [=, query_of = broadcast_index(lead, leading(qbits, 1)),
       bits_of = broadcast_index(lead, leading(bits, 2)),
       cx_of = broadcast_index(lead, leading(cx, 1))](const auto& in, auto& out) {
        const auto* queries = in[0].template data<uint8_t>();
        const auto* codes = in[1].template data<uint8_t>();
        const auto* offsets = in[2].template data<float>();
        const float factor = *in[3].template data<float>();
        float* scores = out[0].template data<float>();
        // At least some 4000 keys a piece of work.
        const int64_t step = std::max<int64_t>(1, 4096 / std::max(n, 1));
        parallel_ranges(static_cast<int64_t>(query_of.size()), step,
                        [&](int64_t begin, int64_t end) {
                          for (int64_t i = begin; i < end; ++i) {
                            hamming_score(default_backend(), queries + query_of[i] * n_bytes,
                                          codes + bits_of[i] * n * n_bytes, n, 8 * n_bytes,
                                          offsets + cx_of[i] * n, factor, scores + i * n);
                          }
                        });
      },
      s)[0];
}

std::pair<mx::array, mx::array> rabitq_encode_op(const mx::array& x, uint64_t seed,
                                                 mx::StreamOrDevice s) {
  require(is_float(x) && x.ndim() >= 1 && x.shape(-1) >= 8 && x.shape(-1) <= 1024 &&
              x.shape(-1) % 8 == 0,
          "[rabitq_encode] x: got ", shape_text(x),
          ", wanted floats [..., D], D a multiple of 8 up to 1024");
  const int dim = x.shape(-1);
  const mx::Shape lead = leading(x, 1);
  const int64_t n = product(lead);
  const int rows = static_cast<int>(n);
  if (const auto codes = on_gpu(
          "rabitq_encode", s, too_many(static_cast<int64_t>(x.size())),
          [&] { return rabitq::encode_rows_call(rows, dim); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{shaped(gpu, x, mx::float32, {rows, dim}),
                                          rotation_signs(dim, seed)};
          },
          {joined(lead, {dim / 8}), lead})) {
    return {(*codes)[0], (*codes)[1]};
  }
  auto out = function_op(
      "rabitq_encode", {dense(x, mx::float32, s)},
      {{joined(lead, {dim / 8}), mx::uint8}, {lead, mx::float32}},
      [=](const auto& in, auto& results) {
        rabitq_encode(default_backend(), in[0].template data<float>(), n, dim, seed,
                      results[0].template data<uint8_t>(), results[1].template data<float>());
      },
      s);
  return {out[0], out[1]};
}

mx::array rabitq_popcount_score_op(const mx::array& q, const mx::array& codes,
                                   const mx::array& factors, uint64_t seed, int query_bits,
                                   mx::StreamOrDevice s) {
  const char* const name = "[rabitq_popcount_score] ";
  require(query_bits >= 1 && query_bits <= 8, name, "query_bits: got ", query_bits,
          ", wanted 1..8");
  require(is_float(q) && q.ndim() >= 2 && q.shape(-1) >= 8 && q.shape(-1) <= 1024 &&
              q.shape(-1) % 8 == 0,
          name, "q: got ", shape_text(q),
          ", wanted floats [..., H_q, D], D a multiple of 8 up to 1024");
  const int dim = q.shape(-1), q_heads = q.shape(-2);
  require(is_integer(codes) && codes.ndim() == q.ndim() + 1 && codes.shape(-1) == dim / 8 &&
              leading(codes, 3) == leading(q, 2) && codes.shape(-3) >= 1 &&
              q_heads % codes.shape(-3) == 0,
          name, "codes: got ", shape_text(codes), " for q ", shape_text(q),
          ", wanted uint8 [..., H, N, ", dim / 8, "], H a divisor of ", q_heads);
  require(is_float(factors) && factors.shape() == leading(codes, 1), name, "factors: got ",
          shape_text(factors), ", wanted floats of the shape of codes without its last axis");
  const int heads = codes.shape(-3), n = codes.shape(-2), group = q_heads / heads;
  const int rows = static_cast<int>(product(leading(q, 1)));
  if (const auto scores = on_gpu(
          "rabitq_popcount_score", s, too_many(int64_t{rows} * std::max(n, dim)),
          [&] { return rabitq::popcount_scores_call(rows, group, n, dim); },
          [&](const mx::Stream& gpu) {
            std::vector<mx::array> inputs =
                launch(rabitq::popcount_queries_call(rows, dim, query_bits),
                       {shaped(gpu, q, mx::float32, {rows, dim}), rotation_signs(dim, seed)},
                       *gpu_stream(gpu));
            inputs.push_back(shaped(gpu, codes, mx::uint8, {rows / group, n, dim / 8}));
            inputs.push_back(shaped(gpu, factors, mx::float32, {rows / group, n}));
            return inputs;
          },
          {joined(leading(q, 1), {n})})) {
    return (*scores)[0];
  }
  return function_op(
      "rabitq_popcount_score",
      {dense(q, mx::float32, s), dense(codes, mx::uint8, s), dense(factors, mx::float32, s)},
      {{joined(leading(q, 1), {n}), mx::float32}},
      [=](const auto& in, auto& out) {
        const int64_t rows = static_cast<int64_t>(in[0].size()) / dim;
        std::vector<float> rotated(in[0].template data<float>(),
                                   in[0].template data<float>() + rows * dim);
        rabitq_rotate(default_backend(), rotated.data(), rows, dim, seed);
        parallel_for(rows, [&](long i) {
          // Row i = (batch, head); group rows in a row share a key head.
          const int64_t keys = i / group * n;
          // A query that is not finite has no integers: its scores are NaN, as products would be.
          float* scores = out[0].template data<float>() + static_cast<int64_t>(i) * n;
          const float* row = rotated.data() + static_cast<int64_t>(i) * dim;
          if (!std::all_of(row, row + dim, [](float v) { return v - v == 0.0f; })) {
            std::fill(scores, scores + n, NAN);
            return;
          }
          popcount_score(default_backend(), quantize_popcount_query(row, dim, query_bits),
                         in[1].template data<uint8_t>() + keys * (dim / 8), n,
                         in[2].template data<float>() + keys, scores);
        });
      },
      s)[0];
}

std::pair<mx::array, mx::array> qjl_encode_op(const mx::array& x, const mx::array& sketch,
                                              mx::StreamOrDevice s) {
  require(is_float(x) && x.ndim() >= 1 && x.shape(-1) >= 1, "[qjl_encode] x: got ", shape_text(x),
          ", wanted floats [..., d]");
  const int dim = x.shape(-1);
  require(is_float(sketch) && sketch.ndim() == 2 && sketch.shape(1) == dim &&
              sketch.shape(0) >= 8 && sketch.shape(0) % 8 == 0,
          "[qjl_encode] S: got ", shape_text(sketch), ", wanted floats [m, ", dim,
          "], m a multiple of 8");
  const int m = sketch.shape(0);
  const mx::Shape lead = leading(x, 1);
  const int64_t n = product(lead);
  std::optional<std::string> reason = too_many(n * std::max(dim, m));
  if (!reason) reason = qjl::no_rows_kernel_because(dim);
  const int rows = static_cast<int>(n);
  if (const auto codes = on_gpu(
          "qjl_encode", s, reason, [&] { return qjl::encode_rows_call(rows, dim, m); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{shaped(gpu, x, mx::float32, {rows, dim}),
                                          dense_on(gpu, sketch, mx::float32)};
          },
          {joined(lead, {m / 8}), lead})) {
    return {(*codes)[0], (*codes)[1]};
  }
  auto out = function_op(
      "qjl_encode", {dense(x, mx::float32, s), dense(sketch, mx::float32, s)},
      {{joined(lead, {m / 8}), mx::uint8}, {lead, mx::float16}},
      [=](const auto& in, auto& results) {
        qjl_encode(default_backend(), in[0].template data<float>(), n, dim,
                   in[1].template data<float>(), m, results[0].template data<uint8_t>(),
                   reinterpret_cast<uint16_t*>(results[1].template data<mx::float16_t>()));
      },
      s);
  return {out[0], out[1]};
}

mx::array qjl_inner_product_op(const mx::array& q_proj, const mx::array& signs,
                               const mx::array& norms, mx::StreamOrDevice s) {
  const char* const name = "[qjl_inner_product] ";
  require(
      is_float(q_proj) && q_proj.ndim() >= 2 && q_proj.shape(-1) >= 8 && q_proj.shape(-1) % 8 == 0,
      name, "q_proj: got ", shape_text(q_proj), ", wanted floats [..., H_q, m], m a multiple of 8");
  const int m = q_proj.shape(-1), q_heads = q_proj.shape(-2);
  require(is_integer(signs) && signs.ndim() == q_proj.ndim() + 1 && signs.shape(-1) == m / 8 &&
              leading(signs, 3) == leading(q_proj, 2) && signs.shape(-2) >= 1 &&
              q_heads % signs.shape(-2) == 0,
          name, "packed_signs: got ", shape_text(signs), " for q_proj ", shape_text(q_proj),
          ", wanted uint8 [..., S, H, ", m / 8, "], H a divisor of ", q_heads);
  require(is_float(norms) && norms.shape() == leading(signs, 1), name, "norms: got ",
          shape_text(norms), ", wanted floats of the shape of packed_signs without its last axis");
  const int n = signs.shape(-3), heads = signs.shape(-2);
  const int64_t batches = product(leading(q_proj, 2));
  const int b = static_cast<int>(batches);
  if (const auto scores = on_gpu(
          "qjl_inner_product", s, too_many(batches * std::max<int64_t>(n, 1) * q_heads * (m / 8)),
          [&] { return qjl::inner_product_call(b, q_heads, heads, n); },
          [&](const mx::Stream& gpu) {
            return std::vector<mx::array>{shaped(gpu, q_proj, mx::float32, {b, q_heads, m}),
                                          shaped(gpu, signs, mx::uint8, {b, n, heads, m / 8}),
                                          shaped(gpu, norms, mx::float32, {b, n, heads}),
                                          shared_floats({qjl::score_constant(m)})};
          },
          {joined(leading(q_proj, 1), {n})})) {
    return (*scores)[0];
  }
  return function_op(
      "qjl_inner_product",
      {dense(q_proj, mx::float32, s), dense(signs, mx::uint8, s), dense(norms, mx::float32, s)},
      {{joined(leading(q_proj, 1), {n}), mx::float16}},
      [=](const auto& in, auto& out) {
        const int64_t n_scores = static_cast<int64_t>(q_heads) * n;
        std::vector<float> scores(static_cast<size_t>(n_scores));
        auto* halves = reinterpret_cast<uint16_t*>(out[0].template data<mx::float16_t>());
        for (int64_t b = 0; b < batches; ++b) {
          QjlScores work;
          work.queries = in[0].template data<float>() + b * q_heads * m;
          work.n_query_heads = q_heads;
          work.n_key_heads = heads;
          work.m = m;
          work.signs = in[1].template data<uint8_t>() + b * n * heads * (m / 8);
          work.sign_key_stride = static_cast<int64_t>(heads) * (m / 8);
          work.sign_head_stride = m / 8;
          work.norms = in[2].template data<float>() + b * n * heads;
          work.norm_key_stride = heads;
          work.norm_head_stride = 1;
          work.n_keys = n;
          work.scores = scores.data();
          qjl_inner_product(work);
          cpu::to_finite_16bit(DType::float16, scores.data(), n_scores, halves + b * n_scores);
        }
      },
      s)[0];
}

mx::array qjl_sketch_op(int dim, int m, uint64_t seed, mx::StreamOrDevice s) {
  require(dim >= 1 && m >= dim && m % dim == 0 && m <= 65536 && dim <= 4096, "[qjl_sketch] m: got ",
          m, " for d = ", dim, ", wanted a multiple of d up to 65536");
  return function_op(
      "qjl_sketch", {}, {{mx::Shape{m, dim}, mx::float32}},
      [=](const auto&, auto& out) { qjl_sketch(dim, m, seed, out[0].template data<float>()); },
      s)[0];
}

}  // namespace veloxquant
