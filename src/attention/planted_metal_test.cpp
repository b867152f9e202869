// Faults planted one by one in the text of attention's kernels: each is caught by the machine, or
// by the oracle. (Those of the machine's own test are in kernels of a line.)
#include <gmock/gmock.h>

#include "src/attention/decode_metal_fixture.h"

namespace veloxquant::attention {
namespace {

// What is taken out of a pass's text (`from`, its place number `place`), and what comes there.
struct Planted {
  const char* what;
  int pass;
  const char *from, *to;
  int place = 0;
  bool prefill = false;
};

void PrintTo(const Planted& p, std::ostream* out) { *out << p.what; }

Result answer(const Scenario& p, const MetalSide& keys, const MetalSide& values,
              const Planted* planted) {
  MetalDecode metal(p, keys, values);
  bool found = planted == nullptr;
  metal.plant = [&](int pass, metal::Kernel& kernel) {
    if (planted == nullptr || pass != planted->pass) return;
    size_t at = 0;
    for (int i = 0; i <= planted->place && at != std::string::npos; ++i) {
      at = kernel.header.find(planted->from, i == 0 ? 0 : at + 1);
    }
    found = at != std::string::npos;
    if (found) kernel.header.replace(at, std::strlen(planted->from), planted->to);
  };
  Result got = metal.run(1);
  EXPECT_TRUE(found) << "the text has no more: " << planted->from;
  return got;
}

class PlantedInAttention : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedInAttention, IsCaught) {
  const Planted& planted = GetParam();
  // A threadgroup has more blocks than simdgroups, and what it starts and ends with is cut.
  Case c = decode_case(32, 2, 900);
  c.n_kv_heads = 8;
  c.n_queries = planted.prefill ? 20 : 3;
  c.n_new_blocks = 1;
  c.strict = true;
  c.cut = 17;
  c.sliding_window = 700;
  c.scale = 0.01f;  // no token decides alone
  test::Random random(5);
  const MetalSide keys = vecinfer_side(random, Side::keys, c, {});
  const MetalSide values = scalar_side(Side::values, c, 3, 1);
  const Scenario p(c, keys.codec, values.codec);
  static double right[2] = {-1, -1};
  double& error = right[planted.prefill];
  if (error < 0) error = worst_error(answer(p, keys, values, nullptr), oracle(p));
  const double most = 4e-5;  // as decode_metal_fixture.h allows
  EXPECT_LE(error, most);    // without the fault
  std::string fault;
  double wrong = 0;
  try {
    wrong = worst_error(answer(p, keys, values, &planted), oracle(p));
  } catch (const msl::Fault& caught) {
    fault = caught.what();
  }
  EXPECT_TRUE(!fault.empty() || !(wrong <= most)) << "error of a row " << wrong;
  EXPECT_EQ(fault.find("does not compile"), std::string::npos) << fault;
  RecordProperty("caught", fault.empty() ? "error of a row " + std::to_string(wrong) : fault);
}

const char *const kSimdBarrier = "simdgroup_barrier(mem_flags::mem_threadgroup);",
                  *const kBarrier = "barrier_of_group();";

INSTANTIATE_TEST_SUITE_P(
    Metal, PlantedInAttention,
    ::testing::Values(
        Planted{"a_maximum_of_one_lane", 1, "simd_max(largest)", "largest"},
        Planted{"a_sum_of_both_halves", 1, "0.5f * simd_sum(own)", "simd_sum(own)"},
        Planted{"halves_of_the_wrong_width", 1, "simd_shuffle_xor(score[r][i], 16)",
                "simd_shuffle_xor(score[r][i], 8)"},
        Planted{"the_last_block_forgotten", 1, "64 * block < n_tokens",
                "64 * block + 63 < n_tokens"},
        Planted{"one_token_too_far", 1, "at + i < n_tokens", "at + i <= n_tokens"},
        Planted{"one_exact_token_too_far", 1, "at + i < n_tokens", "at + i <= n_tokens", 1},
        Planted{"a_token_in_both_forms", 1, "position >= code_end", "position + 1 >= code_end"},
        Planted{"a_window_one_too_wide", 1, "position >= begin", "position >= begin - 1"},
        Planted{"a_softmax_that_keeps_all", 1, "own[r][k] *= keep", "own[r][k] *= max(keep, 1.0f)"},
        Planted{"no_barrier_before_sums", 1, kSimdBarrier, "", 1},
        Planted{"no_barrier_after_sums", 1, kSimdBarrier, "", 2},
        Planted{"no_barrier_between_turns", 1, kBarrier, "", 0},
        Planted{"queries_of_the_wrong_head", 1, "(row % group_size) * n_queries + row / group_size",
                "(row / group_size) * n_queries + row % group_size"},
        Planted{"weights_not_awaited", 2, "barrier_of_group();\nfor (int i = slice",
                "for (int i = slice"},
        Planted{"sums_not_awaited", 2, "barrier_of_group();\nown = 0.0f;", "own = 0.0f;"},
        Planted{"a_part_forgotten", 2, "i < here &&", "i + 1 < here &&"},
        Planted{"keys_not_awaited", 1,
                "source.keys(first, n_tokens, tile, self, n_threads);\nbarrier_of_group();",
                "source.keys(first, n_tokens, tile, self, n_threads);", 0, true},
        Planted{"values_over_keys", 1, "barrier_of_group();\nsource.values(", "source.values(", 0,
                true},
        Planted{"values_not_awaited", 1,
                "source.values(first, n_tokens, tile, self, n_threads);\nbarrier_of_group();",
                "source.values(first, n_tokens, tile, self, n_threads);", 0, true},
        Planted{"keys_over_values", 1, "barrier_of_group();\nsource.keys(", "source.keys(", 0,
                true},
        Planted{"a_sum_of_eight_lanes", 1, "ushort width = 8; width > 0",
                "ushort width = 4; width > 0", 1, true}),
    [](const auto& info) { return std::string(info.param.what); });

}  // namespace
}  // namespace veloxquant::attention
