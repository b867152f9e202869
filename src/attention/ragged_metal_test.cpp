// Decode attention with lengths of each sequence, strided and paged, run on the MSL machine against
// the fp64 oracle; the numbers of every codec as device_codec() lays them out.
#include <gmock/gmock.h>

#include "src/attention/device_codec.h"
#include "src/attention/ragged_calls.h"
#include "tests/msl/support.h"
#include "tests/support/ragged_problem.h"

namespace veloxquant::attention {
namespace {

using metal::Type;
using msl::Input;
using test::ragged_codec;
using test::RaggedCase;
using test::RaggedProblem;

// A side as the kernels get it.
struct Given {
  std::shared_ptr<const DeviceCodec> codec;
  const std::vector<uint8_t>& blob;
  const std::vector<uint8_t>& blocks;
  std::array<int64_t, 3> steps;

  Given(const RaggedProblem& p, const RaggedProblem::SideData& side)
      : codec(device_codec(side.codec->spec(), side.codec->tables())),
        blob(codec->blob),
        blocks(side.blocks),
        steps(p.steps(side)) {}
  explicit Given(const test::FragmentSide& side)
      : codec(device_codec(side.prepared.format)),
        blob(side.prepared.blob),
        blocks(side.blocks),
        steps(side.steps) {}

  const DeviceCodec* operator->() const { return codec.get(); }
};

Input of_blob(const Given& side, const BlobArray& array) {
  return Input(array.type, array.shape, side.blob.data() + array.at);
}

struct Attended {
  std::vector<float> out, lse;
};

// The launches of one call, as cuda_general.cu makes them.
Attended attended(const RaggedProblem& p, const Given& keys, const Given& values) {
  EXPECT_EQ(keys->no_attention + values->no_attention, "");
  const RaggedCase& c = p.c;
  const int64_t B = p.batch, H = p.heads, D = p.dim, Hq = c.n_q_heads, Lq = c.n_queries;
  RaggedShape s;
  DecodeShape& d = s.decode;
  d.batch = p.batch, d.n_kv_heads = p.heads, d.group = c.n_q_heads / p.heads;
  d.n_queries = c.n_queries, d.head_dim = p.dim;
  d.keys = keys->format, d.values = values->format;
  d.key_transform = keys->transform, d.value_transform = values->transform;
  const bool packed = *std::max_element(c.n_packed.begin(), c.n_packed.end()) > 0;
  const bool exact = *std::max_element(c.n_exact.begin(), c.n_exact.end()) > 0;
  d.n_spans = packed ? 1 : 0, d.n_exact = exact ? 1 : 0;
  d.bfloat_cache = c.bf16, d.softcap = c.softcap > 0, d.mask = c.mask;
  s.paged = c.paged;
  s.most_packed = 64 * p.max_blocks, s.most_exact = p.max_exact;
  s.sinks = c.sinks, s.window = c.window, s.causal = c.causal;
  s.table_step = p.max_blocks, s.pool = p.pool;
  EXPECT_FALSE(no_decode_kernel_because(d));

  const RaggedItems items = ragged_items(s, 2);
  const auto ragged = ragged_numbers(s, items);
  const auto counts = ragged_counts(s, items);
  const float params[2] = {p.scale, c.softcap};
  std::vector<int64_t> steps;
  for (const Given* side : {&keys, &values}) {
    for (int64_t step : side->steps) steps.push_back(step / 4);
  }
  const Input q(Type::float32, {B, Hq, Lq, D}, p.q.data());
  std::vector<Input> inputs = {q};
  std::vector<uint8_t> turned;
  if (packed && d.key_transform == 2) {
    const metal::Call call = turn_queries_call(d, static_cast<int>(keys->turn.shape[0]));
    turned = msl::run(*call.kernel, call.launch, {q, of_blob(keys, keys->turn)}).outputs[0];
    inputs.emplace_back(Type::float32, std::vector<int64_t>{B, Hq, Lq, d.key_rows()},
                        turned.data());
  }
  inputs.emplace_back(Type::int32, std::vector<int64_t>{kRaggedCount}, ragged.data());
  if (packed) inputs.emplace_back(Type::int32, std::vector<int64_t>{B}, c.n_packed.data());
  if (exact) inputs.emplace_back(Type::int32, std::vector<int64_t>{B}, c.n_exact.data());
  inputs.emplace_back(Type::float32, std::vector<int64_t>{2}, params);
  if (packed) {
    inputs.insert(inputs.end(), {of_blob(keys, keys->move), of_blob(keys, keys->table),
                                 of_blob(values, values->table)});
    inputs.emplace_back(Type::int64, std::vector<int64_t>{6}, steps.data());
    for (const Given* side : {&keys, &values}) {
      const int64_t bytes = static_cast<int64_t>(side->blocks.size());
      inputs.emplace_back(Type::uint8, std::vector<int64_t>{bytes}, side->blocks.data());
    }
    if (c.paged) {
      inputs.emplace_back(Type::int32, std::vector<int64_t>{B, p.max_blocks}, p.table.data());
    }
  }
  for (const auto* side : {&p.keys, &p.values}) {
    if (!exact) continue;
    inputs.emplace_back(c.bf16 ? Type::bfloat16 : Type::float16,
                        std::vector<int64_t>{B, H, p.max_exact, D}, side->exact.data());
  }
  if (c.mask) {
    inputs.emplace_back(Type::float32, std::vector<int64_t>{B, Hq, Lq, p.max_length}, p.mask.data(),
                        std::vector<int64_t>{Lq * p.max_length, 0, p.max_length, 1});
  }
  metal::Call call = ragged_first_pass_call(s, items);
  msl::Options options;
  options.all_written = false;  // parts of items that no query sees
  const msl::Result parts = msl::run(*call.kernel, call.launch, inputs, options);

  std::vector<float> sinks(Hq, -std::numeric_limits<float>::infinity());
  if (c.sink_logits) sinks = p.sink_logits;
  call = ragged_second_pass_call(s);
  const int64_t n = items.all(), rows = d.n_rows();
  const float one = 0;
  const msl::Result merged =
      msl::run(*call.kernel, call.launch,
               {Input(Type::float32, {B, H, n, rows, D}, parts.outputs[0].data()),
                Input(Type::float32, {B, H, n, rows, 2}, parts.outputs[1].data()),
                Input(Type::int32, {4}, counts.data()), Input(Type::float32, {Hq}, sinks.data()),
                packed ? of_blob(values, values->move) : Input(Type::float32, {1}, &one)});
  return {merged.output<float>(0), merged.output<float>(1)};
}

double error_of(const RaggedProblem& p, const Given& keys, const Given& values) {
  const Attended got = attended(p, keys, values);
  std::vector<float> want, want_lse;
  p.oracle(want, want_lse);
  for (size_t i = 0; i < got.lse.size(); ++i) {
    if (std::isinf(want_lse[i])) {
      EXPECT_EQ(got.lse[i], want_lse[i]) << i;
    } else {
      EXPECT_NEAR(got.lse[i], want_lse[i], 2e-3 * (1 + std::fabs(want_lse[i]))) << i;
    }
  }
  return test::worst_row(got.out, want, p.dim);
}

double error_of(const RaggedProblem& p) { return error_of(p, {p, p.keys}, {p, p.values}); }

constexpr double kTolerance = 2e-3;  // operands are halves

RaggedProblem problem(const RaggedCase& c, const char* key_method, const char* key,
                      const char* value_method, const char* value, int head_dim = 64) {
  return RaggedProblem(c, ragged_codec(key_method, key, Side::keys, head_dim),
                       ragged_codec(value_method, value, Side::values, head_dim));
}

TEST(RaggedMetal, LengthsOfEachSequence) {
  RaggedCase c;
  c.n_packed = {0, 1, 63, 64, 65, 400, 128, 0};
  c.n_exact = {70, 4, 10, 68, 300, 90, 0, 0};
  EXPECT_LE(error_of(problem(c, "turboquant", "2", "turboquant", "4")), kTolerance);
  c.paged = true;
  EXPECT_LE(error_of(problem(c, "turboquant", "4", "turboquant", "3 unbiased")), kTolerance);
}

TEST(RaggedMetal, QueriesWindowsAndMasks) {
  RaggedCase c;
  c.n_packed = {3, 0, 400, 64};
  c.n_exact = {1, 2, 90, 300};  // fewer tokens than queries, and more sinks than tokens
  c.n_queries = 5;
  c.bf16 = true;
  EXPECT_LE(error_of(problem(c, "turboquant_rvq", "1", "turboquant_rvq", "2")), kTolerance);
  c.window = 100;
  c.paged = true;
  c.sink_logits = true;
  EXPECT_LE(error_of(problem(c, "rabitq", "2 mean", "rabitq", "4 reconstruction")), kTolerance);
  c.mask = true;
  c.softcap = 20;
  c.window = 0;
  EXPECT_LE(error_of(problem(c, "vecinfer", "4x256 hadamard head", "turboquant", "2")), kTolerance);
  c.n_packed = {70, 400};
  c.n_exact = {30, 90};
  c.n_queries = 16;
  c.n_q_heads = 2;
  c.causal = false;
  EXPECT_LE(error_of(problem(c, "qjl", "1", "turboquant", "1")), kTolerance);
}

TEST(RaggedMetal, MatricesTurnQueries) {
  RaggedCase c;
  c.n_packed = {200, 63};
  c.n_exact = {50, 6};
  c.n_queries = 2;
  EXPECT_LE(error_of(problem(c, "vecinfer", "2x16 dense", "vecinfer", "8x200 dense head")),
            kTolerance);
  EXPECT_LE(error_of(problem(c, "qjl", "2", "vecinfer", "4x1000 none", 80)), kTolerance);
}

TEST(RaggedMetal, CodesInFragmentOrder) {
  RaggedCase c;
  c.n_packed = {1, 200, 63};
  c.n_exact = {6, 50, 6};
  c.n_queries = 3;
  for (const auto& [keys, values, dim] :
       {std::tuple{"4x256 hadamard int8", "2x256 dense head", 64},
        std::tuple{"2x200 dense", "4x256 dense head int8", 80},
        std::tuple{"4x250 none head int8", "4x256 hadamard int8", 96}}) {
    const RaggedProblem p = problem(c, "vecinfer", keys, "vecinfer", values, dim);
    const test::FragmentSide k(p, p.keys), v(p, p.values);
    EXPECT_LE(error_of(p, Given(k), Given(v)), kTolerance) << keys;
    c.paged = true;
  }
}

TEST(RaggedMetal, QueryThatIsNotFiniteGivesNaN) {
  RaggedCase c;
  c.n_queries = 2;
  RaggedProblem p = problem(c, "turboquant", "2", "turboquant", "2");
  p.q[5] = std::numeric_limits<float>::infinity();            // the first head's first query
  p.q[64 * 3 + 9] = std::numeric_limits<float>::quiet_NaN();  // the second head's second
  const Attended got = attended(p, {p, p.keys}, {p, p.values});
  for (size_t i = 0; i < got.out.size(); ++i) {
    EXPECT_EQ(std::isnan(got.out[i]), i / 64 == 0 || i / 64 == 3) << i;
  }
  for (size_t i = 0; i < got.lse.size(); ++i) {
    EXPECT_EQ(std::isnan(got.lse[i]), i == 0 || i == 3) << i;
  }
}

TEST(RaggedMetal, OnlyOneOfTheTwoForms) {
  RaggedCase c;
  c.n_packed = {0, 0};
  c.n_exact = {9, 600};
  EXPECT_LE(error_of(problem(c, "turboquant", "2", "turboquant", "2")), kTolerance);
  c.n_packed = {100, 0};
  c.n_exact = {0, 0};
  EXPECT_LE(error_of(problem(c, "turboquant", "2", "turboquant", "2")), kTolerance);
}

// Rows of many queries: simdgroups with rows of their own decode a tile together.
TEST(RaggedMetal, ManyQueriesShareATile) {
  RaggedCase c;
  c.n_packed = {3, 200, 64};
  c.n_exact = {41, 90, 130};
  c.n_queries = 40;  // 80 rows
  EXPECT_LE(error_of(problem(c, "turboquant", "2", "turboquant", "4")), kTolerance);
  c.window = 100;
  c.paged = c.bf16 = true;
  EXPECT_LE(error_of(problem(c, "vecinfer", "4x256 hadamard head", "rabitq", "2 mean", 32)),
            kTolerance);
  c.n_packed = {70, 128};
  c.n_exact = {80, 5};
  c.n_queries = 70;  // 140 rows: 32 of a simdgroup
  c.mask = true;
  c.paged = false;
  c.window = 0;
  EXPECT_LE(error_of(problem(c, "vecinfer", "2x16 dense", "turboquant_rvq", "1", 32)), kTolerance);
}

// Where the codes of a lane lie differs with head_dim and width: every form of it.
TEST(RaggedMetal, HeadsOfEveryKind) {
  struct One {
    const char *key_method, *key, *value_method, *value;
    int dim;
  };
  RaggedCase c;
  c.n_packed = {100};
  c.n_exact = {9};
  for (const One& one :
       {One{"turboquant", "1", "turboquant", "3", 128},
        One{"turboquant", "3", "turboquant_rvq", "1", 128},
        One{"turboquant_rvq", "1", "turboquant", "1", 128},
        One{"turboquant_rvq", "2", "turboquant_rvq", "2", 128},
        One{"turboquant_rvq", "3", "turboquant_rvq", "4", 64},
        One{"rabitq", "1", "rabitq", "3 mean", 128}, One{"rabitq", "4 mean", "rabitq", "1", 72},
        One{"vecinfer", "1x16 none", "vecinfer", "16x256 none head", 128},
        One{"vecinfer", "8x1000 dense", "vecinfer", "3x64 hadamard head", 96},
        One{"turboquant", "4", "turboquant", "2", 192},
        One{"turboquant", "2", "turboquant", "4", 256},
        One{"turboquant", "3", "turboquant", "3", 256}}) {
    const auto text = std::string(one.key_method) + " " + one.key + " | " + one.value_method + " " +
                      one.value + " " + std::to_string(one.dim);
    EXPECT_LE(error_of(problem(c, one.key_method, one.key, one.value_method, one.value, one.dim)),
              kTolerance)
        << text;
  }
  c.n_queries = 40;  // by all simdgroups together
  c.n_exact = {70};
  for (const One& one :
       {One{"turboquant", "2", "turboquant", "3", 128},
        One{"turboquant_rvq", "1", "turboquant_rvq", "1", 128},
        One{"rabitq", "2", "turboquant", "4", 128}, One{"turboquant", "4", "rabitq", "2", 256}}) {
    EXPECT_LE(error_of(problem(c, one.key_method, one.key, one.value_method, one.value, one.dim)),
              kTolerance)
        << one.key_method << " " << one.key << " " << one.dim;
  }
}

TEST(RaggedMetal, ItemsFillTheCoresAndNoMore) {
  RaggedShape s;
  s.decode.head_dim = 128, s.decode.group = 4, s.decode.n_kv_heads = 8;
  s.decode.n_spans = s.decode.n_exact = 1;
  s.most_packed = 131072, s.most_exact = 132, s.sinks = 4;
  RaggedItems items = ragged_items(s, 132);
  EXPECT_EQ(items.packed, 48);  // three at once
  EXPECT_EQ(items.exact, 1);
  EXPECT_TRUE(items.apart);
  s.decode.batch = 8;
  EXPECT_EQ(ragged_items(s, 132).packed, 6);
  s.most_packed = 500;
  EXPECT_EQ(ragged_items(s, 132).packed, 2);
  s.decode.batch = 1, s.decode.n_queries = 8;  // 32 rows of a simdgroup, two at once
  s.most_packed = 131072, s.most_exact = 600;
  EXPECT_FALSE(ragged_cut(s).together);
  EXPECT_EQ(ragged_cut(s).row_tiles(), 2);
  EXPECT_EQ(ragged_items(s, 132).packed, 30);
  EXPECT_EQ(ragged_items(s, 132).exact, 3);
  s.decode.n_queries = 512;  // eight threadgroups of 256 rows a head
  EXPECT_TRUE(ragged_cut(s).together);
  EXPECT_EQ(ragged_cut(s).row_tiles(), 16);
  items = ragged_items(s, 132);
  EXPECT_EQ(items.packed, 2);
  EXPECT_EQ(items.exact, 2);
  EXPECT_EQ(items.exact_tokens, 320);
  s.decode.key_transform = 3;
  s.shared_bytes = 99 << 10;  // of GPUs that have less
  EXPECT_TRUE(ragged_cut(s).together);
  EXPECT_EQ(ragged_cut(s).row_tiles(), 8);
  s.decode.keys.n_rows = 1024, s.decode.key_transform = 2;
  EXPECT_FALSE(ragged_cut(s).together);
  EXPECT_EQ(ragged_cut(s).parts, 1);
  s.shared_bytes = 48 << 10;
  EXPECT_THROW(ragged_cut(s), Error);
}

TEST(DeviceCodecTest, RefusesWhatHasNoKernels) {
  using testing::HasSubstr;
  const auto refused = [](const CodecSpec& spec) {
    try {
      device_codec(spec, {});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(refused({"exact", Side::keys, 2, 64, {{"dtype", std::string("float16")}}}),
              HasSubstr("wanted one with GPU kernels"));
  EXPECT_THAT(refused({"turboquant", Side::keys, 2, 512, {{"bits", int64_t{2}}}}),
              HasSubstr("head_dim: got 512"));
  const auto prod = ragged_codec("turboquant", "3 prod", Side::keys, 64);
  EXPECT_THAT(device_codec(prod->spec(), prod->tables())->no_attention, HasSubstr("prod"));
}

}  // namespace
}  // namespace veloxquant::attention
