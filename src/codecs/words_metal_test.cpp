// Words and Hamming scores on Metal, on the MSL machine against the CPU: equal bits.
#include <gtest/gtest.h>

#include <cstring>

#include "src/codecs/kernel_calls.h"
#include "tests/msl/machine.h"
#include "tests/support/random.h"
#include "veloxquant/rabitq.h"
#include "veloxquant/words.h"

namespace veloxquant::metal {
namespace {

using msl::Input;

TEST(MetalWords, PackAndUnpackEqualTheCpu) {
  test::Random random(5);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int n : {1, 37, 256}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, " << n << " codes");
      const int rows = 3, n_words = static_cast<int>(words_per_row(n, bits));
      std::vector<int32_t> codes(rows * n), back(rows * n);  // too wide and negative ones as well
      for (int32_t& code : codes) code = static_cast<int32_t>(random.next() >> 32);
      std::vector<uint32_t> words(rows * n_words);
      pack_words(Backend::reference, codes.data(), rows, n, bits, words.data());
      Call call = pack_words_call(rows, n, bits);
      EXPECT_EQ(msl::run(*call.kernel, call.launch, {Input(Type::int32, {rows, n}, codes.data())})
                    .output<uint32_t>(0),
                words);
      unpack_words(Backend::reference, words.data(), rows, n_words, n, bits, back.data());
      call = unpack_words_call(rows, n, bits);
      EXPECT_EQ(
          msl::run(*call.kernel, call.launch, {Input(Type::uint32, {rows, n_words}, words.data())})
              .output<int32_t>(0),
          back);
    }
  }
}

TEST(MetalHamming, ScoresEqualTheCpu) {
  test::Random random(6);
  for (int n_dims : {8, 61, 128}) {
    const int n = 300, bytes = (n_dims + 7) / 8;
    std::vector<uint8_t> query(bytes), codes(n * bytes);
    for (uint8_t& b : query) b = static_cast<uint8_t>(random.next() >> 40);
    for (uint8_t& b : codes) b = static_cast<uint8_t>(random.next() >> 40);
    const std::vector<float> offset = random.normal(n);
    const float scale = -0.37f;
    std::vector<float> scores(n);
    hamming_score(Backend::reference, query.data(), codes.data(), n, n_dims, offset.data(), scale,
                  scores.data());
    const Call call = hamming_score_call(n, n_dims);
    const auto got =
        msl::run(*call.kernel, call.launch,
                 {Input(Type::uint8, {bytes}, query.data()),
                  Input(Type::uint8, {n, bytes}, codes.data()),
                  Input(Type::float32, {n}, offset.data()), Input(Type::float32, {1}, &scale)})
            .output<float>(0);
    EXPECT_EQ(0, std::memcmp(got.data(), scores.data(), n * 4)) << n_dims;
  }
}

}  // namespace
}  // namespace veloxquant::metal
