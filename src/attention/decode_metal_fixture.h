// What the tests of decode attention on Metal share: codecs as its kernels are told of them, both
// passes on the MSL machine as the MLX layer makes them, and the comparison with the fp64 oracle.
#pragma once

#include <cstring>
#include <functional>

#include "src/attention/attention_fixture.h"
#include "src/attention/kernel_calls.h"
#include "src/codecs/qjl/sketch.h"
#include "src/codecs/turboquant/kernel_calls.h"
#include "src/codecs/vecinfer/format.h"
#include "tests/msl/machine.h"
#include "tests/support/random.h"
#include "veloxquant/qjl.h"
#include "veloxquant/rabitq.h"

namespace veloxquant::attention {

using metal::Type;
using msl::Input;

// VecInfer's codes of a side.
struct Codes {
  int sub_dim = 4, n_centroids = 256;
  bool per_head = true;
  TransformKind kind = TransformKind::hadamard;
};

// A side's codec with what the kernels are told and given of it.
struct MetalSide {
  CodecPtr codec;
  CodeFormat format;
  int transform = 0;
  test::OwnedCodec owned;             // vecinfer's tables
  std::vector<float> numbers, moved;  // table of the others; `smooth` and `inverse`
  std::vector<int64_t> table_shape, moved_shape;
  std::vector<uint16_t> halves;  // tables of fp16
  std::vector<float> queries;    // transform 2: [matrices][D][key rows]
  int matrices = 1;

  Input table() const {
    const bool half = numbers.empty();
    return Input(half ? Type::float16 : Type::float32, table_shape,
                 half ? static_cast<const void*>(halves.data()) : numbers.data());
  }
  Input move() const { return Input(Type::float32, moved_shape, moved.data()); }
};

inline Type type_of(DType dtype) {
  return dtype == DType::float16    ? Type::float16
         : dtype == DType::bfloat16 ? Type::bfloat16
                                    : Type::float32;
}

inline MetalSide vecinfer_side(test::Random& random, Side side, const Case& c, const Codes& codes) {
  MetalSide s;
  const int64_t H = c.n_kv_heads, D = c.head_dim;
  s.owned = test::random_codec(random, side, c.n_kv_heads, c.head_dim, c.head_dim / codes.sub_dim,
                               codes.n_centroids, codes.per_head, codes.kind);
  s.codec = s.owned.codec;
  s.format = {codes.sub_dim, codes.n_centroids, vecinfer::code_bits(codes.n_centroids),
              codes.per_head ? 1 : c.head_dim / codes.sub_dim};
  s.transform = static_cast<int>(codes.kind);
  s.table_shape = {1, H, s.format.tables, codes.n_centroids, codes.sub_dim};
  s.halves = s.owned.tables;
  s.queries = s.owned.query_matrix;
  s.matrices = c.n_kv_heads;
  s.moved = s.owned.scale.empty() ? std::vector<float>(H * D, 1.0f) : s.owned.scale;
  s.moved_shape = {H, D};
  if (s.transform == 2 && side == Side::values) {
    s.moved = s.owned.query_matrix;
    s.moved_shape = {H, D, D};
  }
  return s;
}

constexpr uint64_t kSeed = 5;

inline MetalSide rotated(CodecPtr codec, CodeFormat format, std::vector<float> numbers,
                         std::vector<int64_t> shape) {
  MetalSide s;
  s.codec = std::move(codec);
  s.format = format;
  s.transform = 3;
  s.numbers = std::move(numbers);
  s.table_shape = std::move(shape);
  s.moved = turboquant::rotation_signs(s.codec->head_dim(), kSeed);
  s.moved_shape = {2, s.codec->head_dim()};
  return s;
}

// turboquant, or rvq with two stages.
inline MetalSide scalar_side(Side side, const Case& c, int bits, int stages) {
  TurboQuantOptions one;
  one.bits = bits, one.seed = kSeed;
  RvqOptions two;
  two.bits = bits, two.seed = kSeed;
  CodeFormat format;
  format.kind = TileKind::scalar;
  format.bits = bits, format.stages = stages, format.by_token = side == Side::values;
  return rotated(stages == 1 ? make_turboquant_codec(side, c.n_kv_heads, c.head_dim, one)
                             : make_rvq_codec(side, c.n_kv_heads, c.head_dim, two),
                 format, turboquant::level_numbers(c.head_dim, bits, stages), {stages, 16});
}

inline MetalSide rabitq_side(Side side, const Case& c, int bits, bool has_mean) {
  test::Random random(3);
  std::vector<float> mean = random.normal(c.n_kv_heads * c.head_dim), numbers = {1.0f};
  RabitqOptions options;
  options.bits = bits, options.seed = kSeed;
  if (side == Side::values) options.scale = RabitqScale::reconstruction;
  CodeFormat format;
  format.kind = TileKind::planes;
  format.bits = bits, format.mean = has_mean;
  if (has_mean) {
    options.mean = TensorView(mean.data(), DType::float32, {c.n_kv_heads, c.head_dim});
    std::vector<float> moved = mean;
    rabitq_rotate(Backend::reference, moved.data(), c.n_kv_heads, c.head_dim, kSeed);
    numbers.insert(numbers.end(), moved.begin(), moved.end());
  }
  const int64_t n = static_cast<int64_t>(numbers.size());
  return rotated(make_rabitq_codec(side, c.n_kv_heads, c.head_dim, options), format,
                 std::move(numbers), {n});
}

// qjl of `blocks` blocks of rotations. One is a codec whose coordinates are rotated.
inline MetalSide qjl_side(const Case& c, int blocks) {
  QjlOptions options;
  options.sketch_bits = blocks * c.head_dim, options.seed = kSeed;
  CodeFormat format;
  format.kind = TileKind::planes;
  format.bits = 1;
  format.n_rows = blocks * c.head_dim;
  const qjl::Sketch sketch =
      qjl::Sketch::structured(c.head_dim, options.sketch_bits, options.seed, 0);
  MetalSide s = rotated(make_qjl_codec(c.n_kv_heads, c.head_dim, options), format,
                        {sketch.score_constant()}, {1});
  const float* signs = sketch.rotation().signs();
  s.moved.assign(signs, signs + 2 * c.head_dim);
  if (blocks == 1) return s;
  s.transform = 2;
  const size_t D = c.head_dim;
  std::vector<float> identity(D * D, 0.0f);
  for (size_t d = 0; d < D; ++d) identity[d * D + d] = 1.0f;
  s.queries.resize(D * format.n_rows);
  sketch.project(identity.data(), c.head_dim, s.queries.data());
  return s;
}

// Both passes of one call of attend(), as the MLX layer makes them.
struct MetalDecode {
  const Scenario& p;
  const MetalSide &keys, &values;
  DecodeShape shape;
  std::vector<msl::Report> reports;
  size_t n_items = 0;
  std::function<void(int, metal::Kernel&)> plant;  // a fault in a pass's text, 1 or 2

  MetalDecode(const Scenario& p, const MetalSide& keys, const MetalSide& values)
      : p(p), keys(keys), values(values) {
    const Case& c = p.c;
    shape.batch = c.batch;
    shape.n_kv_heads = c.n_kv_heads;
    shape.group = c.group;
    shape.n_queries = static_cast<int>(c.n_queries);
    shape.head_dim = c.head_dim;
    shape.keys = keys.format;
    shape.values = values.format;
    shape.key_transform = keys.transform;
    shape.value_transform = values.transform;
    shape.n_spans = static_cast<int>(p.source.packed.size());
    shape.n_exact = static_cast<int>(p.source.exact.size());
    shape.bfloat_cache = c.exact_dtype == DType::bfloat16;
    shape.softcap = c.softcap > 0;
    shape.mask = c.mask != MaskKind::none;
    shape.out = type_of(c.out_dtype);
  }

  // Queries through the codec's matrix: of all heads, or the rows of a sketch.
  std::vector<float> turned(const Input& q) const {
    const metal::Call call = turn_queries_call(shape, keys.matrices);
    return msl::run(*call.kernel, call.launch,
                    {q, Input(Type::float32, {keys.matrices, shape.head_dim, shape.key_rows()},
                              keys.queries.data())})
        .output<float>(0);
  }

  metal::Kernel planted(int pass, const metal::Call& call) const {
    metal::Kernel kernel = *call.kernel;
    if (plant) plant(pass, kernel);
    return kernel;
  }

  Result run(int cores, const msl::Options& options = {}) {
    const Case& c = p.c;
    EXPECT_FALSE(no_decode_kernel_because(shape)) << *no_decode_kernel_because(shape);
    const AttentionParams& params = p.params;
    const int64_t first =
        params.first_query_position >= 0 ? params.first_query_position : c.length - c.n_queries;
    const std::vector<int32_t> seen =
        seen_numbers(p.source.visibility, params.mask, first, c.n_queries, c.length);
    std::vector<Stretch> stretches;
    for (size_t i = 0; i < p.source.packed.size(); ++i) {
      const PackedRun& run = p.source.packed[i];
      stretches.push_back({true, static_cast<int>(i), 0, static_cast<int>(run.end() - run.start),
                           static_cast<int>(run.start), run.n_blocks});
    }
    for (size_t i = 0; i < p.source.exact.size(); ++i) {
      const ExactRun& run = p.source.exact[i];
      stretches.push_back({false, static_cast<int>(i), 0, static_cast<int>(run.keys.shape[2]),
                           static_cast<int>(run.start), 0});
    }
    std::vector<Stretch> parts_seen;
    for (const Stretch& stretch : stretches) {
      const Stretch part = seen_part(stretch, seen);
      if (part.count > 0) parts_seen.push_back(part);
    }
    const std::vector<Item> items = plan_items(shape, parts_seen, cores);
    n_items = items.size();
    std::vector<int32_t> plan;
    int packed = 0;
    for (const Item& item : items) {
      plan.insert(plan.end(), {item.packed ? 0 : 1, item.source, item.first, item.count,
                               item.position, item.capacity});
      packed += item.packed;
    }
    if (items.size() < 2) plan.resize(12, 0);

    const float numbers[2] = {params.scale, params.logit_softcap};
    const int64_t H = c.n_kv_heads, D = c.head_dim, Hq = H * c.group, Lq = c.n_queries;

    // q row-major, as the op makes it.
    Tensor q(c.q_dtype, c.batch, Hq, Lq, D, 0);
    q.view.stride = {Hq * Lq * D, Lq * D, D, 1};
    std::vector<float> row(D);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < Hq; ++h) {
        for (int64_t i = 0; i < Lq; ++i) {
          for (int64_t k = 0; k < D; ++k) {
            row[k] = load_element(p.q.view.at(b, h, i), c.q_dtype, k);
            store_element(q.view.at(b, h, i), c.q_dtype, k, row[k]);
          }
        }
      }
    }
    const Input q_input(type_of(c.q_dtype), {c.batch, Hq, Lq, D}, q.view.data);
    std::vector<float> q_codes;
    if (shape.n_spans > 0 && shape.key_transform == 2) q_codes = turned(q_input);
    std::vector<Input> inputs = {q_input};
    if (!q_codes.empty()) {
      inputs.emplace_back(Type::float32, std::vector<int64_t>{c.batch, Hq, Lq, shape.key_rows()},
                          q_codes.data());
    }
    inputs.emplace_back(Type::int32, std::vector<int64_t>{int64_t(plan.size()) / 6, 6},
                        plan.data());
    inputs.emplace_back(Type::int32, std::vector<int64_t>{Lq, 4}, seen.data());
    inputs.emplace_back(Type::float32, std::vector<int64_t>{2}, numbers);
    if (shape.n_spans > 0) {
      inputs.push_back(keys.move());
      inputs.push_back(keys.table());
      inputs.push_back(values.table());
    }
    for (const PackedRun& run : p.source.packed) {
      inputs.emplace_back(Type::uint8,
                          std::vector<int64_t>{c.batch, H, run.n_blocks, keys.codec->block_bytes()},
                          run.keys);
      inputs.emplace_back(
          Type::uint8, std::vector<int64_t>{c.batch, H, run.n_blocks, values.codec->block_bytes()},
          run.values);
    }
    for (const ExactRun& run : p.source.exact) {
      for (const TensorView* view : {&run.keys, &run.values}) {
        inputs.emplace_back(type_of(view->dtype),
                            std::vector<int64_t>(view->shape.begin(), view->shape.begin() + 4),
                            view->data,
                            std::vector<int64_t>(view->stride.begin(), view->stride.begin() + 4));
      }
    }
    std::vector<float> mask;
    if (shape.mask) {  // booleans become 0 and -inf, as the op makes them
      const TensorView& array = params.mask.array;
      const int64_t B = c.mask_broadcast ? 1 : c.batch, MH = c.mask_broadcast ? 1 : Hq;
      for (int64_t i = 0; i < B * MH * Lq * c.length; ++i) {
        mask.push_back(array.dtype == DType::boolean
                           ? (p.mask_bytes[i] ? 0.0f : -std::numeric_limits<float>::infinity())
                           : load_element(p.mask_bytes.data(), DType::float32, i));
      }
      inputs.emplace_back(Type::float32, std::vector<int64_t>{c.batch, Hq, Lq, c.length},
                          mask.data(),
                          std::vector<int64_t>{c.mask_broadcast ? 0 : MH * Lq * c.length,
                                               c.mask_broadcast ? 0 : Lq * c.length, c.length, 1});
    }
    metal::Call call = first_pass_call(shape, static_cast<int>(items.size()));
    const msl::Result parts = msl::run(planted(1, call), call.launch, inputs, options);
    reports.push_back(parts.report);

    std::vector<float> sinks(Hq, -std::numeric_limits<float>::infinity());
    if (!p.sink_logits.empty()) sinks = p.sink_logits;
    const int32_t counts[3] = {static_cast<int32_t>(items.size()), packed, c.group};
    const int64_t rows = shape.n_rows(), n = static_cast<int64_t>(items.size());
    call = second_pass_call(shape);
    const msl::Result merged = msl::run(
        planted(2, call), call.launch,
        {Input(Type::float32, {c.batch, H, n, rows, shape.value_rows()}, parts.outputs[0].data()),
         Input(Type::float32, {c.batch, H, n, rows, 2}, parts.outputs[1].data()),
         Input(Type::int32, {3}, counts), Input(Type::float32, {Hq}, sinks.data()), values.move()});
    reports.push_back(merged.report);
    Result result(c, c.out_dtype);
    result.out = Tensor(c.out_dtype, c.batch, Hq, Lq, D, 0);
    result.out.view.stride = {Hq * Lq * D, Lq * D, D, 1};
    result.out.bytes = merged.outputs[0];
    result.out.view.data = result.out.bytes.data();
    result.lse = merged.output<float>(1);
    return result;
  }
};

inline std::vector<msl::Report> check(const Case& c, const MetalSide& keys, const MetalSide& values,
                                      int cores = 4, const msl::Options& options = {}) {
  const Scenario p(c, keys.codec, values.codec);
  MetalDecode metal(p, keys, values);
  const Result got = metal.run(cores, options);
  const double rounding = c.out_dtype == DType::float16    ? 0x1p-11
                          : c.out_dtype == DType::bfloat16 ? 0x1p-8
                                                           : 0;
  const double error = worst_error(got, oracle(p));
  // fp32 throughout; 2e-3 would be allowed. One chain of sums for all tokens where queries are
  // many.
  EXPECT_LE(error, (c.n_queries > 16 ? 4e-5 : 2e-5) + rounding);
  const Result want = oracle(p);
  for (size_t i = 0; i < want.lse.size(); ++i) {
    if (std::isinf(want.lse[i])) {
      EXPECT_EQ(got.lse[i], want.lse[i]);
    } else {
      EXPECT_NEAR(got.lse[i], want.lse[i], 1e-5 * (1 + std::fabs(want.lse[i])));
    }
  }
  return metal.reports;
}

inline Case decode_case(int head_dim, int group, int64_t length) {
  Case c;
  c.head_dim = head_dim;
  c.group = group;
  c.n_queries = 1;
  c.length = length;
  c.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return c;
}

}  // namespace veloxquant::attention
