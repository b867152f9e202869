// Decode attention on Metal, run on the MSL machine, against the fp64 oracle.
#include <cstring>

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
namespace {

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
  qjl::Sketch sketch;  // qjl of more than one block: transform 2

  Input table() const {
    const bool half = format.kind == TileKind::vecinfer;
    return Input(half ? Type::float16 : Type::float32, table_shape,
                 half ? static_cast<const void*>(owned.tables.data()) : numbers.data());
  }
  Input move() const { return Input(Type::float32, moved_shape, moved.data()); }
};

Type type_of(DType dtype) {
  return dtype == DType::float16    ? Type::float16
         : dtype == DType::bfloat16 ? Type::bfloat16
                                    : Type::float32;
}

MetalSide vecinfer_side(test::Random& random, Side side, const Case& c, const Codes& codes) {
  MetalSide s;
  const int64_t H = c.n_kv_heads, D = c.head_dim;
  s.owned = test::random_codec(random, side, c.n_kv_heads, c.head_dim, c.head_dim / codes.sub_dim,
                               codes.n_centroids, codes.per_head, codes.kind);
  s.codec = s.owned.codec;
  s.format = {codes.sub_dim, codes.n_centroids, vecinfer::code_bits(codes.n_centroids),
              codes.per_head ? 1 : c.head_dim / codes.sub_dim};
  s.transform = static_cast<int>(codes.kind);
  s.table_shape = {1, H, s.format.tables, codes.n_centroids, codes.sub_dim};
  s.moved = s.owned.scale.empty() ? std::vector<float>(H * D, 1.0f) : s.owned.scale;
  s.moved_shape = {H, D};
  if (s.transform == 2 && side == Side::values) {
    s.moved = s.owned.query_matrix;
    s.moved_shape = {H, D, D};
  }
  return s;
}

constexpr uint64_t kSeed = 5;

MetalSide rotated(CodecPtr codec, CodeFormat format, std::vector<float> numbers,
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
MetalSide scalar_side(Side side, const Case& c, int bits, int stages) {
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

MetalSide rabitq_side(Side side, const Case& c, int bits, bool has_mean) {
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
MetalSide qjl_side(const Case& c, int blocks) {
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
  if (blocks > 1) s.transform = 2;
  s.sketch = sketch;
  return s;
}

// Both passes of one call of attend(), as the MLX layer makes them.
struct MetalDecode {
  const Scenario& p;
  const MetalSide &keys, &values;
  DecodeShape shape;
  std::vector<msl::Report> reports;
  size_t n_items = 0;

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
    const int64_t D = shape.head_dim, rows = shape.key_rows();
    const bool sketched = keys.sketch.m() > 0;
    std::vector<float> matrix = keys.owned.query_matrix;
    if (sketched) {
      std::vector<float> identity(D * D, 0.0f);
      for (int64_t d = 0; d < D; ++d) identity[d * D + d] = 1.0f;
      matrix.resize(D * rows);
      keys.sketch.project(identity.data(), static_cast<int>(D), matrix.data());
    }
    const int matrices = sketched ? 1 : shape.n_kv_heads;
    const metal::Call call = turn_queries_call(shape, matrices);
    return msl::run(*call.kernel, call.launch,
                    {q, Input(Type::float32, {matrices, D, rows}, matrix.data())})
        .output<float>(0);
  }

  Result run(int cores) {
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
    const msl::Result parts = msl::run(*call.kernel, call.launch, inputs);
    reports.push_back(parts.report);

    std::vector<float> sinks(Hq, -std::numeric_limits<float>::infinity());
    if (!p.sink_logits.empty()) sinks = p.sink_logits;
    const int32_t counts[3] = {static_cast<int32_t>(items.size()), packed, c.group};
    const int64_t rows = shape.n_rows(), n = static_cast<int64_t>(items.size());
    call = second_pass_call(shape);
    const msl::Result merged = msl::run(
        *call.kernel, call.launch,
        {Input(Type::float32, {c.batch, H, n, rows, D}, parts.outputs[0].data()),
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

std::vector<msl::Report> check(const Case& c, const MetalSide& keys, const MetalSide& values,
                               int cores = 4) {
  const Scenario p(c, keys.codec, values.codec);
  MetalDecode metal(p, keys, values);
  const Result got = metal.run(cores);
  const double rounding = c.out_dtype == DType::float16    ? 0x1p-11
                          : c.out_dtype == DType::bfloat16 ? 0x1p-8
                                                           : 0;
  const double error = worst_error(got, oracle(p));
  EXPECT_LE(error, 2e-5 + rounding);  // fp32 throughout; 2e-3 would be allowed
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

std::vector<msl::Report> check(const Case& c, const Codes& key_codes = {},
                               const Codes& value_codes = {}, int cores = 4, uint64_t seed = 11) {
  test::Random random(seed);
  const MetalSide keys = vecinfer_side(random, Side::keys, c, key_codes);
  return check(c, keys, vecinfer_side(random, Side::values, c, value_codes), cores);
}

Case decode_case(int head_dim, int group, int64_t length) {
  Case c;
  c.head_dim = head_dim;
  c.group = group;
  c.n_queries = 1;
  c.length = length;
  c.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return c;
}

TEST(MetalDecode, GroupsAndHeadDims) {
  check(decode_case(128, 4, 400));
  check(decode_case(64, 8, 300), Codes{8, 256, false}, Codes{4, 256, true, TransformKind::none});
  check(decode_case(256, 1, 200), Codes{4, 256, true}, Codes{8, 256, true});
}

TEST(MetalDecode, OddHeadDimsAndCodeWidths) {
  check(decode_case(80, 3, 270), Codes{4, 64, true}, Codes{2, 16, true, TransformKind::none});
  check(decode_case(96, 2, 330), Codes{2, 300, true}, Codes{3, 2000, false, TransformKind::none});
  check(decode_case(64, 5, 260), Codes{1, 5, true, TransformKind::none}, Codes{16, 100, true});
}

TEST(MetalDecode, DenseTransforms) {
  const Codes dense{4, 256, false, TransformKind::dense};
  check(decode_case(64, 2, 300), dense, dense);
}

TEST(MetalDecode, ScalarCodecs) {
  const auto both = [](Case c, int key_bits, int value_bits, int stages) {
    check(c, scalar_side(Side::keys, c, key_bits, stages),
          scalar_side(Side::values, c, value_bits, stages));
  };
  both(decode_case(128, 4, 400), 2, 2, 1);
  both(decode_case(80, 3, 270), 3, 1, 1);
  both(decode_case(64, 8, 300), 4, 3, 1);
  both(decode_case(96, 1, 330), 1, 2, 2);
  both(decode_case(256, 2, 200), 3, 4, 2);
}

TEST(MetalDecode, BitPlanes) {
  Case c = decode_case(128, 4, 400);
  check(c, rabitq_side(Side::keys, c, 1, false), rabitq_side(Side::values, c, 2, false));
  c = decode_case(80, 2, 270);
  check(c, rabitq_side(Side::keys, c, 3, true), rabitq_side(Side::values, c, 4, true));
  c = decode_case(64, 3, 300);
  check(c, qjl_side(c, 1), scalar_side(Side::values, c, 4, 1));
  check(c, qjl_side(c, 2), rabitq_side(Side::values, c, 4, false));
}

// Codecs of two kinds, each with its own transform and table; several queries and a cut span.
TEST(MetalDecode, MixedCodecs) {
  Case c = decode_case(64, 2, 400);
  c.n_queries = 3;
  c.batch = 2;
  c.cut = 17;
  c.n_new_blocks = 2;
  c.strict = true;
  test::Random random(5);
  check(c, scalar_side(Side::keys, c, 4, 1), vecinfer_side(random, Side::values, c, {}));
  const Codes dense{4, 256, false, TransformKind::dense};
  check(c, rabitq_side(Side::keys, c, 2, false), vecinfer_side(random, Side::values, c, dense));
  check(c, vecinfer_side(random, Side::keys, c, dense), scalar_side(Side::values, c, 2, 2));
}

TEST(MetalDecode, ManyQueriesMasksCapsSinksAndTypes) {
  Case c = decode_case(64, 3, 400);
  c.n_queries = 5;
  c.batch = 2;
  c.n_new_blocks = 2;
  c.strict = true;
  c.cut = 17;
  c.q_dtype = c.out_dtype = DType::float16;
  check(c);
  c.strict = false;
  c.sliding_window = 150;
  c.q_dtype = c.out_dtype = c.exact_dtype = DType::bfloat16;
  c.sink_logits = true;
  check(c);
  c.cut = 0;  // a mask, three spans and three exact arrays would be more buffers than Metal has
  c.mask = MaskKind::boolean;
  c.softcap = 20;
  c.q_dtype = c.out_dtype = DType::float32;
  check(c);
  c.mask = MaskKind::additive;
  c.mask_broadcast = true;
  c.causal = false;
  check(c);
}

// Prefill: more queries than share a threadgroup's rows, and tokens that none of them sees.
TEST(MetalDecode, HundredsOfQueries) {
  Case c = decode_case(64, 2, 700);
  c.n_queries = 70;
  c.n_new_blocks = 1;
  check(c);
  c.strict = true;
  c.sliding_window = 200;
  check(c, scalar_side(Side::keys, c, 2, 1), scalar_side(Side::values, c, 2, 1));
}

TEST(MetalDecode, PartsThatAreSeen) {
  const std::vector<int32_t> seen = {100, 400, 300, 50, 130, 401, 320, 50};
  const Stretch packed = seen_part({true, 1, 2, 1000, 20, 99}, seen);
  EXPECT_EQ(packed.first, 3);  // whole blocks below position 100 are left out
  EXPECT_EQ(packed.position, 84);
  EXPECT_EQ(packed.count, 320 - 84);
  const Stretch exact = seen_part({false, 1, 2, 1000, 20, 0}, seen);
  EXPECT_EQ(exact.first, 82);
  EXPECT_EQ(exact.position, 100);
  EXPECT_EQ(exact.count, 401 - 100);
  EXPECT_EQ(seen_part({false, 1, 2, 70, 20, 0}, seen).count, 0);
  EXPECT_EQ(seen_part({true, 1, 2, 70, 320, 9}, seen).count, 0);
}

TEST(MetalDecode, WithoutPackedBlocks) {
  Case c = decode_case(96, 4, 40);
  check(c);
  c.n_queries = 3;
  c.length = 3;
  check(c);
}

TEST(MetalDecode, ResultsDoNotDependOnTheCut) {
  for (int cores : {1, 3, 64}) check(decode_case(64, 2, 900), Codes{}, Codes{}, cores);
}

// GQA shares each load: the first pass asks for every packed byte once, at any ratio.
TEST(MetalDecode, ReadsThePackedBytesOnce) {
  for (int group : {1, 2, 4, 8}) {
    SCOPED_TRACE(group);
    Case c = decode_case(128, group, 64 * 16 + 4 + 64);
    c.n_kv_heads = 1;
    const msl::Report report = check(c, Codes{4, 256, true}, Codes{4, 256, true}, 1)[0];
    const int64_t side = 16 * 2048;  // 16 blocks of 64 tokens of 32 codes of a byte
    for (const char* name : {"k0", "v0"}) {
      EXPECT_EQ(report.buffers.at(name).requested, side) << name;
      EXPECT_EQ(report.buffers.at(name).once, side) << name;
    }
    // All the rest but the exact tokens: what does not grow with the context is the tables and q.
    int64_t once = 0;
    for (const auto& [name, traffic] : report.buffers) {
      if (name[0] != 'e' && name != "q" && name != "k_tables" && name != "v_tables") {
        once += traffic.once;
      }
    }
    EXPECT_LE(once, 1.05 * 2 * side);
    EXPECT_LE(report.threadgroup_bytes, 17 * 1024);
  }
}

// At 4096 tokens and batch 1 every core of an M1 (8) to an M5 Max (40) has 8 threadgroups.
TEST(MetalDecode, PlanFillsTheCores) {
  DecodeShape s;
  s.head_dim = 128;
  s.group = 4;
  s.n_kv_heads = 8;
  for (int cores : {8, 10, 20, 40}) {
    const std::vector<Item> items = plan_items(
        s, {{true, 0, 0, 4096, 4, 64}, {false, 0, 0, 4, 0, 0}, {false, 0, 4, 90, 4100, 0}}, cores);
    EXPECT_GE(static_cast<int>(items.size()) * s.n_kv_heads, 8 * cores) << cores;
    int position = 4, packed = 0;
    for (const Item& item : items) {
      if (!item.packed) continue;
      EXPECT_EQ(item.position, position);
      EXPECT_EQ(item.first, packed / 64);
      position += item.count;
      packed += item.count;
    }
    EXPECT_EQ(packed, 4096);
  }
}

}  // namespace
}  // namespace veloxquant::attention
