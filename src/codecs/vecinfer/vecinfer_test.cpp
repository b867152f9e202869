// VecInfer: known answers, and every SIMD level against the reference bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "src/codecs/vecinfer/format.h"
#include "src/codecs/vecinfer/kernels.h"
#include "src/math/float16.h"
#include "src/math/hadamard.h"
#include "tests/support/random.h"

namespace veloxquant {
namespace {

using test::Random;
using test::random_codec;

TEST(Hadamard, FirstUnitVectorIsFlat) {
  for (int n : {8, 64, 128, 256}) {
    std::vector<float> x(n, 0.0f);
    x[0] = 1.0f;
    hadamard_row(x.data(), n);
    for (float v : x) EXPECT_FLOAT_EQ(v, 1.0f / std::sqrt(static_cast<float>(n)));
  }
}

TEST(Hadamard, GoldenRowOfEight) {
  std::vector<float> x{1, 2, 3, 4, 5, 6, 7, 8};
  hadamard_row(x.data(), 8);
  const float golden[] = {12.7279f, -1.41421f, -2.82843f, 0, -5.65685f, 0, 0, 0};
  for (int i = 0; i < 8; ++i) EXPECT_NEAR(x[i], golden[i], 1e-4f);
}

TEST(Hadamard, IsItsOwnInverseInBlocks) {
  Random random(1);
  for (int n : {8, 24, 48, 64, 80, 96, 112, 128, 192, 256}) {
    std::vector<float> x = random.normal(n), y = x;
    hadamard_row(y.data(), n);
    hadamard_row(y.data(), n);
    for (int i = 0; i < n; ++i) EXPECT_NEAR(x[i], y[i], 2e-6f) << n;
  }
}

TEST(Float16, EveryValueRoundTripsAndRoundingIsToEven) {
  for (uint32_t h = 0; h < 65536; ++h) {
    float f = f16_to_f32(static_cast<uint16_t>(h));
    if (std::isnan(f)) continue;
    EXPECT_EQ(f32_to_f16(f), h);
    // Halfway to the next value goes to the even one.
    float next = f16_to_f32(static_cast<uint16_t>(h + 1));
    if ((h & 0x7c00u) == 0x7c00u || !std::isfinite(next) || std::isnan(next)) continue;
    float half = f + (next - f) / 2;
    EXPECT_EQ(f32_to_f16(half), (h & 1) ? h + 1 : h) << h;
  }
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(f32_to_bf16(1.00390625f), 0x3f80);  // a tie, to even
}

TEST(Nearest, TiesAndNanGoToTheLowestIndex) {
  const float table[] = {1, -1, 1, -1};
  const float x[] = {0, std::nanf(""), std::numeric_limits<float>::infinity(), -3};
  for (Backend backend : {Backend::reference, Backend::cpu}) {
    uint16_t codes[4];
    nearest_centroids(backend, x, 4, 4, table, 4, 1, codes, nullptr);
    EXPECT_EQ(codes[0], 0);
    EXPECT_EQ(codes[1], 0);
    EXPECT_EQ(codes[2], 0);
    EXPECT_EQ(codes[3], 1);
  }
}

// Tables and vectors that the filter in nearest-inl.h must see through: equal centroids, centroids
// closer than the rounding error of their scores, vectors too large, too small or not finite.
TEST(Nearest, ChoosesLikeTheReferenceOnHardTables) {
  Random random(3);
  const int n = 345;
  for (int sub_dim : {1, 2, 3, 4, 7, 8, 16, 24}) {
    for (int n_centroids : {2, 33, 200, 256, 300, 700}) {
      for (float spread : {1.0f, 1e-7f, 0.0f}) {
        std::vector<float> middle = random.normal(sub_dim), table;
        for (int c = 0; c < n_centroids; ++c) {
          for (int i = 0; i < sub_dim; ++i) table.push_back(middle[i] + spread * random.normal());
        }
        std::vector<float> x = random.normal(sub_dim * n);
        for (int t = 0; t < n; ++t) {
          const float scales[] = {1, 1, 1, 0, 1e-20f, 1e-38f, 1e15f, 1e19f, 1e30f, INFINITY, NAN};
          const float scale = t < 64 ? 1.0f : scales[random.next() % 11];
          for (int i = 0; i < sub_dim; ++i) x[i * n + t] *= scale;
        }
        std::vector<uint16_t> expected(n), codes(n);
        std::vector<float> expected_distance(n), distance(n);
        nearest_centroids(Backend::reference, x.data(), n, n, table.data(), n_centroids, sub_dim,
                          expected.data(), expected_distance.data());
        for (const std::string& level : simd_levels()) {
          set_simd_level(level);
          nearest_centroids(Backend::cpu, x.data(), n, n, table.data(), n_centroids, sub_dim,
                            codes.data(), distance.data());
          EXPECT_EQ(codes, expected)
              << level << " d" << sub_dim << " C" << n_centroids << " spread " << spread;
          EXPECT_EQ(0, std::memcmp(distance.data(), expected_distance.data(), n * 4)) << level;
        }
        set_simd_level("");
      }
    }
  }
}

struct Shape {
  int head_dim, n_subvectors, n_centroids;
  bool per_head;
  TransformKind kind;
};

class Levels : public ::testing::TestWithParam<Shape> {
 protected:
  void TearDown() override { set_simd_level(""); }
};

TEST_P(Levels, CodesAndDecodedBitsEqualTheReference) {
  const Shape shape = GetParam();
  Random random(7);
  const int heads = 2;
  auto owned = random_codec(random, Side::keys, heads, shape.head_dim, shape.n_subvectors,
                            shape.n_centroids, shape.per_head, shape.kind);
  const Codec& codec = *owned.codec;
  for (int n_tokens : {1, 31, 64}) {
    for (int h = 0; h < heads; ++h) {
      std::vector<float> x = random.normal(n_tokens * shape.head_dim);
      std::vector<uint8_t> expected(codec.block_bytes(), 0xaa);
      codec.encode_block(Backend::reference, {0, h, 0}, x.data(), n_tokens, expected.data());
      std::vector<float> y(64 * shape.head_dim), y_t(64 * shape.head_dim);
      codec.decode_block(Backend::reference, {0, h, 0}, expected.data(), n_tokens, y.data(),
                         shape.head_dim);
      codec.decode_block_transposed(Backend::reference, {0, h, 0}, expected.data(), n_tokens,
                                    y_t.data());
      for (const std::string& level : simd_levels()) {
        set_simd_level(level);
        std::vector<uint8_t> block(codec.block_bytes(), 0x55);
        codec.encode_block(Backend::cpu, {0, h, 0}, x.data(), n_tokens, block.data());
        EXPECT_EQ(block, expected) << level;
        std::vector<float> z(64 * shape.head_dim), z_t(64 * shape.head_dim, NAN);
        codec.decode_block(Backend::cpu, {0, h, 0}, block.data(), n_tokens, z.data(),
                           shape.head_dim);
        codec.decode_block_transposed(Backend::cpu, {0, h, 0}, block.data(), n_tokens, z_t.data());
        EXPECT_EQ(0, std::memcmp(z.data(), y.data(), n_tokens * shape.head_dim * 4)) << level;
        EXPECT_EQ(0, std::memcmp(z_t.data(), y_t.data(), y_t.size() * 4)) << level;
      }
    }
  }
}

TEST_P(Levels, InterchangeRoundTrips) {
  const Shape shape = GetParam();
  Random random(8);
  auto owned = random_codec(random, Side::keys, 1, shape.head_dim, shape.n_subvectors,
                            shape.n_centroids, shape.per_head, shape.kind);
  std::vector<uint8_t> block(owned.codec->block_bytes()), again(block.size());
  for (auto& byte : block) byte = static_cast<uint8_t>(random.next());
  std::vector<uint8_t> rows(64 * owned.codec->token_bytes());
  owned.codec->unpack_tokens(block.data(), 64, rows.data());
  owned.codec->pack_tokens(rows.data(), 64, again.data());
  EXPECT_EQ(block, again);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Levels,
                         ::testing::Values(Shape{64, 16, 256, false, TransformKind::hadamard},
                                           Shape{64, 32, 256, false, TransformKind::hadamard},
                                           Shape{128, 32, 256, true, TransformKind::hadamard},
                                           Shape{128, 8, 256, false, TransformKind::dense},
                                           Shape{128, 16, 200, false, TransformKind::none},
                                           Shape{64, 32, 16, false, TransformKind::hadamard},
                                           Shape{64, 64, 16, true, TransformKind::dense},
                                           Shape{80, 20, 11, false, TransformKind::hadamard},
                                           Shape{96, 32, 256, false, TransformKind::dense},
                                           Shape{64, 16, 64, false, TransformKind::hadamard},
                                           Shape{80, 10, 1000, true, TransformKind::none},
                                           Shape{64, 8, 4096, true, TransformKind::hadamard},
                                           Shape{24, 24, 40, false, TransformKind::none}));

// Inputs within 2 ulp of the midpoint between two centroids: where a reordered or fused sum would
// choose differently.
TEST(Boundary, EveryLevelChoosesLikeTheReference) {
  Random random(11);
  for (int sub_dim : {1, 2, 4, 8, 16}) {
    std::vector<float> table = random.normal(256 * sub_dim);
    const int n = 999;
    std::vector<float> x(sub_dim * n);
    for (int t = 0; t < n; ++t) {
      const float* a = &table[(random.next() % 256) * sub_dim];
      const float* b = &table[(random.next() % 256) * sub_dim];
      for (int i = 0; i < sub_dim; ++i) {
        float middle = a[i] + (b[i] - a[i]) / 2;
        int steps = static_cast<int>(random.next() % 5) - 2;
        for (; steps > 0; --steps) middle = std::nextafter(middle, 1e9f);
        for (; steps < 0; ++steps) middle = std::nextafter(middle, -1e9f);
        x[i * n + t] = middle;
      }
    }
    std::vector<uint16_t> expected(n), codes(n);
    std::vector<float> expected_distance(n), distance(n);
    nearest_centroids(Backend::reference, x.data(), n, n, table.data(), 256, sub_dim,
                      expected.data(), expected_distance.data());
    for (const std::string& level : simd_levels()) {
      set_simd_level(level);
      nearest_centroids(Backend::cpu, x.data(), n, n, table.data(), 256, sub_dim, codes.data(),
                        distance.data());
      EXPECT_EQ(codes, expected) << level << " d" << sub_dim;
      EXPECT_EQ(0, std::memcmp(distance.data(), expected_distance.data(), n * 4)) << level;
    }
    set_simd_level("");
  }
}

// The dual transform: q' . y == q . k before any quantisation, lambda in [1e-2, 1e2].
// A row of codes as README.md draws it, for every width.
TEST(Format, RowsAreTheDocumentedBytes) {
  const struct {
    int n_centroids, bits;
  } widths[] = {{2, 4},   {16, 4},   {17, 6},    {64, 6},   {65, 8},
                {256, 8}, {257, 10}, {1025, 12}, {4096, 12}};
  for (auto [n_centroids, bits] : widths) EXPECT_EQ(vecinfer::code_bits(n_centroids), bits);
  auto row_with = [](int bits, int token, uint32_t code) {
    std::vector<uint8_t> row(vecinfer::row_bytes(bits), 0);
    vecinfer::set_code(row.data(), bits, token, code);
    EXPECT_EQ(vecinfer::get_code(row.data(), bits, token), code);
    return row;
  };
  std::vector<uint8_t> row = row_with(6, 35, 0x2b);  // low 0xb, high 2
  EXPECT_EQ(row[3], 0xb0);
  EXPECT_EQ(row[32 + 3], 2 << 4);
  row = row_with(10, 20, 0x2cd);
  EXPECT_EQ(row[20], 0xcd);
  EXPECT_EQ(row[64 + 4], 2 << 2);
  row = row_with(12, 33, 0xabc);
  EXPECT_EQ(row[33], 0xbc);
  EXPECT_EQ(row[64 + 1], 0xa0);
  row = row_with(4, 1, 5);
  EXPECT_EQ(row[1], 5);
}

TEST(Transform, DenseRowsHaveTheBitsOfTheReference) {
  Random random(11);
  for (const int dim : {8, 24, 64, 128, 256}) {
    const std::vector<float> matrix = random.normal(dim * dim);
    for (const int64_t n : {1, 2, 3, 4, 7, 9}) {
      const std::vector<float> x = random.normal(n * dim);
      for (const bool transposed : {false, true}) {
        std::vector<float> want(x.size()), got(x.size());
        vecinfer::reference_kernels().dense_rows(matrix.data(), dim, transposed, x.data(), n,
                                                 want.data());
        for (const std::string& level : simd_levels()) {
          set_simd_level(level);
          vecinfer::cpu_kernels().dense_rows(matrix.data(), dim, transposed, x.data(), n,
                                             got.data());
          ASSERT_EQ(got, want) << level << ", " << dim << ", " << n << ", " << transposed;
        }
        set_simd_level("");
      }
    }
  }
}

TEST(Transform, PreservesScores) {
  Random random(13);
  for (TransformKind kind : {TransformKind::hadamard, TransformKind::dense, TransformKind::none}) {
    for (int head_dim : {64, 80, 128}) {
      auto owned = random_codec(random, Side::keys, 3, head_dim, head_dim / 4, 256, false, kind);
      for (int trial = 0; trial < 50; ++trial) {
        int h = trial % 3;
        std::vector<float> k = random.normal(head_dim), q = random.normal(head_dim);
        double exact = 0, moved = 0, size = 0;
        for (int i = 0; i < head_dim; ++i) exact += double(q[i]) * k[i];
        owned.codec->transform_query(h, q.data(), 1);
        owned.codec->forward(h, k.data(), 1);
        for (int i = 0; i < head_dim; ++i) {
          moved += double(q[i]) * k[i];
          size += std::abs(double(q[i]) * k[i]);
        }
        EXPECT_NEAR(moved, exact, 1e-5 * std::max(std::abs(exact), size)) << head_dim;
      }
    }
  }
}

TEST(Codec, RefusesWhatDoesNotFit) {
  std::vector<uint16_t> table(2 * 4097 * 4);
  auto make = [&](int heads, int dim, int m, std::initializer_list<int64_t> shape) {
    make_vecinfer_codec(Side::keys, heads, dim, m, TensorView(table.data(), DType::float16, shape),
                        {});
  };
  EXPECT_NO_THROW(make(2, 64, 16, {2, 16, 256, 4}));
  EXPECT_NO_THROW(make(2, 64, 16, {1, 2, 16, 256, 4}));
  EXPECT_THROW(make(2, 64, 16, {2, 8, 256, 4}), Error);
  EXPECT_THROW(make(2, 64, 16, {2, 1, 4097, 4}), Error);
  EXPECT_THROW(make(2, 64, 7, {2, 16, 256, 4}), Error);
  EXPECT_THROW(make(3, 64, 16, {2, 16, 256, 4}), Error);
  EXPECT_THROW(make(2, 63, 16, {2, 16, 256, 4}), Error);
}

}  // namespace
}  // namespace veloxquant
