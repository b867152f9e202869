// turboquant_fused_rvq_decode_attend as an MLX operation.
#include <mlx/ops.h>

#include <cmath>
#include <limits>

#include "src/attention/rvq_calls.h"
#include "src/mlx/function_op.h"
#include "src/mlx/gpu_cache.h"
#include "src/mlx/gpu_launch.h"
#include "src/mlx/op_arguments.h"
#include "src/mlx/scalar_ops.h"
#include "src/mlx/shared_numbers.h"
#include "src/mlx/views.h"
#include "veloxquant/rvq_attend.h"
#include "veloxquant/words.h"

namespace veloxquant {
namespace mx = mlx::core;
namespace {

using attention::RvqShape;

void require_table(const char* name, const char* argument, const mx::array& a, int bits) {
  require_floats(name, argument, a);
  require(static_cast<int64_t>(a.size()) == int64_t{1} << bits, "[", name, "] ", argument, ": got ",
          shape_text(a), ", wanted ", 1 << bits, " (2^bits)");
}

// As they were given, but for the words of codes.
struct RvqArrays {
  const mx::array &q, &keys1, &keys2, &centroids1, &centroids2, &values, &value_table;
  const std::optional<mx::array>& norms;
  std::optional<mx::array> mask;  // by strides
};

std::optional<mx::array> rvq_attend_on_gpu(const char* name, const RvqArrays& a, float scale,
                                           const RvqAttendOptions& options, const GpuStream& gpu) {
  const mx::Stream& stream = gpu.stream;
  RvqShape s;
  s.batch = a.q.shape(0), s.n_kv_heads = a.keys1.shape(1);
  s.group = a.q.shape(1) / s.n_kv_heads, s.n_queries = a.q.shape(2), s.dim = a.q.shape(3);
  s.n_tokens = a.keys1.shape(2);
  s.n_centroids1 = static_cast<int>(a.centroids1.size());
  s.n_centroids2 = static_cast<int>(a.centroids2.size());
  s.n_subvectors = a.values.shape(3), s.sub_dim = a.value_table.shape(1);
  s.n_values = a.value_table.shape(0);
  s.norms = a.norms.has_value(), s.mask = a.mask.has_value();
  if (const auto reason = attention::no_rvq_kernel_because(s)) {
    note_cpu(name, stream, *reason);
    return std::nullopt;
  }
  if (s.n_queries < 1 || s.batch < 1) return std::nullopt;
  const std::vector<int32_t> seen =
      attention::seen_numbers({}, {options.causal, options.sliding_window, {}},
                              s.n_tokens - s.n_queries, s.n_queries, s.n_tokens);
  const attention::DecodeShape shape = s.decode();
  const attention::Item all = attention::seen_part({true, 0, 0, s.n_tokens, 0, 0}, seen);
  std::vector<attention::Item> items = planned(shape, {all}, gpu.gpu);
  if (items.empty()) items = {{true, 0, 0, 0, 0, 0}};
  const int n_items = static_cast<int>(items.size());
  std::vector<mx::array> inputs{
      dense_on(stream, a.q, mx::float32),
      code_bytes(stream, a.keys1),
      code_bytes(stream, a.keys2),
      code_bytes(stream, a.values),
      dense_on(stream, a.centroids1, mx::float32),
      dense_on(stream, a.centroids2, mx::float32),
      dense_on(stream, a.value_table, mx::float32),
      a.norms ? dense_on(stream, *a.norms, mx::float32) : shared_floats({0.0f}),
      shared_ints(plan_numbers(items), 6),
      shared_ints(seen, 4),
      shared_floats({scale, 0.0f})};
  if (a.mask) inputs.push_back(*a.mask);
  const std::vector<mx::array> parts = launch(attention::rvq_pass_call(s, n_items), inputs, gpu);
  const float none = -std::numeric_limits<float>::infinity();
  return launch(attention::second_pass_call(shape),
                {parts[0], parts[1], shared_ints({n_items, n_items, s.group}),
                 shared_floats(std::vector<float>(a.q.shape(1), none)), shared_floats({0.0f})},
                gpu)[0];
}

}  // namespace

mx::array rvq_attend_op(const mx::array& q, const mx::array& keys1, const mx::array& keys2,
                        const mx::array& centroids1, const mx::array& centroids2,
                        const mx::array& values, const mx::array& value_table,
                        const RvqAttendOptions& options, mx::StreamOrDevice s) {
  const char* name = "turboquant_fused_rvq_decode_attend";
  const mx::Stream stream = cpu_stream(s);
  require(q.ndim() == 4 && mx::issubdtype(q.dtype(), mx::floating), "[", name, "] q: got ",
          shape_text(q), ", wanted floats [B, H, S_q, D]");
  require(keys1.ndim() != 4 || keys1.shape(2) != 0, "[", name, "] k_indices1: got ",
          shape_text(keys1), ", wanted at least one token");
  const int dim = q.shape(3);
  require(dim >= 1 && dim <= 256, "[", name, "] q: got D = ", dim, ", wanted 1 to 256");
  require(keys1.ndim() == 4, "[", name, "] k_indices1: got ", shape_text(keys1),
          ", wanted [B, H_kv, S_kv, D]");
  require_bits(name, options.b1, 1, 8);
  require_bits(name, options.b2, 1, 8);
  require_bits(name, options.bv, 1, 8);
  // Codes, or words of codes.
  auto unpacked = [&](const char* argument, const mx::array& codes, int bits) {
    require_integers(name, argument, codes);
    const bool words = codes.dtype() == mx::uint32 && codes.ndim() == 4 &&
                       codes.shape(3) == words_per_row(dim, bits) && codes.shape(3) != dim;
    return words ? unpack_words_op(codes, bits, dim, s) : codes;
  };
  const mx::array k1 = unpacked("k_indices1", keys1, options.b1);
  const mx::array k2 = unpacked("k_indices2", keys2, options.b2);
  require(k1.shape() == k2.shape(), "[", name, "] k_indices2: got ", shape_text(keys2),
          ", wanted the shape of k_indices1 ", shape_text(keys1));
  const int kv_heads = k1.shape(1), n_tokens = k1.shape(2);
  require(k1.shape(0) == q.shape(0) && k1.shape(3) == dim, "[", name, "] k_indices1: got ",
          shape_text(keys1), ", wanted [", q.shape(0), ", H_kv, S_kv, ", dim, "] as q ",
          shape_text(q));
  require(kv_heads >= 1 && q.shape(1) % kv_heads == 0, "[", name, "] q: got ", q.shape(1),
          " heads, wanted a multiple of ", kv_heads);
  require_integers(name, "v_indices", values);
  require(values.ndim() == 4 && values.shape(0) == q.shape(0) && values.shape(1) == kv_heads &&
              values.shape(2) == n_tokens,
          "[", name, "] v_indices: got ", shape_text(values), ", wanted [", q.shape(0), ", ",
          kv_heads, ", ", n_tokens, ", D / sub_v]");
  require_floats(name, "v_codebook", value_table);
  require(value_table.ndim() == 2 && value_table.shape(0) == 1 << options.bv &&
              value_table.shape(1) >= 1,
          "[", name, "] v_codebook: got ", shape_text(value_table), ", wanted [", 1 << options.bv,
          ", sub_v] (2^bv rows)");
  require_table(name, "centroids1", centroids1, options.b1);
  require_table(name, "centroids2", centroids2, options.b2);
  if (options.key_norms) {
    require_floats(name, "key_norms", *options.key_norms);
    require(options.key_norms->shape() == mx::Shape({q.shape(0), kv_heads, n_tokens}), "[", name,
            "] key_norms: got ", shape_text(*options.key_norms), ", wanted [", q.shape(0), ", ",
            kv_heads, ", ", n_tokens, "]");
  }
  // Added to scores, [B, H, S_q, S_kv] by strides.
  auto full_mask = [&](const mx::Stream& on) {
    const mx::array& given = *options.mask;
    require(given.dtype() == mx::bool_ || mx::issubdtype(given.dtype(), mx::floating), "[", name,
            "] mask: got ", shape_text(given), ", wanted bools or floats");
    const mx::array mask = given.dtype() == mx::bool_
                               ? mx::where(given, mx::array(0.0f), mx::array(-INFINITY), on)
                               : mx::astype(given, mx::float32, on);
    const mx::Shape full{q.shape(0), q.shape(1), q.shape(2), n_tokens};
    try {
      return mx::broadcast_to(mx::contiguous(mask, false, on), full, on);
    } catch (const std::invalid_argument&) {
      fail("[", name, "] mask: got ", shape_text(given), ", wanted a shape that broadcasts to [",
           full[0], ", ", full[1], ", ", full[2], ", ", full[3], "]");
    }
  };
  const float scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(dim)));
  if (const auto gpu = gpu_stream(s)) {
    std::optional<mx::array> mask;
    if (options.mask) mask = full_mask(gpu->stream);
    const RvqArrays arrays{
        q, k1, k2, centroids1, centroids2, values, value_table, options.key_norms, mask};
    if (const auto out = rvq_attend_on_gpu(name, arrays, scale, options, *gpu)) return *out;
  }
  std::vector<mx::array> inputs{dense(q, mx::float32, s),
                                code_bytes(stream, k1),
                                code_bytes(stream, k2),
                                code_bytes(stream, values),
                                dense(centroids1, mx::float32, s),
                                dense(centroids2, mx::float32, s),
                                dense(value_table, mx::float32, s)};
  if (options.key_norms) inputs.push_back(dense(*options.key_norms, mx::float32, s));
  if (options.mask) inputs.push_back(full_mask(stream));
  RvqAttendProblem problem;
  problem.batch = q.shape(0);
  problem.heads = q.shape(1);
  problem.kv_heads = kv_heads;
  problem.dim = dim;
  problem.n_queries = q.shape(2);
  problem.n_tokens = n_tokens;
  problem.n_subvectors = values.shape(3);
  problem.sub_dim = value_table.shape(1);
  problem.scale = scale;
  problem.causal = options.causal;
  problem.sliding_window = options.sliding_window;
  const bool has_norms = options.key_norms.has_value(), has_mask = options.mask.has_value();
  return function_op(
      name, inputs,
      {{mx::Shape{q.shape(0), q.shape(1), q.shape(2), problem.n_subvectors * problem.sub_dim},
        mx::float16}},
      [problem, has_norms, has_mask](const std::vector<mx::array>& in,
                                     std::vector<mx::array>& out) {
        RvqAttendProblem p = problem;
        auto floats = [](const mx::array& a) {
          return std::vector<float>(a.data<float>(), a.data<float>() + a.size());
        };
        p.q = in[0].data<float>();
        p.keys1 = in[1].data<uint8_t>();
        p.keys2 = in[2].data<uint8_t>();
        p.values = in[3].data<uint8_t>();
        p.centroids1 = floats(in[4]);
        p.centroids2 = floats(in[5]);
        p.value_table = floats(in[6]);
        if (has_norms) p.norms = in[7].data<float>();
        if (has_mask) {
          const mx::array& mask = in.back();
          p.mask = mask.data<float>();
          for (int d = 0; d < 4; ++d) p.mask_stride[d] = mask.strides()[d];
        }
        rvq_attend(p, reinterpret_cast<uint16_t*>(out[0].data<uint8_t>()));
      },
      s)[0];
}

}  // namespace veloxquant
