// Random calls of the scalar functions: words of codes, rows of scalar codes, the published forms.
// An Error or the reference's bits, and nothing out of bounds: see tests/support/fuzz.h.
#include <gtest/gtest.h>

#include "src/math/bitpack.h"
#include "tests/support/fuzz.h"
#include "veloxquant/scalar_quant.h"
#include "veloxquant/words.h"

namespace veloxquant::test {
namespace {

template <class Code>
void pack_and_unpack(ExactRandom& random) {
  const int bits = random.below(16) ? 1 + random.below(8) : random.below(2) * 9;
  const int64_t n = random.below(one_of(random, {4, 40, 300})), rows = random.below(6);
  const int64_t row_words = bits == 0 || bits > 8 ? n : words_per_row(n, bits);
  const int64_t more = random.below(16) ? random.below(3) : -1;  // -1: too short a row of words
  const auto codes = any_bytes<Code>(random, rows * n);
  const auto garbage = any_bytes<uint32_t>(random, rows * std::max<int64_t>(0, row_words + more));
  std::vector<uint32_t> words[2];
  std::vector<Code> back[2];
  for (int b = 0; b < 2; ++b) {
    const Backend backend = b == 0 ? Backend::cpu : Backend::reference;
    words[b].resize(rows * row_words);
    back[b].resize(rows * n);
    pack_words(backend, codes.data(), rows, n, bits, words[b].data());
    unpack_words(backend, garbage.data(), rows, row_words + more, n, bits, back[b].data());
  }
  EXPECT_TRUE(same(words[0], words[1]));
  EXPECT_TRUE(same(back[0], back[1]));
}

TEST(Fuzz, PackAndUnpackWords) {
  fuzz("pack_words, unpack_words", [](ExactRandom& random) {
    random.below(2) ? pack_and_unpack<int32_t>(random) : pack_and_unpack<uint8_t>(random);
  });
}

// Floats of any kind in one of the three dtypes.
struct AnyRows {
  DType dtype;
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  AnyRows(ExactRandom& random, int64_t n) {
    const DType dtypes[] = {DType::float32, DType::float16, DType::bfloat16};
    dtype = dtypes[random.below(3)];
    if (dtype == DType::float32) {
      floats = any_floats(random, n);
    } else {
      halves = any_bytes<uint16_t>(random, n);
    }
  }
  const void* data() const {
    return dtype == DType::float32 ? static_cast<const void*>(floats.data()) : halves.data();
  }
};

TEST(Fuzz, ScalarQuantizeAndDequantize) {
  fuzz("scalar_quantize, scalar_dequantize", [](ExactRandom& random) {
    ScalarQuantParams params;
    params.dim = one_of(random, {1, 2, 3, 7, 8, 16, 20, 64, 80, 96, 128, 200});
    params.bits = random.below(16) ? 1 + random.below(4) : random.below(7);
    const ScalarScale scales[] = {ScalarScale::norm_corrected, ScalarScale::raw,
                                  ScalarScale::unbiased};
    params.scale = scales[random.below(3)];
    params.rotate = random.below(2) != 0;
    params.seed = random.next();
    const int64_t n = random.below(70);
    const AnyRows x(random, n * params.dim);
    const int64_t row_words = words_per_row(params.dim, std::max(1, params.bits));
    std::vector<uint32_t> words[2];
    std::vector<uint16_t> scalars[2];
    for (int b = 0; b < 2; ++b) {
      words[b].resize(n * row_words);
      scalars[b].resize(n);
      scalar_quantize(b == 0 ? Backend::cpu : Backend::reference, params, x.dtype, x.data(), n,
                      words[b].data(), scalars[b].data());
    }
    EXPECT_TRUE(same(words[0], words[1]));
    EXPECT_TRUE(same(scalars[0], scalars[1]));
    if (random.below(2)) words[0] = any_bytes<uint32_t>(random, n * row_words);
    const bool floats = random.below(2) != 0;
    std::vector<float> y[2];
    std::vector<uint16_t> y_half[2];
    for (int b = 0; b < 2; ++b) {
      y[b].resize(floats ? n * params.dim : 0);
      y_half[b].resize(floats ? 0 : n * params.dim);
      void* out = floats ? static_cast<void*>(y[b].data()) : y_half[b].data();
      scalar_dequantize(b == 0 ? Backend::cpu : Backend::reference, params, words[0].data(),
                        scalars[0].data(), n, floats ? DType::float32 : DType::float16, out);
    }
    EXPECT_TRUE(same(y[0], y[1]));
    EXPECT_TRUE(same(y_half[0], y_half[1]));
  });
}

// A table as callers have them, or any other.
std::vector<float> any_centroids(ExactRandom& random) {
  const int n = random.below(3) ? 1 << random.below(5) : 1 + random.below(256);
  std::vector<float> table = random.below(3) ? random.values(n) : any_floats(random, n);
  const float scale = random.below(4) ? 1.0f : random.scale() * 0x1p-20f;
  for (float& v : table) v *= scale;
  if (random.below(2)) {
    std::sort(table.begin(), table.end(), [](float a, float b) {
      return (a < b) || (b != b && a == a);  // NaN last
    });
  }
  return table;
}

TEST(Fuzz, NearestScalar) {
  fuzz("nearest_scalar, scalar_centroids", [](ExactRandom& random) {
    const std::vector<float> table = any_centroids(random);
    const int n_centroids = static_cast<int>(table.size());
    const int64_t n = random.below(300);
    AnyRows x(random, n);
    for (float& v : x.floats) {  // near a boundary, half of the time
      if (random.below(2)) continue;
      const float a = table[random.below(n_centroids)], b = table[random.below(n_centroids)];
      v = 0.5f * a + 0.5f * b;
      for (int ulps = random.below(3); ulps > 0; --ulps) v = std::nextafter(v, b);
    }
    std::vector<uint8_t> codes(n), wanted(n);
    nearest_scalar(Backend::cpu, x.dtype, x.data(), n, table.data(), n_centroids, codes.data());
    nearest_scalar(Backend::reference, x.dtype, x.data(), n, table.data(), n_centroids,
                   wanted.data());
    EXPECT_TRUE(same(codes, wanted));
    codes = any_bytes<uint8_t>(random, n);
    std::vector<uint16_t> values(n);
    scalar_centroids(codes.data(), n, table.data(), n_centroids, values.data());
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(values[i], f32_to_f16(table[std::min<int>(codes[i], n_centroids - 1)]));
    }
  });
}

TEST(Fuzz, NearestScalarOfHadamard) {
  fuzz("nearest_scalar_of_hadamard", [](ExactRandom& random) {
    const std::vector<float> table = any_centroids(random);
    const int n_centroids = static_cast<int>(table.size()), dim = 1 << random.below(9);
    const int64_t rows = random.below(20);
    const AnyRows x(random, rows * dim);
    const auto diag = random.below(4) ? random.values(dim) : any_floats(random, dim);
    std::vector<uint8_t> codes(rows * dim), wanted(rows * dim);
    nearest_scalar_of_hadamard(Backend::cpu, x.dtype, x.data(), rows, dim, diag.data(),
                               table.data(), n_centroids, codes.data());
    nearest_scalar_of_hadamard(Backend::reference, x.dtype, x.data(), rows, dim, diag.data(),
                               table.data(), n_centroids, wanted.data());
    EXPECT_TRUE(same(codes, wanted));
  });
}

}  // namespace
}  // namespace veloxquant::test
