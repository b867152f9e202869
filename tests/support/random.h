// Seeded random data and codecs for tests: the same numbers on every machine.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "src/math/float16.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  float normal() {
    double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
  }
  std::vector<float> normal(int64_t n) {
    std::vector<float> values(n);
    for (float& v : values) v = normal();
    return values;
  }

 private:
  uint64_t state_;
};

// A codec together with the arrays it views.
struct OwnedCodec {
  std::vector<uint16_t> tables;
  std::vector<float> scale, encode_matrix, query_matrix;
  CodecPtr codec;
};

// Random tables of unit variance; lambda log-uniform in [1e-2, 1e2]; dense: an orthogonal matrix
// (a Householder reflection) between two diagonal scalings, so that F = E^-T is known exactly.
inline OwnedCodec random_codec(Random& random, Side side, int heads, int head_dim, int n_subvectors,
                               int n_centroids, bool per_head, TransformKind kind) {
  OwnedCodec owned;
  const int sub_dim = head_dim / n_subvectors, groups = per_head ? 1 : n_subvectors;
  for (int i = 0; i < heads * groups * n_centroids * sub_dim; ++i) {
    owned.tables.push_back(f32_to_f16(random.normal()));
  }
  Transform transform;
  transform.kind = kind;
  if (kind == TransformKind::hadamard) {
    for (int i = 0; i < heads * head_dim; ++i) {
      owned.scale.push_back(static_cast<float>(std::pow(10.0, 4.0 * random.uniform() - 2.0)));
    }
    transform.scale = TensorView(owned.scale.data(), DType::float32, {heads, head_dim});
  }
  if (kind == TransformKind::dense) {
    for (int h = 0; h < heads; ++h) {
      std::vector<float> v = random.normal(head_dim), w(head_dim);
      double norm = 0;
      for (float x : v) norm += double(x) * x;
      for (float& x : w) x = static_cast<float>(std::pow(4.0, 2.0 * random.uniform() - 1.0));
      for (int i = 0; i < head_dim; ++i) {
        for (int j = 0; j < head_dim; ++j) {
          double u = (i == j ? 1.0 : 0.0) - 2.0 * v[i] * v[j] / norm;
          owned.encode_matrix.push_back(static_cast<float>(u * w[i]));
          owned.query_matrix.push_back(static_cast<float>(u / w[i]));
        }
      }
    }
    transform.encode_matrix =
        TensorView(owned.encode_matrix.data(), DType::float32, {heads, head_dim, head_dim});
    transform.query_matrix =
        TensorView(owned.query_matrix.data(), DType::float32, {heads, head_dim, head_dim});
  }
  owned.codec = make_vecinfer_codec(
      side, heads, head_dim, n_subvectors,
      TensorView(owned.tables.data(), DType::float16, {heads, groups, n_centroids, sub_dim}),
      transform);
  return owned;
}

}  // namespace veloxquant::test
