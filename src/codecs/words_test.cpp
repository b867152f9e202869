#include "veloxquant/words.h"

#include <gtest/gtest.h>

#include "tests/support/random.h"

namespace veloxquant {
namespace {

std::vector<uint32_t> packed(const std::vector<int32_t>& codes, int bits) {
  std::vector<uint32_t> words(words_per_row(codes.size(), bits));
  pack_words(Backend::cpu, codes.data(), 1, codes.size(), bits, words.data());
  return words;
}

// UPSTREAM 11.2
TEST(Words, GoldenWords) {
  EXPECT_EQ(packed({0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}, 2),
            std::vector<uint32_t>{0xE4E4E4E4});
  EXPECT_EQ(packed({0, 1, 2, 3, 4, 5, 6, 7}, 4), std::vector<uint32_t>{0x76543210});
  EXPECT_EQ(packed({0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3}, 3),
            (std::vector<uint32_t>{0x08FAC688, 0x0000001A}));
  EXPECT_EQ(packed({0, 1, 0, 1, 1, 0, 0, 1}, 1), std::vector<uint32_t>{0x9A});
  EXPECT_EQ(packed({-1, 256 + 3, 5}, 2), std::vector<uint32_t>{0b011111});  // masked
}

TEST(Words, EveryLevelEqualsTheReferenceAndRoundTrips) {
  test::Random random(1);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t n : {0, 1, 7, 8, 31, 32, 33, 64, 87, 128, 129, 320, 1000, 70001}) {
      const int64_t rows = n > 1000 ? 2 : 5, row_words = words_per_row(n, bits);
      std::vector<int32_t> codes(rows * n);
      std::vector<uint8_t> bytes(rows * n);
      for (int64_t i = 0; i < rows * n; ++i) {
        codes[i] = static_cast<int32_t>(random.next());
        bytes[i] = static_cast<uint8_t>(codes[i]);
      }
      std::vector<uint32_t> expected(rows * row_words), words(expected), again(expected);
      pack_words(Backend::reference, codes.data(), rows, n, bits, expected.data());
      std::vector<int32_t> plain(rows * n), back(rows * n);
      std::vector<uint8_t> back_bytes(rows * n);
      unpack_words(Backend::reference, expected.data(), rows, row_words, n, bits, plain.data());
      for (int64_t i = 0; i < rows * n; ++i) ASSERT_EQ(plain[i], codes[i] & ((1 << bits) - 1));
      for (const std::string& level : simd_levels()) {
        set_simd_level(level);
        pack_words(Backend::cpu, codes.data(), rows, n, bits, words.data());
        pack_words(Backend::cpu, bytes.data(), rows, n, bits, again.data());
        EXPECT_EQ(words, expected) << level << " " << bits << " " << n;
        EXPECT_EQ(again, expected) << level << " " << bits << " " << n;
        unpack_words(Backend::cpu, words.data(), rows, row_words, n, bits, back.data());
        unpack_words(Backend::cpu, words.data(), rows, row_words, n, bits, back_bytes.data());
        EXPECT_EQ(back, plain) << level << " " << bits << " " << n;
        EXPECT_TRUE(std::equal(back_bytes.begin(), back_bytes.end(), plain.begin())) << level;
      }
      set_simd_level("");
    }
  }
}

TEST(Words, RefusesWhatDoesNotFit) {
  std::vector<int32_t> codes(40);
  std::vector<uint32_t> words(40);
  EXPECT_THROW(pack_words(Backend::cpu, codes.data(), 1, 8, 0, words.data()), Error);
  EXPECT_THROW(pack_words(Backend::cpu, codes.data(), 1, 8, 9, words.data()), Error);
  EXPECT_THROW(unpack_words(Backend::cpu, words.data(), 1, 1, 33, 1, codes.data()), Error);
}

}  // namespace
}  // namespace veloxquant
