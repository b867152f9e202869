// The conformance suite's cases on `metal-emulated` (tests/msl/emulated_codec.h), bit for bit
// against the reference: head_dims 8 to 256, cut blocks, garbage, inputs at decision boundaries,
// random shapes. One or two cases of a head_dim, other ones at each.
#include <cmath>
#include <random>

#include "tests/msl/emulated_codec.h"

namespace veloxquant {
namespace {

using msl::EmulatedCodec;
using test::CasePtr;
using test::ExactRandom;

const BlockPlace kPlace{0, 1, 4};
constexpr int kHeadDims[] = {8, 16, 48, 64, 80, 96, 128, 256};

std::vector<uint8_t> encoded(const Codec& codec, const BlockPlace& place,
                             const std::vector<float>& x, int n) {
  std::vector<uint8_t> block(codec.block_bytes(), 0xa5);
  codec.encode_block(Backend::reference, place, x.data(), n, block.data());
  return block;
}

// Decoded bits; a NaN, which only garbage holds, may become any NaN.
void expect_decoded(const EmulatedCodec& metal, const Codec& codec, const BlockPlace& place,
                    const std::vector<uint8_t>& block, int n) {
  std::vector<float> want(static_cast<size_t>(n) * codec.head_dim());
  codec.decode_block(Backend::reference, place, block.data(), n, want.data(), codec.head_dim());
  const std::vector<float> got = metal.decode(block, n);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const bool same = std::memcmp(&got[i], &want[i], 4) == 0;
    ASSERT_TRUE(same || (std::isnan(got[i]) && std::isnan(want[i])))
        << "decoded " << i << ": got " << got[i] << ", wanted " << want[i];
  }
}

class MetalConformance : public ::testing::TestWithParam<std::string> {
 protected:
  template <class Body>
  void for_every_case(const Body& body) {
    int first = 0, n_cases = 0;
    for (int head_dim : kHeadDims) {
      int index = first++;
      const test::Cases cases = test::codec_cases(GetParam(), head_dim);
      const int step = cases.size() > 10 ? 9 : cases.size() > 3 ? 5 : 2;
      for (const CasePtr& one : cases) {
        if (index++ % step != 0) continue;
        SCOPED_TRACE(one->label() + ", head_dim " + std::to_string(head_dim));
        ++n_cases;
        body(one->codec(), EmulatedCodec(*one, kPlace.kv_head, kPlace.position));
        if (HasFailure()) return;
      }
    }
    EXPECT_GE(n_cases, 4);
  }
};

TEST_P(MetalConformance, BlocksAndTailsEncodeAndDecodeLikeTheReference) {
  for_every_case([&](const Codec& codec, const EmulatedCodec& metal) {
    ExactRandom random(static_cast<uint64_t>(codec.head_dim()));
    for (int n : {kBlockTokens, 33, 1}) {
      const std::vector<float> x = test::case_rows(random, n, codec.head_dim());
      const std::vector<uint8_t> block = encoded(codec, kPlace, x, n);
      EXPECT_TRUE(msl::same_bytes(metal.encode(x, n), block)) << n << " tokens";
      expect_decoded(metal, codec, kPlace, block, n);
    }
    std::vector<uint8_t> garbage(codec.block_bytes());
    for (uint8_t& byte : garbage) byte = static_cast<uint8_t>(random.next());
    expect_decoded(metal, codec, kPlace, garbage, kBlockTokens);
  });
}

// 64 tokens, each with one element moved by bisection to where its block's bytes change.
TEST_P(MetalConformance, DecisionBoundariesAreThoseOfTheReference) {
  for_every_case([&](const Codec& codec, const EmulatedCodec& metal) {
    ExactRandom random(static_cast<uint64_t>(11 + codec.head_dim()));
    const int dim = codec.head_dim(), n = kBlockTokens;
    const int64_t bytes = codec.token_bytes();
    std::vector<float> x = random.values(int64_t{n} * dim), low(n), high(n);
    std::vector<int> element(n);
    for (int t = 0; t < n; ++t) {
      element[t] = t * dim + random.below(dim);
      low[t] = x[element[t]];
      high[t] = low[t] + (low[t] < 0.0f ? 4.0f : -4.0f);
    }
    const auto rows_at = [&](const std::vector<float>& values) {
      for (int t = 0; t < n; ++t) x[element[t]] = values[t];
      std::vector<uint8_t> rows(n * bytes);
      codec.unpack_tokens(encoded(codec, kPlace, x, n).data(), n, rows.data());
      return rows;
    };
    const auto first = rows_at(low);
    for (int step = 0; step < 40; ++step) {
      std::vector<float> middle(n);
      for (int t = 0; t < n; ++t) middle[t] = low[t] + (high[t] - low[t]) * 0.5f;
      const auto rows = rows_at(middle);
      for (int t = 0; t < n; ++t) {
        const bool same = std::memcmp(&rows[t * bytes], &first[t * bytes], bytes) == 0;
        (same ? low[t] : high[t]) = middle[t];
      }
    }
    for (const std::vector<float>* values : {&low, &high}) {
      for (int t = 0; t < n; ++t) x[element[t]] = (*values)[t];
      EXPECT_TRUE(msl::same_bytes(metal.encode(x, n), encoded(codec, kPlace, x, n)));
    }
  });
}

TEST_P(MetalConformance, RandomShapes) {
  const char* text = std::getenv("VELOXQUANT_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device()();
  SCOPED_TRACE("VELOXQUANT_SEED=" + std::to_string(seed));
  std::printf("VELOXQUANT_SEED=%llu\n", static_cast<unsigned long long>(seed));
  ExactRandom random(seed);
  for (int i = 0; i < 5; ++i) {
    const int head_dim = 8 * (1 + random.below(32)), n = 1 + random.below(kBlockTokens);
    const test::Cases cases = test::codec_cases(GetParam(), head_dim);
    const CasePtr& one = cases[random.below(static_cast<int>(cases.size()))];
    const int head = random.below(test::kCaseHeads);
    SCOPED_TRACE(one->label() + ", head_dim " + std::to_string(head_dim));
    const EmulatedCodec metal(*one, head);
    const std::vector<float> x = test::case_rows(random, n, head_dim);
    const std::vector<uint8_t> block = encoded(one->codec(), {0, head, 0}, x, n);
    EXPECT_TRUE(msl::same_bytes(metal.encode(x, n), block)) << n << " tokens";
    expect_decoded(metal, one->codec(), {0, head, 0}, block, n);
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, MetalConformance,
                         ::testing::Values("commvq", "exact", "qjl", "rabitq", "turboquant",
                                           "turboquant_rvq", "vecinfer", "vecinfer_rope"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace veloxquant
