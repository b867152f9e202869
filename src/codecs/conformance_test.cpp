// Every codec on every SIMD level of this machine, bit for bit against the reference: blocks,
// decoded values, token rows; on inputs at the decision boundaries, on garbage, on odd tails.
// Buffers have exactly the size that codec.h promises, so that AddressSanitizer sees one byte too
// far.
//
//   VELOXQUANT_CONFORMANCE=<n>   every n-th case only, for emulators: each head_dim, and each form
//                                of a codec at some of them (default 1, all)
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "tests/support/codec_cases.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace {

using test::CasePtr;
using test::CodecCase;
using test::ExactRandom;

constexpr int kHeadDims[] = {8, 16, 48, 64, 80, 96, 128, 256};

// Runs body(level) on the CPU kernels at every SIMD level.
template <class Body>
void on_every_level(const Body& body) {
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    SCOPED_TRACE(level);
    body();
  }
  set_simd_level("");
}

// A 16-bit NaN, which only garbage holds, may become any NaN: processors quieten some of them.
template <class T>
bool equal(T got, T wanted) {
  return std::memcmp(&got, &wanted, sizeof(T)) == 0 || (got != got && wanted != wanted);
}

template <class T>
::testing::AssertionResult same_bits(const std::vector<T>& got, const std::vector<T>& wanted) {
  if (got.size() != wanted.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    if (!equal(got[i], wanted[i])) {
      return ::testing::AssertionFailure()
             << "differs at " << i << ": got " << +got[i] << ", wanted " << +wanted[i];
    }
  }
  return ::testing::AssertionSuccess();
}

std::vector<uint8_t> encode(const Codec& codec, Backend backend, const BlockPlace& place,
                            const std::vector<float>& x, int n) {
  std::vector<uint8_t> block(codec.block_bytes(), 0xa5);
  codec.encode_block(backend, place, x.data(), n, block.data());
  return block;
}

std::vector<float> decode(const Codec& codec, Backend backend, const BlockPlace& place,
                          const std::vector<uint8_t>& block, int n) {
  std::vector<float> y(static_cast<size_t>(n) * codec.head_dim(), NAN);
  codec.decode_block(backend, place, block.data(), n, y.data(), codec.head_dim());
  return y;
}

std::vector<float> decode_transposed(const Codec& codec, Backend backend, const BlockPlace& place,
                                     const std::vector<uint8_t>& block, int n) {
  std::vector<float> y(static_cast<size_t>(kBlockTokens) * codec.head_dim(), NAN);
  codec.decode_block_transposed(backend, place, block.data(), n, y.data());
  return y;
}

std::vector<uint8_t> token_rows(const Codec& codec, const std::vector<uint8_t>& block, int n) {
  std::vector<uint8_t> rows(static_cast<size_t>(n) * codec.token_bytes(), 0xa5);
  codec.unpack_tokens(block.data(), n, rows.data());
  return rows;
}

// Decoding on every level gives the reference's bits, and the transposed form the same values.
void check_decode(const Codec& codec, const BlockPlace& place, const std::vector<uint8_t>& block,
                  int n) {
  const std::vector<float> y = decode(codec, Backend::reference, place, block, n);
  const std::vector<float> y_t = decode_transposed(codec, Backend::reference, place, block, n);
  std::vector<float> moved(y_t.size(), 0.0f);
  for (int t = 0; t < n; ++t) {
    for (int d = 0; d < codec.head_dim(); ++d) {
      moved[d * kBlockTokens + t] = y[t * codec.head_dim() + d];
    }
  }
  EXPECT_TRUE(same_bits(y_t, moved)) << "decode_block_transposed against decode_block";
  on_every_level([&] {
    EXPECT_TRUE(same_bits(decode(codec, Backend::cpu, place, block, n), y)) << "decode_block";
    EXPECT_TRUE(same_bits(decode_transposed(codec, Backend::cpu, place, block, n), y_t))
        << "decode_block_transposed";
  });
}

class Conformance : public ::testing::TestWithParam<std::string> {
 protected:
  void TearDown() override { set_simd_level(""); }

  template <class Body>
  void for_every_case(const Body& body) {
    const char* text = std::getenv("VELOXQUANT_CONFORMANCE");
    const int share = text == nullptr ? 1 : std::max(1, std::atoi(text));
    int n_cases = 0, first = 0;
    for (int head_dim : kHeadDims) {
      int index = first++;
      for (const CasePtr& one : test::codec_cases(GetParam(), head_dim)) {
        ++n_cases;
        if (index++ % share != 0) continue;
        SCOPED_TRACE(one->label() + ", head_dim " + std::to_string(head_dim));
        body(*one);
        if (HasFailure()) return;  // the first difference says enough
      }
    }
    EXPECT_GE(n_cases, 4) << "a codec without cases is a codec without this suite";
  }
};

TEST_P(Conformance, ThousandTokensEncodeAndDecodeLikeTheReference) {
  constexpr int kTokens = 1000;  // fifteen blocks and a tail of 40
  for_every_case([&](const CodecCase& one) {
    const Codec& codec = one.codec();
    ExactRandom random(static_cast<uint64_t>(codec.head_dim()));
    const int dim = codec.head_dim();
    for (int start = 0, index = 0; start < kTokens; start += kBlockTokens, ++index) {
      const int n = std::min(kBlockTokens, kTokens - start);
      const BlockPlace place{0, index % codec.n_kv_heads(), 4 + start};
      const std::vector<float> x = test::case_rows(random, n, dim);
      const std::vector<uint8_t> block = encode(codec, Backend::reference, place, x, n);
      on_every_level([&] {
        EXPECT_TRUE(same_bits(encode(codec, Backend::cpu, place, x, n), block)) << "encode_block";
      });
      if (index % 5 == 0 || n < kBlockTokens) check_decode(codec, place, block, n);
      if (HasFailure()) return;
    }
  });
}

TEST_P(Conformance, EveryTailLengthEncodesTheSameTokens) {
  for_every_case([&](const CodecCase& one) {
    const Codec& codec = one.codec();
    ExactRandom random(7);
    const std::vector<float> x = test::case_rows(random, kBlockTokens, codec.head_dim());
    const BlockPlace place{0, 1, 4 + 64};
    const auto whole =
        token_rows(codec, encode(codec, Backend::cpu, place, x, kBlockTokens), kBlockTokens);
    for (int n : {1, 2, 7, 8, 15, 16, 17, 31, 33, 63}) {
      const std::vector<float> part(x.begin(), x.begin() + n * codec.head_dim());
      const auto block = encode(codec, Backend::cpu, place, part, n);
      EXPECT_TRUE(same_bits(block, encode(codec, Backend::reference, place, part, n))) << n;
      check_decode(codec, place, block, n);
      if (!one.tokens_are_independent()) continue;
      const std::vector<uint8_t> rows(whole.begin(), whole.begin() + n * codec.token_bytes());
      EXPECT_TRUE(same_bits(token_rows(codec, block, n), rows)) << n << " tokens of 64";
    }
  });
}

TEST_P(Conformance, TokenRowsRoundTrip) {
  for_every_case([&](const CodecCase& one) {
    const Codec& codec = one.codec();
    ExactRandom random(9);
    const BlockPlace place{0, 0, 4};
    for (int n : {kBlockTokens, 21, 1}) {
      const std::vector<float> x = test::case_rows(random, n, codec.head_dim());
      const auto block = encode(codec, Backend::reference, place, x, n);
      const auto rows = token_rows(codec, block, n);
      std::vector<uint8_t> again(block.size(), 0x5a);
      codec.pack_tokens(rows.data(), n, again.data());
      EXPECT_TRUE(same_bits(token_rows(codec, again, n), rows)) << n;
      EXPECT_TRUE(same_bits(decode(codec, Backend::cpu, place, again, n),
                            decode(codec, Backend::cpu, place, block, n)))
          << n;
      if (n == kBlockTokens) {
        EXPECT_TRUE(same_bits(again, block));
      }
    }
  });
}

float stepped(float x, int ulps) {
  for (; ulps > 0; --ulps) x = std::nextafter(x, INFINITY);
  for (; ulps < 0; ++ulps) x = std::nextafter(x, -INFINITY);
  return x;
}

// 64 tokens, each with one element moved by bisection to the pair of neighbouring floats between
// which its codes change; then 2 steps to either side. Whatever a codec does to its input, this is
// where another order of operations or a fused one would decide differently.
TEST_P(Conformance, DecisionBoundariesAreThoseOfTheReference) {
  for_every_case([&](const CodecCase& one) {
    const Codec& codec = one.codec();
    ExactRandom random(static_cast<uint64_t>(11 + codec.head_dim()));
    const int dim = codec.head_dim(), n = kBlockTokens;
    const BlockPlace place{0, 1, 4 + 640};
    const int64_t bytes = codec.token_bytes();
    std::vector<float> x = random.values(int64_t{n} * dim);
    std::vector<int> element(n);
    std::vector<float> low(n), high(n);
    for (int t = 0; t < n; ++t) {
      element[t] = random.below(dim);
      low[t] = x[t * dim + element[t]];
      high[t] = low[t] + (low[t] < 0.0f ? 4.0f : -4.0f);
    }
    auto rows_at = [&](const std::vector<float>& values) {
      for (int t = 0; t < n; ++t) x[t * dim + element[t]] = values[t];
      return token_rows(codec, encode(codec, Backend::cpu, place, x, n), n);
    };
    const auto first = rows_at(low), last = rows_at(high);
    int n_boundaries = 0;
    for (int t = 0; t < n; ++t) {
      n_boundaries += std::memcmp(&first[t * bytes], &last[t * bytes], bytes) != 0;
    }
    EXPECT_GE(n_boundaries, n / 4);
    for (int step = 0; step < 40; ++step) {
      std::vector<float> middle(n);
      bool between = false;
      for (int t = 0; t < n; ++t) {
        middle[t] = low[t] + (high[t] - low[t]) * 0.5f;
        between = between || (middle[t] != low[t] && middle[t] != high[t]);
      }
      if (!between) break;
      const auto rows = rows_at(middle);
      for (int t = 0; t < n; ++t) {
        const bool same = std::memcmp(&rows[t * bytes], &first[t * bytes], bytes) == 0;
        (same ? low[t] : high[t]) = middle[t];
      }
    }
    for (int ulps = -2; ulps <= 2; ++ulps) {
      for (int t = 0; t < n; ++t) x[t * dim + element[t]] = stepped(low[t], ulps);
      const auto block = encode(codec, Backend::reference, place, x, n);
      on_every_level([&] {
        EXPECT_TRUE(same_bits(encode(codec, Backend::cpu, place, x, n), block)) << ulps << " ulp";
      });
    }
  });
}

TEST_P(Conformance, GarbageBlocksDecodeAlikeAndWithinBounds) {
  for_every_case([&](const CodecCase& one) {
    const Codec& codec = one.codec();
    ExactRandom random(13);
    std::vector<uint8_t> block(codec.block_bytes());
    for (int kind = 0; kind < 4; ++kind) {
      for (uint8_t& byte : block) {
        byte = kind == 0 ? 0xff : kind == 1 ? 0x00 : static_cast<uint8_t>(random.next());
      }
      for (int n : {kBlockTokens, 5}) check_decode(codec, BlockPlace{0, 1, 4}, block, n);
      std::vector<uint8_t> rows = token_rows(codec, block, kBlockTokens);
      for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random.next());
      codec.pack_tokens(rows.data(), kBlockTokens, block.data());
      check_decode(codec, BlockPlace{0, 0, 4}, block, kBlockTokens);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Codecs, Conformance, ::testing::ValuesIn(codec_methods()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace veloxquant
