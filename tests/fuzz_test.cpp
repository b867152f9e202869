// Random calls of the core functions of vecinfer, rabitq, qjl and commvq, and of every codec: an
// Error or the reference's bits, and nothing out of bounds (run it under the asan preset). How many
// calls, and how to repeat one: tests/support/fuzz.h. The scalar functions: fuzz_scalar_test.cpp.
#include <gtest/gtest.h>

#include "tests/support/codec_cases.h"
#include "tests/support/fuzz.h"
#include "veloxquant/backend.h"
#include "veloxquant/commvq.h"
#include "veloxquant/qjl.h"
#include "veloxquant/rabitq.h"
#include "veloxquant/vecinfer.h"
#include "veloxquant/vecinfer_functions.h"

namespace veloxquant::test {
namespace {

TEST(Fuzz, NearestCentroids) {
  fuzz("nearest_centroids", [](ExactRandom& random) {
    const int d = one_of(random, {0, 1, 2, 3, 4, 5, 8, 16, 20, 64, 65});
    const int n = random.below(70), n_centroids = 1 + random.below(one_of(random, {2, 40, 300}));
    const int64_t stride = n + random.below(3);
    const bool wild = random.below(3) == 0;
    auto some = [&](int64_t size) { return wild ? any_floats(random, size) : random.values(size); };
    const auto x = some(stride * d), table = some(int64_t{n_centroids} * d);
    std::vector<uint16_t> codes(n), wanted(n);
    std::vector<float> distance(n), wanted_distance(n);
    nearest_centroids(Backend::reference, x.data(), stride, n, table.data(), n_centroids, d,
                      wanted.data(), wanted_distance.data());
    nearest_centroids(Backend::cpu, x.data(), stride, n, table.data(), n_centroids, d, codes.data(),
                      distance.data());
    EXPECT_TRUE(same(codes, wanted));
    EXPECT_TRUE(same(distance, wanted_distance));
  });
}

// Sizes of one call of the row functions, wrong in one place or another now and then.
struct RowCall {
  int64_t B, H, S, M, C, d, heads, groups;
  explicit RowCall(ExactRandom& random)
      : B(random.below(3)),
        H(1 + random.below(3)),
        S(random.below(80)),
        M(1 + random.below(5)),
        C(1 + random.below(one_of(random, {4, 64, 300}))),
        d(one_of(random, {1, 2, 3, 4, 8, 16})),
        heads(random.below(2) ? H : 1),
        groups(random.below(2) ? M : 1) {
    if (random.below(16) == 0) heads = 4;
    if (random.below(16) == 0) groups = 7;
    if (random.below(32) == 0) d = 0;
  }
  TensorView codebook(const std::vector<float>& data) const {
    return TensorView(data.data(), DType::float32, {heads, groups, C, d});
  }
  int64_t table_size() const { return heads * groups * C * d; }
  int64_t rows() const { return B * H * S; }
};

TEST(Fuzz, VecinferQuantizeAndDequantize) {
  fuzz("vecinfer_quantize, vecinfer_dequantize", [](ExactRandom& random) {
    const RowCall call(random);
    const DType dtype = random.below(2) ? DType::float32 : DType::float16;
    const auto table = any_floats(random, call.table_size());
    const int64_t dim = call.M * call.d;
    const auto floats = any_floats(random, call.rows() * dim);
    const auto halves = any_bytes<uint16_t>(random, call.rows() * dim);
    const TensorView x(dtype == DType::float32 ? static_cast<const void*>(floats.data())
                                               : static_cast<const void*>(halves.data()),
                       dtype, {call.B, call.H, call.S, dim});
    std::vector<int32_t> codes(call.rows() * call.M), wanted(codes.size());
    auto view = [&](std::vector<int32_t>& c) {
      return MutableTensorView(c.data(), DType::int32, {call.B, call.H, call.S, call.M});
    };
    vecinfer_quantize(Backend::cpu, x, call.codebook(table), view(codes));
    vecinfer_quantize(Backend::reference, x, call.codebook(table), view(wanted));
    EXPECT_TRUE(same(codes, wanted));
    for (int32_t& code : codes) {
      EXPECT_TRUE(code >= 0 && code < call.C);
      if (random.below(4) == 0) code = static_cast<int32_t>(random.next());
    }
    std::vector<float> decoded(call.rows() * dim);
    vecinfer_dequantize(
        read_only(view(codes)), call.codebook(table),
        MutableTensorView(decoded.data(), DType::float32, {call.B, call.H, call.S, dim}));
    for (int64_t i = 0; i < static_cast<int64_t>(decoded.size()); ++i) {
      const int64_t row = i / dim, m = i % dim / call.d;
      const int64_t head = call.heads == 1 ? 0 : row / call.S % call.H;
      const int64_t group = call.groups == 1 ? 0 : m;
      const int64_t code = std::min<uint32_t>(static_cast<uint32_t>(codes[row * call.M + m]),
                                              static_cast<uint32_t>(call.C - 1));
      const float entry =
          table[((head * call.groups + group) * call.C + code) * call.d + i % call.d];
      EXPECT_TRUE(same(std::vector<float>{decoded[i]}, std::vector<float>{entry}));
    }
  });
}

TEST(Fuzz, VecinferEncodeDecode) {
  fuzz("vecinfer_encode_decode", [](ExactRandom& random) {
    const RowCall call(random);
    const int64_t dim = call.M * call.d;
    const auto table = random.values(call.table_size()), x = any_floats(random, call.rows() * dim);
    const auto matrix = random.values(dim * dim), lambda = any_floats(random, call.H * dim);
    const bool has_matrix = random.below(2) != 0;
    const int lambdas = random.below(3);  // none, one, one a head
    std::vector<int32_t> codes[2];
    std::vector<uint16_t> decoded[2];
    for (int b = 0; b < 2; ++b) {
      codes[b].resize(call.rows() * call.M);
      decoded[b].resize(call.rows() * dim);
      vecinfer_encode_decode(
          b == 0 ? Backend::cpu : Backend::reference,
          TensorView(x.data(), DType::float32, {call.B, call.H, call.S, dim}), call.codebook(table),
          has_matrix ? TensorView(matrix.data(), DType::float32, {dim, dim}) : TensorView(),
          lambdas == 0
              ? TensorView()
              : TensorView(lambda.data(), DType::float32, {lambdas == 1 ? 1 : call.H, dim}),
          MutableTensorView(decoded[b].data(), DType::float16, {call.B, call.H, call.S, dim}),
          MutableTensorView(codes[b].data(), DType::int32, {call.B, call.H, call.S, call.M}));
    }
    EXPECT_TRUE(same(codes[0], codes[1]));
    EXPECT_TRUE(same(decoded[0], decoded[1]));
  });
}

TEST(Fuzz, VecinferQueryLut) {
  fuzz("vecinfer_query_lut", [](ExactRandom& random) {
    const RowCall call(random);
    const int64_t dim = call.M * call.d;
    const auto table = any_floats(random, call.table_size());
    const auto q = any_floats(random, call.rows() * dim);
    std::vector<float> lut[2];
    for (int b = 0; b < 2; ++b) {
      lut[b].resize(call.rows() * call.M * call.C);
      vecinfer_query_lut(b == 0 ? Backend::cpu : Backend::reference,
                         TensorView(q.data(), DType::float32, {call.B, call.H, call.S, dim}),
                         call.codebook(table),
                         MutableTensorView(lut[b].data(), DType::float32,
                                           {call.B, call.H, call.S, call.M, call.C}));
    }
    EXPECT_TRUE(same(lut[0], lut[1]));
  });
}

TEST(Fuzz, HammingAndPopcountScores) {
  fuzz("hamming_score, popcount_score", [](ExactRandom& random) {
    const int dims = random.below(12) ? 1 + random.below(300) : random.below(2) * 40000;
    const int64_t n = random.below(70), row = (dims + 7) / 8;
    const auto query = any_bytes<uint8_t>(random, row), codes = any_bytes<uint8_t>(random, n * row);
    const auto offset = any_floats(random, n);
    const float scale = any_float(random);
    std::vector<float> scores(n), wanted(n);
    hamming_score(Backend::cpu, query.data(), codes.data(), n, dims, offset.data(), scale,
                  scores.data());
    hamming_score(Backend::reference, query.data(), codes.data(), n, dims, offset.data(), scale,
                  wanted.data());
    EXPECT_TRUE(same(scores, wanted));
    const auto q = random.values(dims);
    const PopcountQuery packed = quantize_popcount_query(q.data(), dims, random.below(10));
    popcount_score(Backend::cpu, packed, codes.data(), n, offset.data(), scores.data());
    popcount_score(Backend::reference, packed, codes.data(), n, offset.data(), wanted.data());
    EXPECT_TRUE(same(scores, wanted));
  });
}

TEST(Fuzz, QjlEncode) {
  fuzz("qjl_encode", [](ExactRandom& random) {
    const int dim = 1 + random.below(40), m = 8 * (1 + random.below(6)), n = random.below(40);
    const auto x = any_floats(random, int64_t{n} * dim), sketch = random.values(int64_t{m} * dim);
    std::vector<uint8_t> signs[2];
    std::vector<uint16_t> norms[2];
    for (int b = 0; b < 2; ++b) {
      signs[b].resize(static_cast<size_t>(n) * m / 8);
      norms[b].resize(n);
      qjl_encode(b == 0 ? Backend::cpu : Backend::reference, x.data(), n, dim, sketch.data(), m,
                 signs[b].data(), norms[b].data());
    }
    EXPECT_TRUE(same(signs[0], signs[1]));
    EXPECT_TRUE(same(norms[0], norms[1]));
  });
}

TEST(Fuzz, QjlInnerProduct) {
  fuzz("qjl_inner_product", [](ExactRandom& random) {
    QjlScores work;
    const int group = 1 + random.below(3);
    work.n_key_heads = random.below(24) ? 1 + random.below(3) : 0;
    work.n_query_heads = group * std::max(1, work.n_key_heads) + (random.below(24) ? 0 : 1);
    work.m = random.below(24) ? 8 * (1 + random.below(40)) : random.below(20);
    work.n_keys = random.below(70);
    const int64_t row = (work.m + 7) / 8 + random.below(3), heads = std::max(1, work.n_key_heads);
    work.sign_head_stride = row;
    work.sign_key_stride = row * heads + random.below(3);
    work.norm_head_stride = 1;
    work.norm_key_stride = heads + random.below(3);
    const auto queries = random.values(int64_t{work.n_query_heads} * work.m);
    const auto signs = any_bytes<uint8_t>(random, work.n_keys * work.sign_key_stride);
    const auto norms = random.values(work.n_keys * work.norm_key_stride);
    std::vector<float> scores(work.n_query_heads * work.n_keys, NAN);
    work.queries = queries.data();
    work.signs = signs.data();
    work.norms = norms.data();
    work.scores = scores.data();
    qjl_inner_product(work);
    for (int64_t h = 0; h < work.n_query_heads; ++h) {
      for (int64_t i = 0; i < work.n_keys; ++i) {
        const int64_t head = h / (work.n_query_heads / work.n_key_heads);
        const uint8_t* bits = &signs[i * work.sign_key_stride + head * work.sign_head_stride];
        double sum = 0.0, size = 0.0;
        for (int j = 0; j < work.m; ++j) {
          const double q = queries[h * work.m + j];
          sum += (bits[j / 8] >> (j % 8) & 1) ? q : -q;
          size += std::abs(q);
        }
        const double factor = 1.2533141373155003 / work.m * norms[i * work.norm_key_stride + head];
        EXPECT_NEAR(scores[h * work.n_keys + i], factor * sum, 1e-6 * std::abs(factor) * size);
      }
    }
  });
}

TEST(Fuzz, CommVQDecode) {
  fuzz("comm_vq_decode", [](ExactRandom& random) {
    const int64_t n = random.below(70), R = 1 + random.below(3), M = 1 + random.below(4),
                  C = 1 + random.below(40), d = 2 * (1 + random.below(5)), D = M * d;
    const auto indices = any_bytes<int32_t>(random, n * R * M);
    const auto positions = any_bytes<int32_t>(random, n);
    const auto codebook = random.values(R * M * C * d);
    std::vector<float> inv_freq(D / 2);
    for (float& f : inv_freq) f = static_cast<float>(random.below(1000)) * 0x1p-10f;
    std::vector<float> out[2];
    for (int b = 0; b < 2; ++b) {
      out[b].resize(n * D);
      comm_vq_decode(b == 0 ? Backend::cpu : Backend::reference,
                     TensorView(indices.data(), DType::int32, {n, R, M}),
                     TensorView(codebook.data(), DType::float32, {R, M, C, d}),
                     TensorView(positions.data(), DType::int32, {n}),
                     TensorView(inv_freq.data(), DType::float32, {D / 2}),
                     MutableTensorView(out[b].data(), DType::float32, {n, D}));
    }
    EXPECT_TRUE(same(out[0], out[1]));
  });
}

class FuzzCodec : public ::testing::TestWithParam<std::string> {};

TEST_P(FuzzCodec, EncodesAndDecodesWhatever) {
  std::vector<CasePtr> cases;
  for (int head_dim : {8, 80, 128}) {
    for (const auto& one : codec_cases(GetParam(), head_dim)) cases.push_back(one);
  }
  fuzz(GetParam().c_str(), [&](ExactRandom& random) {
    const Codec& codec = cases[random.below(static_cast<int>(cases.size()))]->codec();
    const int n = 1 + random.below(kBlockTokens), dim = codec.head_dim();
    const BlockPlace place{0, random.below(codec.n_kv_heads()), random.below(1 << 20)};
    // Finite, as codec.h asks for, of any size.
    std::vector<float> x = any_floats(random, int64_t{n} * dim);
    for (float& v : x) v = v - v == 0.0f ? v : 65504.0f;
    std::vector<uint8_t> block(codec.block_bytes()), wanted(block.size());
    codec.encode_block(Backend::cpu, place, x.data(), n, block.data());
    if (random.below(4) == 0) {
      codec.encode_block(Backend::reference, place, x.data(), n, wanted.data());
      EXPECT_TRUE(same(block, wanted)) << codec.name();
    }
    if (random.below(2)) block = any_bytes<uint8_t>(random, codec.block_bytes());
    std::vector<float> y(int64_t{n} * dim), y_wanted(y.size());
    std::vector<float> y_t(int64_t{kBlockTokens} * dim);
    codec.decode_block(Backend::cpu, place, block.data(), n, y.data(), dim);
    codec.decode_block(Backend::reference, place, block.data(), n, y_wanted.data(), dim);
    EXPECT_TRUE(same(y, y_wanted)) << codec.name();
    codec.decode_block_transposed(Backend::cpu, place, block.data(), n, y_t.data());
    std::vector<uint8_t> rows(n * codec.token_bytes());
    codec.unpack_tokens(block.data(), n, rows.data());
    codec.pack_tokens(rows.data(), n, block.data());
  });
}

INSTANTIATE_TEST_SUITE_P(Codecs, FuzzCodec, ::testing::ValuesIn(codec_methods()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace veloxquant::test
