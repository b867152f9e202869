// Operations of kernels, counted: the table of docs/metal.md, printed, and held against limits.
#include <cstdio>

#include "src/attention/kernel_calls.h"
#include "tests/msl/emulated_codec.h"

namespace veloxquant::msl {
namespace {

void print(const std::string& name, const Counted& counted, double elements) {
  const Operations& all = counted.operations;
  const Traffic& traffic = counted.traffic;
  std::printf("| %s | %.1f | %.1f | %.1f | %.2f | %.2f | %.1f |\n", name.c_str(),
              all.floating / elements, all.integer / elements, all.memory / elements,
              traffic.device_distinct / elements, traffic.device_written / elements,
              traffic.threadgroup_accesses / elements);
}

TEST(Operations, AreThoseOfTheText) {
  metal::Kernel kernel;
  kernel.name = "counted";
  kernel.inputs = {"x"};
  kernel.outputs = {"y"};
  kernel.body = R"(
  float sum = 0.0f;
  for (int i = 0; i < 100; ++i) sum += x[i] * x[i];
  y[thread_position_in_grid.x] = sum;
)";
  metal::Launch launch;
  launch.grid = {64, 1, 1};
  launch.threadgroup = {32, 1, 1};
  launch.outputs = {{metal::Type::float32, {64}}};
  const std::vector<float> x(100, 2.0f);
  const Operations all = count(kernel, launch, {floats(x, {100})});
  EXPECT_GE(all.floating, 64 * 100);  // fused, or a product and a sum
  EXPECT_LE(all.floating, 64 * 202);
  EXPECT_GE(all.memory, 64 * 101);
  EXPECT_LE(all.memory, 64 * 110);
  EXPECT_LE(all.integer, 64 * 310);  // the loop's own, as far as it is not unrolled
}

test::CasePtr case_of(const std::string& method, const std::string& label) {
  for (const test::CasePtr& one : test::codec_cases(method, 128)) {
    if (one->label().find(label) != std::string::npos) return one;
  }
  throw Fault("no case " + method + " " + label);
}

TEST(Operations, OfEncodeAndDecode) {
  std::printf(
      "| kernel | floating point | integer | loads and stores | bytes read | written | threadgroup "
      "|\n");
  const std::pair<const char*, const char*> cases[] = {
      {"vecinfer", "d4x256"}, {"turboquant", "2 bits"}, {"turboquant_rvq", "2"},
      {"rabitq", "1 bits"},   {"rabitq", "4 bits"},     {"qjl", "2 blocks"},
      {"commvq", "4x64"},
  };
  for (const auto& [method, label] : cases) {
    const test::CasePtr one = case_of(method, label);
    test::ExactRandom random(3);
    const std::vector<float> x = random.values(64 * 128);
    const auto [encode, decode] = EmulatedCodec(*one, 0).counts(x, 64);
    print(one->label() + ", encode", encode, 64 * 128);
    print(one->label() + ", decode", decode, 64 * 128);
    EXPECT_GT(encode.operations.floating, 64 * 128);
    const Operations& all = decode.operations;
    EXPECT_LT(all.floating + all.integer, int64_t{64} * 128 * 400) << one->label();
  }
}

// The first pass of attention on 16 blocks, of one KV head.
Counted attention_counts(int group, attention::CodeFormat keys, attention::CodeFormat values,
                         int transform, int n_queries = 1) {
  const int D = 128, blocks = 16;
  attention::DecodeShape s;
  s.group = group, s.n_queries = n_queries, s.head_dim = D, s.n_spans = 1;
  s.keys = keys, s.values = values, s.key_transform = s.value_transform = transform;
  test::ExactRandom random(5);
  const std::vector<float> q = random.values(group * n_queries * D), ones(2 * D, 1.0f);
  const std::vector<attention::Item> items =
      attention::plan_items(s, {{true, 0, 0, 64 * blocks, 0, blocks}}, 1);
  std::vector<int32_t> plan;
  for (const attention::Item& item : items) {
    plan.insert(plan.end(), {0, 0, item.first, item.count, item.position, item.capacity});
  }
  if (items.size() < 2) plan.resize(12, 0);
  std::vector<int32_t> seen;
  for (int i = 0; i < n_queries; ++i) {
    seen.insert(seen.end(), {0, 64 * blocks, INT32_MAX, INT32_MAX});
  }
  const float params[2] = {0.1f, 0.0f};
  const auto table = [&](const attention::CodeFormat& f) {
    if (f.kind == attention::TileKind::scalar) return floats(ones, {f.stages, 16});
    static const std::vector<uint16_t> entries(256 * 4, 0x3c00);
    return Input(metal::Type::float16, {1, 1, 1, 256, 4}, entries.data());
  };
  std::vector<uint8_t> bytes(blocks * 8192);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next() & 0x3b);  // finite scalars
  const auto span = [&](const attention::CodeFormat& f) {
    const int64_t size = f.kind == attention::TileKind::scalar
                             ? int64_t{8} * D * f.bits * f.stages + 128
                             : int64_t{D} / f.sub_dim * 8 * f.bits;
    return Input(metal::Type::uint8, {1, 1, blocks, size}, bytes.data());
  };
  const metal::Call call = attention::first_pass_call(s, static_cast<int>(items.size()));
  return counted(
      *call.kernel, call.launch,
      {floats(q, {1, group, n_queries, D}),
       Input(metal::Type::int32, {static_cast<int64_t>(plan.size()) / 6, 6}, plan.data()),
       Input(metal::Type::int32, {n_queries, 4}, seen.data()),
       Input(metal::Type::float32, {2}, params),
       floats(ones, transform == 3 ? std::vector<int64_t>{2, D} : std::vector<int64_t>{1, D}),
       table(keys), table(values), span(keys), span(values)});
}

TEST(Operations, OfDecodeAttention) {
  attention::CodeFormat scalar;
  scalar.kind = attention::TileKind::scalar, scalar.bits = 2;
  attention::CodeFormat by_token = scalar;
  by_token.by_token = true;
  const attention::CodeFormat vectors{4, 256, 8, 1};
  const double elements = 2.0 * 1024 * 128;  // of keys and of values
  for (int group : {1, 4, 8}) {
    const Counted a = attention_counts(group, vectors, vectors, 1);
    print("decode attention, vecinfer d4x256, " + std::to_string(group) + " query heads", a,
          elements);
    EXPECT_GE(a.operations.floating, group * elements);  // a product and its sum, fused, each
    EXPECT_LE(a.operations.floating, (4 + 1.5 * group) * elements);
    const Counted b = attention_counts(group, scalar, by_token, 3);
    print("decode attention, turboquant 2 bits, " + std::to_string(group) + " query heads", b,
          elements);
    EXPECT_LE(b.operations.floating, (4 + 1.5 * group) * elements);
  }
}

// By query row: what 32 of them share is one decoding.
TEST(Operations, OfPrefill) {
  attention::CodeFormat scalar;
  scalar.kind = attention::TileKind::scalar, scalar.bits = 2;
  attention::CodeFormat by_token = scalar;
  by_token.by_token = true;
  const attention::CodeFormat vectors{4, 256, 8, 1};
  const double rows = 4 * 32, elements = 2.0 * 1024 * 128 * rows;
  for (bool look_ups : {true, false}) {
    const Counted a = look_ups ? attention_counts(4, vectors, vectors, 1, 32)
                               : attention_counts(4, scalar, by_token, 3, 32);
    print(std::string("prefill, ") + (look_ups ? "vecinfer d4x256" : "turboquant 2 bits") +
              ", 32 queries of 4 heads, a query row",
          a, elements);
    EXPECT_GE(a.operations.floating, elements);
    EXPECT_LE(a.operations.floating, 1.6 * elements);
  }
}

}  // namespace
}  // namespace veloxquant::msl
