// Blocks to file order and back: the bytes are what a person would write down, and nothing is lost.
#include "veloxquant/interchange.h"

#include <gtest/gtest.h>

#include "tests/support/random.h"
#include "veloxquant/exact.h"

namespace veloxquant {
namespace {

using test::Random;
using test::random_codec;

std::vector<uint8_t> random_blocks(Random& random, const Codec& codec, int n_blocks) {
  std::vector<uint8_t> blocks;
  for (int b = 0; b < n_blocks; ++b) {
    std::vector<float> x = random.normal(kBlockTokens * codec.head_dim());
    std::vector<uint8_t> block(codec.block_bytes());
    codec.encode_block(Backend::reference, {}, x.data(), kBlockTokens, block.data());
    blocks.insert(blocks.end(), block.begin(), block.end());
  }
  return blocks;
}

void expect_round_trip(Random& random, const Codec& codec) {
  const std::vector<uint8_t> blocks = random_blocks(random, codec, 3);
  std::vector<uint8_t> rows(192 * codec.token_bytes()), back(blocks.size(), 0xff);
  to_interchange(codec, blocks.data(), 192, rows.data());
  from_interchange(codec, rows.data(), 192, back.data());
  EXPECT_EQ(back, blocks) << codec.name();

  // Cut short: the tokens that are there are the same, the others have code 0.
  back.assign(blocks.size(), 0xff);
  from_interchange(codec, rows.data(), 130, back.data());
  std::vector<uint8_t> again(rows.size());
  to_interchange(codec, back.data(), 192, again.data());
  std::fill(rows.begin() + 130 * codec.token_bytes(), rows.end(), 0);
  EXPECT_EQ(again, rows) << codec.name();
}

TEST(Interchange, RoundTrip) {
  Random random(3);
  const struct { int n_subvectors, centroids; } shapes[] = {{16, 256}, {8, 256}, {32, 16}, {8, 16}};
  for (auto [n_subvectors, centroids] : shapes) {
    expect_round_trip(random, *random_codec(random, Side::keys, 1, 64, n_subvectors, centroids,
                                            false, TransformKind::hadamard)
                                   .codec);
  }
  // 3 codes of 4 bits: a token ends in half a byte.
  expect_round_trip(
      random, *random_codec(random, Side::values, 1, 24, 3, 16, false, TransformKind::none).codec);
  expect_round_trip(random, *make_exact_codec(Side::keys, 1, 16, DType::bfloat16));
}

TEST(Interchange, FourBitCodesTakeTheLowHalfFirst) {
  Random random(5);
  const auto owned = random_codec(random, Side::keys, 1, 32, 4, 16, false, TransformKind::none);
  const Codec& codec = *owned.codec;
  // Sub-vectors are rows of the block; token 1 has its code in the low half of byte 1.
  std::vector<uint8_t> block(codec.block_bytes(), 0), rows(2 * kBlockTokens);
  for (int m = 0; m < 4; ++m) block[32 * m + 1] = static_cast<uint8_t>(m + 1);
  to_interchange(codec, block.data(), 64, rows.data());
  EXPECT_EQ(rows[2], 0x21);
  EXPECT_EQ(rows[3], 0x43);
}

}  // namespace
}  // namespace veloxquant
