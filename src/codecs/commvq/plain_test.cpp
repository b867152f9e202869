// The published look-up against its definition in double, and its edges.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/commvq.h"

namespace veloxquant {
namespace {

using test::Random;

struct Call {
  int n, stages, books, size, sub_dim;
  std::vector<int32_t> indices, positions;
  std::vector<float> book, inv_freq;
  std::vector<uint16_t> book16;

  Call(Random& random, int n, int stages, int books, int size, int sub_dim)
      : n(n), stages(stages), books(books), size(size), sub_dim(sub_dim) {
    for (int i = 0; i < n * stages * books; ++i) {
      indices.push_back(static_cast<int32_t>(random.next() % (size + 2)) - 1);  // some out of range
    }
    for (int i = 0; i < n; ++i) {
      positions.push_back(static_cast<int32_t>(random.next() % 1000001) -
                          (i % 5 == 0 ? 500000 : 0));
    }
    book = random.normal(stages * books * size * sub_dim);
    for (float& v : book) v = f16_to_f32(f32_to_f16(v));
    for (float v : book) book16.push_back(f32_to_f16(v));
    for (int j = 0; j < dims() / 2; ++j) {
      inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * j / dims())));
    }
  }
  int dims() const { return books * sub_dim; }
  std::vector<float> run(Backend backend, bool half = false) const {
    std::vector<float> out(n * dims(), NAN);
    const TensorView entries =
        half ? TensorView(book16.data(), DType::float16, {stages, books, size, sub_dim})
             : TensorView(book.data(), DType::float32, {stages, books, size, sub_dim});
    comm_vq_decode(backend, TensorView(indices.data(), DType::int32, {n, stages, books}), entries,
                   TensorView(positions.data(), DType::int32, {n}),
                   TensorView(inv_freq.data(), DType::float32, {dims() / 2}),
                   MutableTensorView(out.data(), DType::float32, {n, dims()}));
    return out;
  }
  double gathered(int t, int d) const {
    double sum = 0;
    for (int r = 0; r < stages; ++r) {
      const uint32_t code = static_cast<uint32_t>(indices[(t * stages + r) * books + d / sub_dim]);
      const int64_t entry = std::min<int64_t>(code, size - 1);
      sum += book[((int64_t{r} * books + d / sub_dim) * size + entry) * sub_dim + d % sub_dim];
    }
    return sum;
  }
};

TEST(Plain, IsTheDefinitionOnEveryLevel) {
  Random random(1);
  for (auto [n, stages, books, size, sub_dim] :
       {std::array{1, 1, 4, 256, 16}, std::array{65, 1, 4, 16, 16}, std::array{7, 3, 5, 9, 2},
        std::array{130, 2, 32, 256, 4}, std::array{3, 1, 1, 1, 2}, std::array{64, 1, 2, 4, 1}}) {
    const Call call(random, n, stages, books, size, sub_dim);
    const std::vector<float> expected = call.run(Backend::reference);
    const int half = call.dims() / 2;
    for (int t = 0; t < n; ++t) {
      for (int j = 0; j < half; ++j) {
        const double angle =
            static_cast<double>(static_cast<float>(call.positions[t]) * call.inv_freq[j]);
        const double a = call.gathered(t, j), b = call.gathered(t, j + half);
        EXPECT_NEAR(expected[t * 2 * half + j], a * std::cos(angle) - b * std::sin(angle), 4e-6);
        EXPECT_NEAR(expected[t * 2 * half + half + j], a * std::sin(angle) + b * std::cos(angle),
                    4e-6);
      }
    }
    EXPECT_EQ(expected, call.run(Backend::reference, true));
    for (const std::string& level : simd_levels()) {
      set_simd_level(level);
      EXPECT_EQ(expected, call.run(Backend::cpu)) << level;
    }
    set_simd_level("");
  }
}

TEST(Plain, AcceptsNothing) {
  Random random(2);
  const Call call(random, 0, 1, 4, 8, 2);
  EXPECT_TRUE(call.run(Backend::cpu).empty());
}

TEST(Plain, RefusesWhatDoesNotFit) {
  Random random(3);
  EXPECT_THROW(Call(random, 2, 1, 3, 8, 1).run(Backend::cpu), Error);  // an odd head
  Call call(random, 2, 1, 4, 8, 2);
  call.books = 2;  // inv_freq and indices no longer fit
  EXPECT_THROW(
      comm_vq_decode(Backend::cpu, TensorView(call.indices.data(), DType::int32, {2, 1, 4}),
                     TensorView(call.book.data(), DType::float32, {1, 2, 8, 2}),
                     TensorView(call.positions.data(), DType::int32, {2}),
                     TensorView(call.inv_freq.data(), DType::float32, {4}),
                     MutableTensorView(call.book.data(), DType::float32, {2, 8})),
      Error);
}

// 10^5 random calls: shapes, indices, positions and frequencies of any bits.
TEST(Plain, Fuzz) {
  const uint64_t seed = 20260101;
  SCOPED_TRACE(seed);
  Random random(seed);
  for (int i = 0; i < 100000; ++i) {
    const int n = static_cast<int>(random.next() % 3), stages = 1 + random.next() % 2;
    Call call(random, n, stages, 1 + random.next() % 3, 1 + random.next() % 5,
              2 * (1 + random.next() % 2));
    for (int32_t& index : call.indices) index = static_cast<int32_t>(random.next());
    for (int32_t& position : call.positions) position = static_cast<int32_t>(random.next());
    for (float& f : call.inv_freq) {
      const uint32_t bits = static_cast<uint32_t>(random.next());
      std::memcpy(&f, &bits, 4);
    }
    for (float v : call.run(Backend::cpu)) ASSERT_TRUE(std::isfinite(v));
  }
}

}  // namespace
}  // namespace veloxquant
