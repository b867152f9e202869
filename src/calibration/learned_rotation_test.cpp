// Orthogonality, the allocation on a known spectrum, invariance to scale and threads, the corners,
// and the score error that the rotation is there for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "src/math/float16.h"
#include "tests/support/random.h"
#include "veloxquant/backend.h"
#include "veloxquant/calibration.h"

namespace veloxquant {
namespace {

using testing::HasSubstr;
using Floats = std::vector<float>;

struct Learned {
  int64_t heads, dims;
  Floats rotation, weight, encode, query;

  Learned(const Floats& x, const Floats& query_moments, int64_t heads, int64_t dims,
          int n_subvectors, int n_tables = 0)  // 0: one for each sub-vector
      : heads(heads),
        dims(dims),
        rotation(heads * dims * dims),
        weight(heads * dims),
        encode(rotation.size()),
        query(rotation.size()) {
    const int64_t tokens = static_cast<int64_t>(x.size()) / (heads * dims);
    TensorView moments;
    if (!query_moments.empty()) {
      moments = TensorView(query_moments.data(), DType::float32, {heads, dims});
    }
    const auto cube = [&](Floats& v) {
      return MutableTensorView(v.data(), DType::float32, {heads, dims, dims});
    };
    const MutableTensorView w(weight.data(), DType::float32, {heads, dims});
    learned_rotation(TensorView(x.data(), DType::float32, {heads, tokens, dims}), moments,
                     n_subvectors, n_tables == 0 ? n_subvectors : n_tables, cube(rotation), w);
    rotation_matrices(read_only(cube(rotation)), read_only(w), cube(encode), cube(query));
  }

  Transform transform() const {
    Transform map;
    map.kind = TransformKind::dense;
    map.encode_matrix = TensorView(encode.data(), DType::float32, {heads, dims, dims});
    map.query_matrix = TensorView(query.data(), DType::float32, {heads, dims, dims});
    return map;
  }

  // Largest |A B^T - I| over the heads.
  double distance_from_identity(const Floats& a, const Floats& b) const {
    double worst = 0;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < dims; ++i) {
        for (int64_t j = 0; j < dims; ++j) {
          double sum = i == j ? -1 : 0;
          for (int64_t k = 0; k < dims; ++k) {
            sum += static_cast<double>(a[(h * dims + i) * dims + k]) * b[(h * dims + j) * dims + k];
          }
          worst = std::max(worst, std::abs(sum));
        }
      }
    }
    return worst;
  }

  void expect_sound(const char* what) const {
    for (float v : encode) ASSERT_TRUE(std::isfinite(v)) << what;
    for (float v : query) ASSERT_TRUE(std::isfinite(v)) << what;
    EXPECT_LT(distance_from_identity(rotation, rotation), 1e-5) << what;
    EXPECT_LT(distance_from_identity(encode, query), 1e-5) << what;
  }
};

Floats scaled(Floats x, float factor) {
  for (float& v : x) v *= factor;
  return x;
}

// Normal numbers whose channels have different energies.
Floats uneven(int64_t heads, int64_t tokens, int64_t dims, uint64_t seed) {
  Floats x = test::Random(seed).normal(heads * tokens * dims);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= std::exp2(static_cast<float>(i % dims % 7));
  return x;
}

Floats moments(int64_t heads, int64_t dims, uint64_t seed) {
  Floats q = test::Random(seed).normal(heads * dims);
  for (float& v : q) v = v * v + 0.01f;
  return q;
}

TEST(LearnedRotation, IsOrthogonalAndTheMatricesAreDual) {
  for (int dims : {8, 64, 128}) {
    const Learned keys(uneven(2, 700, dims, 1), moments(2, dims, 2), 2, dims, dims / 4);
    keys.expect_sound("keys");
    const Learned values(uneven(2, 700, dims, 3), {}, 2, dims, dims / 4);
    values.expect_sound("values");
    EXPECT_EQ(values.encode, values.query);  // one array serves both
    EXPECT_EQ(values.encode, values.rotation);
  }
}

float difference(const Floats& a, const Floats& b) {
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

TEST(LearnedRotation, LooksPastTheMean) {
  const int64_t tokens = 4001, dims = 8;  // more than a chunk of the sums
  const Floats x = uneven(2, tokens, dims, 4);
  Floats moved = x;
  for (size_t i = 0; i < x.size(); ++i) moved[i] += i % dims < 4 ? 200.0f : -100.0f;
  const Learned here(x, {}, 2, dims, 2), there(moved, {}, 2, dims, 2);
  there.expect_sound("keys");
  EXPECT_LT(difference(there.rotation, here.rotation), 1e-3f);
  // A head that never moves has no covariance.
  Learned(Floats(100 * dims, 3.0f), {}, 1, dims, 2).expect_sound("constant");
}

// Keys along the axes and against them, so that the eigenvectors are the axes; `logs` of E k_i^2,
// up to a constant.
TEST(LearnedRotation, BalancesAKnownSpectrum) {
  const Floats logs = {9.0f, 7.1f, 5.3f, 4.2f, 3.1f, 2.2f, 1.2f, 0.0f};
  const int64_t dims = 8;
  Floats x(2 * dims * dims, 0.0f);
  for (int64_t i = 0; i < dims; ++i) {
    x[i * dims + i] = std::exp(logs[i] / 2);
    x[(dims + i) * dims + i] = -x[i * dims + i];
  }
  const auto columns = [&](int n_subvectors, int n_tables) {
    const Learned learned(x, {}, 1, dims, n_subvectors, n_tables);
    std::vector<int64_t> axes;
    for (int64_t j = 0; j < dims; ++j) {
      for (int64_t i = 0; i < dims; ++i) {
        if (std::abs(learned.rotation[i * dims + j] - 1.0f) < 1e-6f) axes.push_back(i);
      }
    }
    return axes;
  };
  EXPECT_THAT(columns(2, 2), testing::ElementsAre(0, 3, 5, 6, 1, 2, 4, 7));  // 16.6 and 15.5
  EXPECT_THAT(columns(4, 4), testing::ElementsAre(0, 7, 1, 6, 2, 5, 3, 4));
  EXPECT_THAT(columns(1, 1), testing::ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  // Sub-vectors 0 and 2 share a table, and 1 and 3: neighbours go to them, turn and turn about.
  EXPECT_THAT(columns(4, 2), testing::ElementsAre(0, 7, 2, 5, 1, 6, 3, 4));
  EXPECT_THAT(columns(2, 1), testing::ElementsAre(0, 3, 5, 6, 1, 2, 4, 7));
  // 0 and 3 share one; 1 and 2 have their own.
  EXPECT_THAT(columns(4, 3), testing::ElementsAre(0, 7, 2, 5, 3, 4, 1, 6));
}

// What share a table have the same mean, and their directions still span the same planes.
TEST(LearnedRotation, SubvectorsOfATableHaveTheSameMean) {
  const int64_t tokens = 3000, dims = 64, sub_dim = 4, subvectors = dims / sub_dim;
  Floats x = uneven(1, tokens, dims, 21);
  const Floats shift = test::Random(22).normal(dims);
  for (size_t i = 0; i < x.size(); ++i) x[i] += 90.0f * shift[i % dims];
  for (int n_tables : {1, 4, 8, 5, 16}) {
    const Learned learned(x, moments(1, dims, 23), 1, dims, subvectors, n_tables);
    learned.expect_sound("shared");
    std::vector<double> mean(dims, 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < dims; ++j) {
        for (int64_t i = 0; i < dims; ++i) {
          mean[j] += static_cast<double>(x[t * dims + i]) * learned.encode[i * dims + j] / tokens;
        }
      }
    }
    double largest = 0;
    for (double v : mean) largest = std::max(largest, std::abs(v));
    for (int64_t j = n_tables * sub_dim; j < dims; ++j) {
      EXPECT_NEAR(mean[j], mean[j % (n_tables * sub_dim)], 1e-4 * largest) << n_tables << " " << j;
    }
  }
}

// A weight of 2 is the token twice.
TEST(LearnedRotation, WeightsCountTokens) {
  const int64_t tokens = 500, dims = 16;
  const Floats x = uneven(1, tokens, dims, 24);
  Floats weights(tokens, 1.0f), twice = x;
  for (int64_t t = 0; t < tokens; t += 3) {
    weights[t] = 2.0f;
    twice.insert(twice.end(), x.begin() + t * dims, x.begin() + (t + 1) * dims);
  }
  Floats rotation(dims * dims), weight(dims);
  const auto learn = [&](const Floats& counts) {
    learned_rotation(TensorView(x.data(), DType::float32, {1, tokens, dims}), {}, 4, 2,
                     MutableTensorView(rotation.data(), DType::float32, {1, dims, dims}),
                     MutableTensorView(weight.data(), DType::float32, {1, dims}),
                     TensorView(counts.data(), DType::float32, {1, tokens}));
    return rotation;
  };
  EXPECT_LT(difference(learn(weights), Learned(twice, {}, 1, dims, 4, 2).rotation), 1e-5f);
  EXPECT_EQ(learn(Floats(tokens, 1.0f)), Learned(x, {}, 1, dims, 4, 2).rotation);
}

TEST(LearnedRotation, SameBitsWithAnyThreadsAndForPowersOfTwo) {
  const Floats x = uneven(3, 9000, 32, 5), q = moments(3, 32, 6);
  set_num_threads(1);
  const Learned one(x, q, 3, 32, 8);
  set_num_threads(0);
  const Learned all(x, q, 3, 32, 8), keys(scaled(x, 0.125f), q, 3, 32, 8),
      queries(x, scaled(q, 64.0f), 3, 32, 8);  // moments: queries times 8
  for (const Learned* other : {&all, &keys, &queries}) {
    EXPECT_EQ(one.rotation, other->rotation);
    EXPECT_EQ(one.weight, other->weight);
  }
}

struct Trained {
  Learned learned;
  std::vector<uint16_t> tables;
  CodecPtr codec;

  Trained(const Floats& x, const Floats& q, int64_t dims)
      : learned(x, q, 1, dims, static_cast<int>(dims / 4)), tables(dims / 4 * 32 * 4) {
    const int64_t tokens = static_cast<int64_t>(x.size()) / dims;
    KMeansParams params;
    params.n_centroids = 32;
    const MutableTensorView out(tables.data(), DType::float16, {1, dims / 4, 32, 4});
    train_vecinfer_tables(TensorView(x.data(), DType::float32, {1, tokens, dims}),
                          learned.transform(), static_cast<int>(dims / 4),
                          static_cast<int>(dims / 4), params, out);
    codec = make_vecinfer_codec(Side::keys, 1, static_cast<int>(dims), static_cast<int>(dims / 4),
                                read_only(out), learned.transform());
  }

  std::vector<uint8_t> codes(const Floats& x) const {
    std::vector<uint8_t> block(codec->block_bytes());
    codec->encode_block(default_backend(), {}, x.data(), 64, block.data());
    return block;
  }
};

TEST(LearnedRotation, ScalingKeysOrQueriesChangesNoCode) {
  const Floats x = uneven(1, 1000, 32, 7), q = moments(1, 32, 8);
  const auto wanted = Trained(x, q, 32).codes(x);
  EXPECT_EQ(Trained(scaled(x, 4.0f), q, 32).codes(scaled(x, 4.0f)), wanted);
  EXPECT_EQ(Trained(x, scaled(q, 1.0f / 256), 32).codes(x), wanted);
}

TEST(LearnedRotation, TrainingSeesTheBitsThatEncodeSees) {
  const Floats x = uneven(1, 100, 32, 9);
  const Trained trained(x, moments(1, 32, 10), 32);
  Floats tile = x;
  trained.codec->forward(0, tile.data(), 100);
  for (int t = 0; t < 100; ++t) {
    for (int j = 0; j < 32; ++j) {
      volatile float sum = 0.0f;  // one rounding an operation
      for (int i = 0; i < 32; ++i) {
        volatile float product = x[t * 32 + i] * trained.learned.encode[i * 32 + j];
        sum = i == 0 ? product : sum + product;
      }
      ASSERT_EQ(tile[t * 32 + j], sum);
    }
  }
}

TEST(LearnedRotation, DegenerateInputsGiveFiniteRotations) {
  const int64_t dims = 16;
  const Floats q = moments(1, dims, 11);
  Learned(Floats(5 * dims, 0.0f), q, 1, dims, 4).expect_sound("zero keys");
  Learned(Floats(50 * dims, 0.3f), q, 1, dims, 4).expect_sound("one token repeated");
  Learned(uneven(1, 3, dims, 12), q, 1, dims, 4).expect_sound("fewer vectors than dimensions");
  Learned(Floats(4 * dims, 3e38f), q, 1, dims, 4).expect_sound("huge keys");
  Learned(Floats(4 * dims, 1e-40f), q, 1, dims, 4).expect_sound("subnormal keys");
  Learned(Floats(4 * dims, NAN), q, 1, dims, 4).expect_sound("no finite key");
  Floats x = uneven(1, 100, dims, 13);
  for (size_t i = 3; i < x.size(); i += dims) x[i] = 0.0f;
  Learned(x, q, 1, dims, 4).expect_sound("a constant channel");
  Learned(x, Floats(dims, 0.0f), 1, dims, 4).expect_sound("zero queries");
  Floats odd = q;
  odd[0] = NAN;
  odd[1] = INFINITY;
  odd[2] = -1.0f;
  odd[3] = 0.0f;
  Learned(x, odd, 1, dims, 4).expect_sound("moments that are none");
  // Rows that are not finite are left out.
  Floats dirty = x;
  dirty.insert(dirty.end(), dims, 1.0f);
  dirty[100 * dims + 5] = -INFINITY;
  EXPECT_EQ(Learned(dirty, q, 1, dims, 4).rotation, Learned(x, q, 1, dims, 4).rotation);
}

TEST(LearnedRotation, ReadsHalfPrecisionAndStrides) {
  const int64_t heads = 2, tokens = 60, dims = 8;
  const Floats x = uneven(heads, tokens, dims, 14);
  std::vector<uint16_t> halves(x.size());  // [N][H][D]
  Floats rounded(x.size());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < dims; ++i) {
        const uint16_t half = f32_to_f16(x[(h * tokens + t) * dims + i]);
        halves[(t * heads + h) * dims + i] = half;
        rounded[(h * tokens + t) * dims + i] = f16_to_f32(half);
      }
    }
  }
  TensorView view(halves.data(), DType::float16, {heads, tokens, dims});
  view.stride = {dims, heads * dims, 1};
  Floats rotation(heads * dims * dims), weight(heads * dims);
  learned_rotation(view, {}, 2, 2,
                   MutableTensorView(rotation.data(), DType::float32, {heads, dims, dims}),
                   MutableTensorView(weight.data(), DType::float32, {heads, dims}));
  EXPECT_EQ(rotation, Learned(rounded, {}, heads, dims, 2).rotation);
}

TEST(LearnedRotation, BadArgumentsAreErrors) {
  const Floats x(2 * 3 * 8, 1.0f);
  Floats cube(2 * 8 * 8), square(2 * 8, 1.0f);
  const TensorView view(x.data(), DType::float32, {2, 3, 8});
  const MutableTensorView u(cube.data(), DType::float32, {2, 8, 8});
  const MutableTensorView w(square.data(), DType::float32, {2, 8});
  const auto expect_error = [](const auto& call, const char* message) {
    try {
      call();
      ADD_FAILURE() << "no error, wanted one with " << message;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(message));
    }
  };
  expect_error([&] { learned_rotation({}, {}, 2, 2, u, w); }, "wanted [H, N, D]");
  expect_error([&] { learned_rotation(view, {}, 3, 2, u, w); }, "n_subvectors: got 3");
  expect_error([&] { learned_rotation(view, {}, 2, 3, u, w); }, "n_tables: got 3");
  expect_error([&] { learned_rotation(view, view, 2, 2, u, w); }, "query_moments: got");
  expect_error([&] { learned_rotation(view, {}, 2, 2, w, w); }, "rotation: got");
  expect_error([&] { learned_rotation(view, {}, 2, 2, u, {}); }, "weight: got");
  Floats counts(2 * 3, 1.0f);
  expect_error([&] { learned_rotation(view, {}, 2, 2, u, w, read_only(w)); },
               "token_weights: got float32 with 2 dimensions, wanted float32 [2, 3]");
  counts[4] = 0.0f;
  const TensorView tokens(counts.data(), DType::float32, {2, 3});
  expect_error([&] { learned_rotation(view, {}, 2, 2, u, w, tokens); }, "token_weights: got 0");
  expect_error([&] { rotation_matrices(read_only(w), read_only(w), u, u); }, "wanted [H, D, D]");
  square[3] = 0.0f;
  Floats encode(cube.size());
  const MutableTensorView e(encode.data(), DType::float32, {2, 8, 8});
  expect_error([&] { rotation_matrices(read_only(u), read_only(w), e, e); }, "weight: got 0");
}

// --------------------------------------------------------------------------- score error

constexpr int kSinks = 4;

// Keys or queries like those of a model: [n][128]. Eigenvalues 1 / i in a random basis, four
// channels ten times as large, RoPE of base 5e5. The first tokens are sinks.
class Family {
 public:
  static constexpr int kDims = 128;

  explicit Family(uint64_t seed) : random_(seed), basis_(random_.normal(kDims * kDims)) {
    for (int i = 0; i < kDims; ++i) {  // Gram-Schmidt: Haar distributed
      float* row = &basis_[i * kDims];
      for (int j = 0; j < i; ++j) subtract_projection(row, &basis_[j * kDims]);
      float norm = 0;
      for (int d = 0; d < kDims; ++d) norm += row[d] * row[d];
      for (int d = 0; d < kDims; ++d) row[d] /= std::sqrt(norm);
    }
  }

  Floats sample(int n, float sinks) {
    Floats out(static_cast<size_t>(n) * kDims, 0.0f);
    for (int t = 0; t < n; ++t) {
      float* x = &out[t * kDims];
      const Floats z = random_.normal(kDims);
      for (int i = 0; i < kDims; ++i) {
        const float amount = z[i] / std::sqrt(1.0f + i);
        for (int d = 0; d < kDims; ++d) x[d] += amount * basis_[i * kDims + d];
      }
      for (int channel : {5, 40, 77, 101}) x[channel] *= 10.0f;
      for (int i = 0; i < kDims / 2; ++i) {
        const double angle = t * std::pow(5e5, -2.0 * i / kDims);
        const float c = static_cast<float>(std::cos(angle)),
                    s = static_cast<float>(std::sin(angle));
        const float a = x[i], b = x[i + kDims / 2];
        x[i] = a * c - b * s;
        x[i + kDims / 2] = a * s + b * c;
      }
      for (int d = 0; t < kSinks && d < kDims; ++d) x[d] *= sinks;
    }
    return out;
  }

 private:
  static void subtract_projection(float* row, const float* unit) {
    float dot = 0;
    for (int d = 0; d < kDims; ++d) dot += row[d] * unit[d];
    for (int d = 0; d < kDims; ++d) row[d] -= dot * unit[d];
  }

  test::Random random_;
  Floats basis_;
};

// Mean (q . (k - k^))^2 at 2 bits (d4 x 256) over held-out keys and queries. Sinks are trained on,
// but a cache keeps them exact: they have no error.
double score_error(const Floats& train, const Transform& map, const Floats& keys,
                   const Floats& queries) {
  constexpr int kDims = Family::kDims, kParts = kDims / 4;
  std::vector<uint16_t> halves(kParts * 256 * 4);
  const MutableTensorView tables(halves.data(), DType::float16, {1, kParts, 256, 4});
  const int64_t n = static_cast<int64_t>(train.size()) / kDims;
  KMeansParams params;
  params.max_iterations = 10;
  train_vecinfer_tables(TensorView(train.data(), DType::float32, {1, n, kDims}), map, kParts,
                        kParts, params, tables);
  const CodecPtr codec = make_vecinfer_codec(Side::keys, 1, kDims, kParts, read_only(tables), map);
  Floats error = keys;
  std::vector<uint8_t> block(codec->block_bytes());
  const int64_t count = static_cast<int64_t>(keys.size()) / kDims;
  for (int64_t t = 0; t < count; t += 64) {
    Floats decoded(64 * kDims);
    codec->encode_block(default_backend(), {}, &keys[t * kDims], 64, block.data());
    codec->decode_block(default_backend(), {}, block.data(), 64, decoded.data(), kDims);
    codec->inverse(0, decoded.data(), 64);
    for (int i = 0; i < 64 * kDims; ++i) error[t * kDims + i] -= decoded[i];
  }
  double sum = 0;
  for (int64_t a = 0; a < static_cast<int64_t>(queries.size()) / kDims; ++a) {
    for (int64_t t = kSinks; t < count; ++t) {
      double dot = 0;
      for (int d = 0; d < kDims; ++d) dot += queries[a * kDims + d] * error[t * kDims + d];
      sum += dot * dot;
    }
  }
  return sum / (static_cast<double>(queries.size()) / kDims * static_cast<double>(count - kSinks));
}

TEST(LearnedRotation, HalvesTheScoreErrorOfHadamard) {
  constexpr int kDims = Family::kDims;
  for (uint64_t seed : {1, 2, 3}) {
    Family key_family(seed), query_family(seed + 100);
    const Floats train = key_family.sample(8192, 20.0f), keys = key_family.sample(2048, 20.0f);
    Floats q(kDims, 0.0f);
    const Floats train_queries = query_family.sample(8192, 1.0f);
    for (size_t i = 0; i < train_queries.size(); ++i) {
      q[i % kDims] += train_queries[i] * train_queries[i] / 8192;
    }
    const Floats queries = query_family.sample(256, 1.0f);

    Floats lambda(kDims);
    const MutableTensorView scale(lambda.data(), DType::float32, {1, kDims});
    smooth_factors(TensorView(train.data(), DType::float32, {1, 8192, kDims}), scale);
    Transform hadamard;
    hadamard.kind = TransformKind::hadamard;
    hadamard.scale = read_only(scale);
    const Learned learned(train, q, 1, kDims, kDims / 4);
    const double theirs = score_error(train, hadamard, keys, queries);
    const double ours = score_error(train, learned.transform(), keys, queries);
    std::printf("seed %d: hadamard %.5f, learned %.5f, ratio %.3f\n", static_cast<int>(seed),
                theirs, ours, ours / theirs);
    EXPECT_LE(ours, 0.5 * theirs);
  }
}

}  // namespace
}  // namespace veloxquant
