// k-means on the nearest-centroid kernel of the codec: the assignment that training minimises is
// the one that encoding makes. Sums are in double and in a fixed order.
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>

#include "src/calibration/lloyd.h"
#include "src/calibration/random.h"
#include "veloxquant/backend.h"

namespace veloxquant {
namespace {

// Vectors per partial sum of the seeding: a draw walks these first, then one block.
constexpr int64_t kBlock = 1024;

// distance[t] of the n vectors from `start` on becomes what it counts.
void weigh(const Vectors& x, int64_t start, int64_t n, float* distance) {
  if (x.weights == nullptr) return;
  for (int64_t t = 0; t < n; ++t) distance[t] *= x.weights[start + t];
}

// Lowers `nearest` to the distances from `centroid`, block by block.
void add_centroid(const Vectors& x, const float* centroid, std::vector<float>& nearest,
                  std::vector<double>& block_sums) {
  float distance[kBlock];
  uint16_t codes[kBlock];
  for (size_t b = 0; b < block_sums.size(); ++b) {
    const int64_t start = static_cast<int64_t>(b) * kBlock;
    const int64_t n = std::min(kBlock, x.n - start);
    nearest_centroids(default_backend(), x.at(0, start), x.stride, n, centroid, 1, x.sub_dim, codes,
                      distance);
    weigh(x, start, n, distance);
    float* block = nearest.data() + start;
    // Sixteen sums side by side, so that the compiler may use vectors without changing their order.
    constexpr int kLanes = 16;
    float sums[kLanes] = {};
    int64_t t = 0;
    for (; t + kLanes <= n; t += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        block[t + k] = distance[t + k] < block[t + k] ? distance[t + k] : block[t + k];
        sums[k] += block[t + k];
      }
    }
    for (int k = 0; t < n; ++t, ++k) {
      block[t] = std::min(block[t], distance[t]);
      sums[k] += block[t];
    }
    block_sums[b] = std::accumulate(sums, sums + kLanes, 0.0);
  }
}

// The vector at which the running sum of `nearest` passes u * total; its distance is not 0.
int64_t draw(const std::vector<float>& nearest, const std::vector<double>& block_sums, double total,
             double u) {
  double target = u * total;
  size_t b = 0;
  while (b + 1 < block_sums.size() && target >= block_sums[b]) target -= block_sums[b++];
  int64_t last = -1;
  const int64_t n = static_cast<int64_t>(nearest.size());
  for (int64_t t = static_cast<int64_t>(b) * kBlock; t < n; ++t) {
    if (nearest[t] <= 0.0f) continue;
    last = t;
    target -= nearest[t];
    if (target < 0.0) return t;
  }
  if (last >= 0) return last;
  // Rounding led past the last vector with a distance.
  return std::max_element(nearest.begin(), nearest.end()) - nearest.begin();
}

// Gives each empty cluster the vector that is farthest from its centroid, among those that do not
// leave another cluster empty. Returns how many got one.
int fill_empty_clusters(const std::vector<float>& distance, std::vector<uint16_t>& codes,
                        std::vector<int64_t>& counts) {
  if (std::find(counts.begin(), counts.end(), 0) == counts.end()) return 0;
  std::vector<int64_t> farthest(distance.size());
  std::iota(farthest.begin(), farthest.end(), int64_t{0});
  std::sort(farthest.begin(), farthest.end(), [&](int64_t a, int64_t b) {
    return distance[a] != distance[b] ? distance[a] > distance[b] : a < b;
  });
  int filled = 0;
  auto next = farthest.begin();
  for (size_t c = 0; c < counts.size(); ++c) {
    if (counts[c] != 0) continue;
    while (next != farthest.end() && counts[codes[*next]] <= 1) ++next;
    if (next == farthest.end() || distance[*next] <= 0.0f) break;
    --counts[codes[*next]];
    codes[*next] = static_cast<uint16_t>(c);
    counts[c] = 1;
    ++next;
    ++filled;
  }
  return filled;
}

// Clusters that stay empty (fewer distinct vectors than centroids) keep their centroid.
void move_to_means(const Vectors& x, const std::vector<uint16_t>& codes,
                   const std::vector<int64_t>& counts, std::vector<float>& centroids) {
  std::vector<double> sums(centroids.size(), 0.0), masses(counts.size(), 0.0);
  for (int64_t t = 0; t < x.n; ++t) {
    const double weight = x.weight(t);
    double* sum = sums.data() + static_cast<size_t>(codes[t]) * x.sub_dim;
    for (int i = 0; i < x.sub_dim; ++i) sum[i] += weight * *x.at(i, t);
    masses[codes[t]] += weight;
  }
  for (size_t c = 0; c < counts.size(); ++c) {
    if (counts[c] == 0) continue;
    for (int i = 0; i < x.sub_dim; ++i) {
      const size_t at = c * x.sub_dim + i;
      centroids[at] = static_cast<float>(sums[at] / masses[c]);
    }
  }
}

}  // namespace

namespace {

// The vector at which the running sum of the weights passes u times all of them.
int64_t weighted_index(const Vectors& x, double u) {
  double target = u * std::accumulate(x.weights, x.weights + x.n, 0.0);
  for (int64_t t = 0; t < x.n; ++t) {
    target -= x.weights[t];
    if (target < 0.0) return t;
  }
  return x.n - 1;
}

}  // namespace

std::vector<float> seed_centroids(const Vectors& x, int n_centroids, uint64_t seed) {
  SplitMix64 random(seed, 0);
  std::vector<float> centroids(static_cast<size_t>(n_centroids) * x.sub_dim);
  std::vector<float> nearest(x.n, INFINITY);
  std::vector<double> block_sums((x.n + kBlock - 1) / kBlock);
  int64_t chosen = x.weights == nullptr ? random.index(x.n) : weighted_index(x, random.uniform());
  for (int c = 0; c < n_centroids; ++c) {
    if (c > 0) {
      const double total = std::accumulate(block_sums.begin(), block_sums.end(), 0.0);
      // No distance left: fewer distinct vectors than centroids.
      chosen = total > 0.0 ? draw(nearest, block_sums, total, random.uniform()) : c % x.n;
    }
    float* centroid = centroids.data() + static_cast<size_t>(c) * x.sub_dim;
    for (int i = 0; i < x.sub_dim; ++i) centroid[i] = *x.at(i, chosen);
    add_centroid(x, centroid, nearest, block_sums);
  }
  return centroids;
}

namespace {

// Trained once for each (C, d) of a process, on sums of 12 uniform numbers: no function of the
// maths library, whose last bits differ between machines. Not under the lock: a thread that waits
// for its own parallel work may take up another k-means, which would wait for the lock. Two threads
// that train at once find the same.
std::vector<float> standard_normal_centroids(int n_centroids, int sub_dim) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, std::vector<float>> known;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({n_centroids, sub_dim});
    if (found != known.end()) return found->second;
  }
  constexpr int64_t kPerCentroid = 64, kMost = 65536;
  const int64_t n = std::min(kMost, kPerCentroid * n_centroids);
  std::vector<float> x(n * sub_dim);
  SplitMix64 random(0, 0);
  for (float& value : x) {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += random.uniform();
    value = static_cast<float>(sum);
  }
  KMeansParams params;
  params.n_centroids = n_centroids;
  params.max_iterations = 20;
  int reseeded = 0;
  const Vectors vectors{x.data(), n, n, sub_dim};
  std::vector<float> centroids =
      lloyd(vectors, seed_centroids(vectors, n_centroids, 0), params, &reseeded).centroids;
  const std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(std::pair(n_centroids, sub_dim), std::move(centroids)).first->second;
}

}  // namespace

std::vector<float> normal_centroids(const Vectors& x, int n_centroids) {
  std::vector<float> centroids = standard_normal_centroids(n_centroids, x.sub_dim);
  for (int i = 0; i < x.sub_dim; ++i) {
    double sum = 0, squares = 0, mass = 0;
    for (int64_t t = 0; t < x.n; ++t) {
      sum += x.weight(t) * *x.at(i, t);
      mass += x.weight(t);
    }
    const double mean = sum / mass;
    for (int64_t t = 0; t < x.n; ++t) {
      squares += x.weight(t) * ((*x.at(i, t) - mean) * (*x.at(i, t) - mean));
    }
    const double deviation = std::sqrt(squares / mass);
    for (int c = 0; c < n_centroids; ++c) {
      float& value = centroids[static_cast<size_t>(c) * x.sub_dim + i];
      value = static_cast<float>(mean + deviation * value);
    }
  }
  return centroids;
}

KMeansResult lloyd(const Vectors& x, std::vector<float> centroids, const KMeansParams& params,
                   int* reseeded) {
  std::vector<uint16_t> codes(x.n);
  std::vector<float> distance(x.n);
  const auto assign = [&] {
    nearest_centroids(default_backend(), x.data, x.stride, x.n, centroids.data(),
                      params.n_centroids, x.sub_dim, codes.data(), distance.data());
    weigh(x, 0, x.n, distance.data());
    return std::accumulate(distance.begin(), distance.end(), 0.0);
  };
  KMeansResult result;
  double error = assign();
  while (result.iterations < params.max_iterations && error > 0.0) {
    std::vector<int64_t> counts(params.n_centroids, 0);
    for (uint16_t code : codes) ++counts[code];
    // A centroid of the normal start is worth more where it is than on a single vector.
    const bool reseed = params.start == KMeansStart::plus_plus;
    const int filled = reseed ? fill_empty_clusters(distance, codes, counts) : 0;
    *reseeded += filled;
    move_to_means(x, codes, counts, centroids);
    ++result.iterations;
    const double previous = error;
    error = assign();
    if (filled == 0 && previous - error <= params.tolerance * previous) break;
  }
  double mass = 0;
  for (int64_t t = 0; t < x.n; ++t) mass += x.weight(t);
  result.mse_per_dim = error / (mass * x.sub_dim);
  result.centroids = std::move(centroids);
  return result;
}

KMeansResult kmeans(const float* x, int64_t x_stride, int64_t n, int sub_dim,
                    const KMeansParams& params, const float* weights) {
  constexpr int kMaxSubDim = 64, kMaxCentroids = 65536;
  require(sub_dim >= 1 && sub_dim <= kMaxSubDim, "[kmeans] sub_dim: got ", sub_dim, ", wanted 1..",
          kMaxSubDim);
  require(x != nullptr && n >= 1 && x_stride >= n, "[kmeans] x: got ", n, " vectors, stride ",
          x_stride, ", wanted at least 1 vector and a stride not below their number");
  require(params.n_centroids >= 1 && params.n_centroids <= kMaxCentroids,
          "[kmeans] n_centroids: got ", params.n_centroids, ", wanted 1..", kMaxCentroids);
  require(params.max_iterations >= 0 && params.tolerance >= 0.0, "[kmeans] got max_iterations ",
          params.max_iterations, " and tolerance ", params.tolerance, ", wanted neither below 0");
  const Vectors vectors{x, x_stride, n, sub_dim, weights};
  for (int64_t t = 0; weights != nullptr && t < n; ++t) {
    require(weights[t] > 0.0f && std::isfinite(weights[t]), "[kmeans] weights: got ", weights[t],
            ", wanted finite positive ones");
  }
  for (int i = 0; i < sub_dim; ++i) {
    require(
        std::all_of(vectors.at(i, 0), vectors.at(i, n), [](float v) { return std::isfinite(v); }),
        "[kmeans] x: got NaN or infinity in dimension ", i, ", wanted finite values");
  }
  int reseeded = 0;
  std::vector<float> start = params.start == KMeansStart::normal
                                 ? normal_centroids(vectors, params.n_centroids)
                                 : seed_centroids(vectors, params.n_centroids, params.seed);
  return lloyd(vectors, std::move(start), params, &reseeded);
}

}  // namespace veloxquant
