// The two halves of kmeans(), apart so that tests can start Lloyd from chosen centroids.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/calibration.h"

namespace veloxquant {

// Training vectors, fp32 [sub_dim][n], dimension-major. weights: [n], how much the squared error of
// each counts; null: 1.
struct Vectors {
  const float* data = nullptr;
  int64_t stride = 0;
  int64_t n = 0;
  int sub_dim = 0;
  const float* weights = nullptr;

  double weight(int64_t t) const { return weights == nullptr ? 1.0 : weights[t]; }

  const float* at(int dim, int64_t t) const { return data + dim * stride + t; }
};

// k-means++ (Arthur, Vassilvitskii 2007): each centroid is a vector drawn with probability
// proportional to its squared distance from the centroids so far. Returns [C][d].
std::vector<float> seed_centroids(const Vectors& x, int n_centroids, uint64_t seed);

// Centroids of N(0, I), scaled to the mean and standard deviation of each dimension of x. [C][d].
std::vector<float> normal_centroids(const Vectors& x, int n_centroids);

// Lloyd's iterations from `centroids` [C][d]. `reseeded` counts the empty clusters that were
// given a vector.
KMeansResult lloyd(const Vectors& x, std::vector<float> centroids, const KMeansParams& params,
                   int* reseeded);

}  // namespace veloxquant
