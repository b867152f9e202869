// CommVQ: what the paper promises of the algebra, every SIMD level against the reference bit for
// bit, and the codec over them.
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstring>

#include "src/codecs/commvq/kernels.h"
#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/codec_spec.h"
#include "veloxquant/commvq.h"

namespace veloxquant {
namespace {

using test::Random;

RopeSpec spec_of(int head_dim, int rotary_dims, bool traditional) {
  RopeSpec spec;
  spec.head_dim = head_dim;
  spec.traditional = traditional;
  for (int j = 0; j < rotary_dims / 2; ++j) {
    spec.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * j / rotary_dims)));
  }
  return spec;
}

// A codec together with the arrays it views. Stages shrink, as trained ones do.
struct Owned {
  Rope rope;
  std::vector<uint16_t> book;
  std::vector<float> weight;
  CodecPtr codec;
  int stages, entries;
};

Owned random_commvq(Random& random, int heads, const RopeSpec& spec, int stages, int entries) {
  Owned owned{Rope(spec), {}, {}, nullptr, stages, entries};
  const int pairs = spec.head_dim / 2;
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < stages; ++r) {
      const double size = std::pow(0.8, r) * 0.7;
      for (int i = 0; i < entries * 2 * pairs; ++i) {
        owned.book.push_back(f32_to_f16(static_cast<float>(size * random.normal())));
      }
    }
    for (int j = 0; j < pairs; ++j) {
      owned.weight.push_back(static_cast<float>(std::pow(10.0, random.uniform() - 0.5)));
    }
  }
  owned.codec = make_commvq_codec(
      heads, owned.rope,
      TensorView(owned.book.data(), DType::float16, {heads, stages, entries, 2, pairs}),
      TensorView(owned.weight.data(), DType::float32, {heads, pairs}));
  return owned;
}

class Levels : public ::testing::TestWithParam<int> {
 protected:
  void TearDown() override { set_simd_level(""); }
};

TEST_P(Levels, CodesAndDecodedBitsEqualTheReference) {
  const int dims = GetParam(), heads = 2;
  Random random(dims);
  for (int variant = 0; variant < 4; ++variant) {
    const int rotary = variant == 1 ? dims / 2 : dims, entries = variant == 2 ? 11 : 64;
    const Owned owned =
        random_commvq(random, heads, spec_of(dims, rotary, variant == 3), 3, entries);
    const Codec& codec = *owned.codec;
    for (int n_tokens : {1, 31, 64}) {
      const BlockPlace place{0, n_tokens % heads, variant == 0 ? 1000000 : 4 + 64 * variant};
      std::vector<float> x = random.normal(n_tokens * dims);
      if (n_tokens > 2) {
        std::fill_n(x.begin(), dims, 0.0f);                     // nothing to encode
        for (int d = 0; d < dims; ++d) x[dims + d] = 65504.0f;  // saturates nothing
        for (int d = 0; d < dims; ++d)
          x[2 * dims + d] = 1e-7f * (d % 3);  // rms rounds to 0 or near
      }
      std::vector<uint8_t> expected(codec.block_bytes(), 0xaa);
      codec.encode_block(Backend::reference, place, x.data(), n_tokens, expected.data());
      std::vector<float> y(64 * dims), y_t(64 * dims);
      codec.decode_block(Backend::reference, place, expected.data(), n_tokens, y.data(), dims);
      codec.decode_block_transposed(Backend::reference, place, expected.data(), n_tokens,
                                    y_t.data());
      for (float v : y_t) ASSERT_TRUE(std::isfinite(v));
      for (const std::string& level : simd_levels()) {
        set_simd_level(level);
        std::vector<uint8_t> block(codec.block_bytes(), 0x55);
        codec.encode_block(Backend::cpu, place, x.data(), n_tokens, block.data());
        EXPECT_EQ(block, expected) << level << " variant " << variant;
        std::vector<float> z(64 * dims), z_t(64 * dims, NAN);
        codec.decode_block(Backend::cpu, place, expected.data(), n_tokens, z.data(), dims);
        codec.decode_block_transposed(Backend::cpu, place, expected.data(), n_tokens, z_t.data());
        EXPECT_EQ(0, std::memcmp(z.data(), y.data(), 4 * n_tokens * dims)) << level;
        EXPECT_EQ(0, std::memcmp(z_t.data(), y_t.data(), 4 * y_t.size())) << level;
      }
    }
  }
}

// Tokens half way between two centres, off by up to 2 ulp: a reordered or fused sum would choose
// differently.
TEST_P(Levels, TokensOnBoundariesChooseLikeTheReference) {
  const int dims = GetParam(), pairs = dims / 2, n = 64;
  Random random(100 + dims);
  std::vector<float> entries = random.normal(n * dims);
  for (float& v : entries) v = f16_to_f32(f32_to_f16(v));
  std::vector<float> norms(64), cross(64 * 64);
  commvq::reference_kernels().products(entries.data(), pairs, n, norms.data(), cross.data());
  const commvq::StageTables stage{pairs, n, entries.data(), norms.data(), cross.data()};
  std::vector<float> z(64 * dims);
  for (int t = 0; t < 64; ++t) {
    const auto centre = [&](uint64_t a, uint64_t b, int j, bool second) {
      const float* u = &entries[a * dims];
      const float* w = &entries[b * dims];
      return second ? u[pairs + j] + w[j] : u[j] - w[pairs + j];
    };
    const uint64_t a = random.next() % n, b = random.next() % n, c = random.next() % n;
    for (int i = 0; i < dims; ++i) {
      const float from = centre(a, b, i % pairs, i >= pairs);
      const float to = centre(a, c, i % pairs, i >= pairs);
      float middle = from + (to - from) / 2;
      for (int steps = static_cast<int>(random.next() % 5) - 2; steps != 0;
           steps -= steps / std::abs(steps)) {
        middle = std::nextafter(middle, steps > 0 ? 1e9f : -1e9f);
      }
      z[i * 64 + t] = middle;
    }
  }
  uint16_t expected[64];
  auto detail = std::make_unique<commvq::Scores>(), got = std::make_unique<commvq::Scores>();
  commvq::reference_kernels().nearest_tile(stage, z.data(), expected, detail.get());
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    uint16_t codes[64];
    commvq::cpu_kernels().nearest_tile(stage, z.data(), codes, got.get());
    EXPECT_EQ(0, std::memcmp(codes, expected, sizeof(codes))) << level;
    EXPECT_EQ(0, std::memcmp(got.get(), detail.get(), sizeof(commvq::Scores))) << level;
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, Levels, ::testing::Values(8, 16, 48, 64, 80, 96, 128, 256));

// T7: [[x, y], [-y, x]] commutes with every rotation.
TEST(Algebra, CodebookBlocksCommuteWithRotations) {
  Random random(1);
  for (int i = 0; i < 1000; ++i) {
    const float x = random.normal(), y = random.normal();
    const float angle = static_cast<float>(6.3 * random.uniform());
    const float c = std::cos(angle), s = std::sin(angle);
    const float rotation[2][2] = {{c, -s}, {s, c}}, block[2][2] = {{x, y}, {-y, x}};
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < 2; ++k) {
        const float rc = rotation[r][0] * block[0][k] + rotation[r][1] * block[1][k];
        const float cr = block[r][0] * rotation[0][k] + block[r][1] * rotation[1][k];
        EXPECT_NEAR(rc, cr, 1e-6 * std::hypot(x, y));
      }
    }
  }
}

// The factored search finds what a search over all centres finds.
TEST(Encode, FactoredSearchIsExhaustive) {
  Random random(2);
  for (int dims : {16, 64}) {
    const int pairs = dims / 2;
    const Owned owned = random_commvq(random, 1, spec_of(dims, dims, false), 1, 64);
    std::vector<float> x = random.normal(64 * dims);
    std::vector<float> z(64 * dims);
    for (int t = 0; t < 64; ++t) {
      for (int i = 0; i < dims; ++i) z[i * 64 + t] = x[t * dims + i];
    }
    std::vector<uint8_t> block(owned.codec->block_bytes());
    const commvq::HeadTables head{pairs, 1, 64, owned.book.data()};
    commvq::cpu_kernels().encode_tile(head, z.data(), block.data());
    uint16_t codes[64];
    commvq::unpack_row(block.data(), codes);
    for (int t = 0; t < 64; ++t) {
      double square = 0;
      for (int i = 0; i < dims; ++i) square += double(x[t * dims + i]) * x[t * dims + i];
      const double rms = std::sqrt(square / dims);
      const auto distance = [&](int a, int b) {
        double sum = 0;
        for (int j = 0; j < pairs; ++j) {
          const auto entry = [&](int l, int i) {
            return double(f16_to_f32(owned.book[l * dims + i]));
          };
          const double first = x[t * dims + j] / rms - (entry(a, j) - entry(b, pairs + j));
          const double second = x[t * dims + pairs + j] / rms - (entry(a, pairs + j) + entry(b, j));
          sum += first * first + second * second;
        }
        return sum;
      };
      double best = INFINITY;
      for (int c = 0; c < 4096; ++c) best = std::min(best, distance(c >> 6, c & 63));
      // The rms that the codec divides by is rounded to fp16.
      EXPECT_NEAR(distance(codes[t] >> 6, codes[t] & 63), best, 2e-3 * best);
    }
  }
}

// T7: scores from look-up tables of the untouched query, as the paper decodes, against decoding,
// RoPE and a dot product.
TEST(Decode, LookUpTablesGiveTheSameScores) {
  Random random(3);
  for (bool traditional : {false, true}) {
    const int dims = 64, pairs = 32;
    const RopeSpec spec = spec_of(dims, dims, traditional);
    const Owned owned = random_commvq(random, 1, spec, 4, 64);
    const int64_t position = 1700;
    const std::vector<float> x = random.normal(64 * dims), q = random.normal(dims);
    std::vector<uint8_t> block(owned.codec->block_bytes());
    const BlockPlace place{0, 0, position};
    owned.codec->encode_block(Backend::cpu, place, x.data(), 64, block.data());
    std::vector<float> y(64 * dims);
    owned.codec->decode_block(Backend::cpu, place, block.data(), 64, y.data(), dims);
    // Per stage, entry and pair: <q, z> and <q, i z> parts of the rotated entry.
    using Complex = std::complex<double>;
    for (int t = 0; t < 64; ++t) {
      uint16_t rms;
      std::memcpy(&rms, block.data() + 4 * commvq::kRowBytes + 2 * t, 2);
      double looked_up = 0, size = 0;
      for (int j = 0; j < pairs; ++j) {
        const RopePair pair = owned.rope.pairs()[j];
        // conj(q) turned back instead of the key turned: R commutes with the centres.
        const double angle = double(float(position + t) * spec.inv_freq[j]);
        const Complex query(q[pair.first], q[pair.second]);
        Complex sum = 0;
        for (int r = 0; r < 4; ++r) {
          uint16_t codes[64];
          commvq::unpack_row(block.data() + r * commvq::kRowBytes, codes);
          const auto table = [&](int l) {  // QC[r][l][j]
            const uint16_t* entry = &owned.book[(r * 64 + l) * dims];
            return std::conj(query) * Complex(f16_to_f32(entry[j]), f16_to_f32(entry[pairs + j]));
          };
          sum += table(codes[t] >> 6) + Complex(0, 1) * table(codes[t] & 63);
        }
        const double part =
            (sum * std::polar(1.0, angle)).real() * f16_to_f32(rms) / owned.weight[j];
        looked_up += part;
        size += std::abs(part);
      }
      double dot = 0;
      for (int d = 0; d < dims; ++d) dot += double(q[d]) * y[t * dims + d];
      EXPECT_NEAR(looked_up, dot, 1e-3 * std::max(std::abs(dot), 1e-2 * size));
    }
  }
}

TEST(Decode, ScalesWithTheToken) {
  Random random(4);
  const int dims = 64;
  const Owned owned = random_commvq(random, 1, spec_of(dims, dims, false), 4, 64);
  std::vector<float> x = random.normal(64 * dims), big = x;
  for (float& v : big) v *= 256.0f;  // exact: the codes must not move
  std::vector<uint8_t> block(owned.codec->block_bytes()), block_of_big(block.size());
  owned.codec->encode_block(Backend::cpu, {}, x.data(), 64, block.data());
  owned.codec->encode_block(Backend::cpu, {}, big.data(), 64, block_of_big.data());
  EXPECT_EQ(0, std::memcmp(block.data(), block_of_big.data(), 4 * commvq::kRowBytes));
}

// Random bytes are a block of some keys: never a read beyond the tables, never NaN but from the
// scalar.
TEST(Decode, AnyBytesAreSafe) {
  Random random(5);
  const Owned owned = random_commvq(random, 2, spec_of(48, 32, true), 5, 11);
  std::vector<uint8_t> block(owned.codec->block_bytes());
  std::vector<float> expected(64 * 48), y(64 * 48);
  for (int i = 0; i < 300; ++i) {
    for (uint8_t& byte : block) byte = static_cast<uint8_t>(random.next());
    const BlockPlace place{0, i % 2, static_cast<int64_t>(random.next() % 1000000)};
    const int n = 1 + static_cast<int>(random.next() % 64);
    owned.codec->decode_block_transposed(Backend::reference, place, block.data(), n,
                                         expected.data());
    owned.codec->decode_block_transposed(Backend::cpu, place, block.data(), n, y.data());
    for (size_t k = 0; k < y.size(); ++k) {
      ASSERT_TRUE(y[k] == expected[k] || (std::isnan(y[k]) && std::isnan(expected[k])));
    }
  }
}

TEST(Files, TokensRoundTrip) {
  Random random(6);
  for (int stages : {1, 4, 9}) {
    const Owned owned = random_commvq(random, 1, spec_of(64, 64, false), stages, 64);
    EXPECT_EQ(owned.codec->token_bytes(), (stages * 12 + 7) / 8 + 2);
    std::vector<uint8_t> block(owned.codec->block_bytes()), again(block.size(), 0xee);
    for (uint8_t& byte : block) byte = static_cast<uint8_t>(random.next());
    std::vector<uint8_t> rows(64 * owned.codec->token_bytes());
    owned.codec->unpack_tokens(block.data(), 64, rows.data());
    owned.codec->pack_tokens(rows.data(), 64, again.data());
    EXPECT_EQ(block, again);
  }
}

TEST(Bits, CountTheScalar) {
  EXPECT_EQ(commvq_stages(64, 1.0), 4);    // 48 + 16 bits
  EXPECT_EQ(commvq_stages(64, 2.0), 9);    // 108 + 16
  EXPECT_EQ(commvq_stages(128, 2.0), 20);  // 240 + 16
  EXPECT_EQ(commvq_stages(8, 0.5), 1);
  EXPECT_THROW(commvq_stages(64, 0.0), Error);
  Random random(7);
  const Owned owned = random_commvq(random, 1, spec_of(64, 64, false), 4, 64);
  EXPECT_DOUBLE_EQ(owned.codec->bits_per_element(), 1.0);
}

TEST(Spec, MakesTheSameCodecAndRefusesWhatDoesNotFit) {
  Random random(8);
  const RopeSpec rope = spec_of(64, 32, true);
  const Owned owned = random_commvq(random, 2, rope, 3, 64);
  CodecSpec spec{"commvq", Side::keys, 2, 64, {{"traditional", int64_t{1}}}};
  CodecTables tables{{"codebook", TensorView(owned.book.data(), DType::float16, {2, 3, 64, 2, 32})},
                     {"weight", TensorView(owned.weight.data(), DType::float32, {2, 32})},
                     {"inv_freq", TensorView(rope.inv_freq.data(), DType::float32, {16})}};
  const CodecPtr made = make_codec(spec, tables);
  const std::vector<float> x = random.normal(64 * 64);
  std::vector<uint8_t> a(made->block_bytes()), b(a.size());
  made->encode_block(Backend::cpu, {0, 1, 77}, x.data(), 64, a.data());
  owned.codec->encode_block(Backend::cpu, {0, 1, 77}, x.data(), 64, b.data());
  EXPECT_EQ(a, b);

  const auto refuses = [&](auto change) {
    CodecSpec other = spec;
    CodecTables others = tables;
    change(other, others);
    EXPECT_THROW(make_codec(other, others), Error);
  };
  refuses([](CodecSpec& s, CodecTables&) { s.side = Side::values; });
  refuses([](CodecSpec& s, CodecTables&) { s.n_kv_heads = 3; });
  refuses([](CodecSpec& s, CodecTables&) { s.head_dim = 128; });
  refuses([](CodecSpec& s, CodecTables&) { s.options["bits"] = int64_t{2}; });
  refuses([](CodecSpec& s, CodecTables&) { s.options["attention_factor"] = 0.0; });
  refuses([](CodecSpec&, CodecTables& t) { t.erase("inv_freq"); });
  refuses([](CodecSpec&, CodecTables& t) { t.erase("codebook"); });
  std::vector<float> negative(64, -1.0f);
  refuses([&](CodecSpec&, CodecTables& t) {
    t["weight"] = TensorView(negative.data(), DType::float32, {2, 32});
  });
  std::vector<uint16_t> infinite = owned.book;
  infinite[5] = 0x7c00;
  refuses([&](CodecSpec&, CodecTables& t) {
    t["codebook"] = TensorView(infinite.data(), DType::float16, {2, 3, 64, 2, 32});
  });
  refuses([&](CodecSpec&, CodecTables& t) {
    t["codebook"] = TensorView(owned.book.data(), DType::float16, {2, 3, 65, 2, 32});
  });
}

}  // namespace
}  // namespace veloxquant
