// rvq_attend on the MSL machine against the CPU's: within tolerance, fp16 out.
#include <cmath>
#include <limits>

#include "src/attention/rvq_calls.h"
#include "src/math/float16.h"
#include "tests/msl/support.h"
#include "tests/support/random.h"
#include "veloxquant/rvq_attend.h"

namespace veloxquant::attention {
namespace {

using metal::Type;
using msl::floats;
using msl::Input;

struct Options {
  bool causal = false, norms = false, mask = false;
  int64_t window = 0;
  int cores = 4;
};

void check(RvqShape s, const Options& o) {
  SCOPED_TRACE(testing::Message() << "D" << s.dim << ", " << s.n_tokens << " tokens");
  test::Random random(static_cast<uint64_t>(s.dim + s.n_tokens));
  s.norms = o.norms, s.mask = o.mask;
  ASSERT_FALSE(no_rvq_kernel_because(s)) << *no_rvq_kernel_because(s);
  const int64_t B = s.batch, H = s.n_kv_heads, Hq = H * s.group, Lq = s.n_queries, S = s.n_tokens;
  const int64_t D = s.dim, M = s.n_subvectors;
  RvqAttendProblem p;
  p.batch = s.batch, p.heads = static_cast<int>(Hq), p.kv_heads = s.n_kv_heads, p.dim = s.dim;
  p.sub_dim = s.sub_dim, p.n_subvectors = s.n_subvectors, p.n_queries = Lq, p.n_tokens = S;
  p.scale = 0.3f, p.causal = o.causal, p.sliding_window = o.window;
  const auto bytes = [&](int64_t n, int most) {
    std::vector<uint8_t> codes(n);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next() % most);
    return codes;
  };
  // Some codes are beyond their table.
  const auto k1 = bytes(B * H * S * D, s.n_centroids1 + 1), k2 = bytes(B * H * S * D, 255);
  const auto v = bytes(B * H * S * M, s.n_values + 1);
  const std::vector<float> q = random.normal(B * Hq * Lq * D);
  std::vector<float> norms = random.normal(o.norms ? B * H * S : 1), mask;
  p.centroids1 = random.normal(s.n_centroids1);
  p.centroids2 = random.normal(s.n_centroids2);
  p.value_table = random.normal(s.n_values * s.sub_dim);
  p.q = q.data(), p.keys1 = k1.data(), p.keys2 = k2.data(), p.values = v.data();
  if (o.norms) p.norms = norms.data();
  if (o.mask) {
    mask = random.normal(Lq * S);
    for (int64_t i = 0; i < Lq * S; i += 3) mask[i] = -std::numeric_limits<float>::infinity();
    p.mask = mask.data();
    p.mask_stride[2] = S, p.mask_stride[3] = 1;
  }
  const int64_t out_dim = M * s.sub_dim;
  std::vector<uint16_t> want(B * Hq * Lq * out_dim);
  rvq_attend(p, want.data());

  const std::vector<int32_t> seen = seen_numbers({}, {o.causal, o.window, {}}, S - Lq, Lq, S);
  std::vector<Stretch> parts = {seen_part({true, 0, 0, s.n_tokens, 0, 0}, seen)};
  const std::vector<Item> items = plan_items(s.decode(), parts, o.cores);
  std::vector<int32_t> plan;
  for (const Item& item : items) {
    plan.insert(plan.end(), {0, 0, item.first, item.count, item.position, 0});
  }
  if (items.size() < 2) plan.resize(12, 0);
  const float params[2] = {p.scale, 0.0f};
  const int n = static_cast<int>(items.size());
  std::vector<Input> inputs = {
      floats(q, {B, Hq, Lq, D}),
      Input(Type::uint8, {B, H, S, D}, k1.data()),
      Input(Type::uint8, {B, H, S, D}, k2.data()),
      Input(Type::uint8, {B, H, S, M}, v.data()),
      floats(p.centroids1, {s.n_centroids1}),
      floats(p.centroids2, {s.n_centroids2}),
      floats(p.value_table, {s.n_values, s.sub_dim}),
      floats(norms, o.norms ? std::vector<int64_t>{B, H, S} : std::vector<int64_t>{1}),
      Input(Type::int32, {static_cast<int64_t>(plan.size()) / 6, 6}, plan.data()),
      Input(Type::int32, {Lq, 4}, seen.data()),
      Input(Type::float32, {2}, params)};
  if (o.mask)
    inputs.emplace_back(Type::float32, std::vector<int64_t>{B, Hq, Lq, S}, mask.data(),
                        std::vector<int64_t>{0, 0, S, 1});
  metal::Call call = rvq_pass_call(s, n);
  const msl::Result first = msl::run(*call.kernel, call.launch, inputs);
  const DecodeShape shape = s.decode();
  call = second_pass_call(shape);
  const std::vector<float> none(Hq, -std::numeric_limits<float>::infinity()), one = {0};
  const int32_t counts[3] = {n, n, s.group};
  const int64_t rows = shape.n_rows();
  const msl::Result second =
      msl::run(*call.kernel, call.launch,
               {Input(Type::float32, {B, H, n, rows, out_dim}, first.outputs[0].data()),
                Input(Type::float32, {B, H, n, rows, 2}, first.outputs[1].data()),
                Input(Type::int32, {3}, counts), floats(none, {Hq}), floats(one, {1})});
  const std::vector<uint16_t> got = second.output<uint16_t>(0);
  ASSERT_EQ(got.size(), want.size());
  for (int64_t row = 0; row < B * Hq * Lq; ++row) {
    double error = 0, size = 0;
    for (int64_t d = 0; d < out_dim; ++d) {
      const double a = f16_to_f32(got[row * out_dim + d]), b = f16_to_f32(want[row * out_dim + d]);
      error += (a - b) * (a - b), size += b * b;
    }
    ASSERT_LE(std::sqrt(error), 1e-3 * std::sqrt(size)) << "row " << row;  // both rounded to fp16
  }
}

TEST(MetalRvqAttend, WithinToleranceOfTheCpu) {
  check({1, 2, 3, 1, 64, 200, 2, 4, 16, 4, 16}, {});
  check({2, 1, 4, 5, 128, 70, 4, 16, 32, 4, 256}, {.causal = true, .norms = true});
  check({1, 2, 1, 1, 36, 33, 8, 200, 11, 3, 9}, {.mask = true, .cores = 1});
  check({1, 1, 2, 40, 16, 130, 2, 2, 2, 16, 100}, {.causal = true, .norms = true, .window = 20});
}

TEST(MetalRvqAttend, SaysWhatItDoesNotTake) {
  EXPECT_TRUE(no_rvq_kernel_because({1, 2, 3, 1, 66, 200, 2, 4, 16, 4, 16}));
  EXPECT_TRUE(no_rvq_kernel_because({1, 2, 3, 1, 64, 200, 2, 4, 70, 4, 16}));
  EXPECT_TRUE(no_rvq_kernel_because({1, 2, 3, 1, 64, 200, 2, 4, 2, 16, 256}));
  EXPECT_TRUE(no_rvq_kernel_because({1, 1, 1, 1, 4, 1, 2, 4, 1, 4, 16}));
}

}  // namespace
}  // namespace veloxquant::attention
