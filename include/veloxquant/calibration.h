// Fitting smooth factors, rotations and codebooks to calibration keys and values. Deterministic by
// seed, independent of the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "veloxquant/tensor_view.h"
#include "veloxquant/vecinfer.h"

namespace veloxquant {

// lambda_i = sqrt(max_t |x[t, i]|) per KV head and channel (arXiv 2510.06175, eq. 4).
// x: [H, N, D], any float dtype, any strides. lambda: fp32 [H, D]. max|x| is floored at
// `floor` times the head's largest channel (dead channels) and at 1e-8; non-finite x is ignored.
void smooth_factors(const TensorView& x, const MutableTensorView& lambda, float floor = 1e-4f);

// The learned rotation, per KV head: U' [D, D] is orthogonal, its columns the eigenvectors of
// W C W dealt out to the sub-vectors so that their volumes balance; C is the covariance, W =
// diag(w) the metric of the scores, w_i = sqrt(E q_i^2) over its mean, at least 1e-3. Scaling keys
// or queries by a power of two changes no bit of it. x: [H, N, D], any float dtype, any strides;
// tokens with NaN or infinity are left out. query_moments: E q_i^2 of the queries of each KV head,
// fp32 [H, D]; empty means w = 1 (values). n_tables: tables of a head; sub-vector m will use table
// m % n_tables, and those that share one get directions alike, and the same mean.
// rotation: fp32 [H, D, D]. weight: fp32 [H, D]. token_weights: as in train_vecinfer_tables.
void learned_rotation(const TensorView& x, const TensorView& query_moments, int n_subvectors,
                      int n_tables, const MutableTensorView& rotation,
                      const MutableTensorView& weight, const TensorView& token_weights = {});

// The dense Transform of a learned rotation: E = W U', F = W^-1 U'. One rounding an element, so
// that files keep U' and w alone. rotation, encode_matrix, query_matrix: fp32 [H, D, D];
// weight: fp32 [H, D]. Throws Error where a weight is not positive or a number not finite.
void rotation_matrices(const TensorView& rotation, const TensorView& weight,
                       const MutableTensorView& encode_matrix,
                       const MutableTensorView& query_matrix);

// Where Lloyd's iterations start.
enum class KMeansStart {
  plus_plus,  // k-means++ on the vectors
  normal,     // centroids of N(0, I), moved to the mean and deviation of each dimension: with few
              // vectors a centroid this over-fits less, and 6 iterations do
};

struct KMeansParams {
  int n_centroids = 256;
  KMeansStart start = KMeansStart::plus_plus;
  int max_iterations = 30;
  uint64_t seed = 0;
  double tolerance = 1e-5;  // stop when the relative fall of the error is smaller
};

struct KMeansResult {
  std::vector<float> centroids;  // [C][d]
  double mse_per_dim = 0;        // mean squared error per element on the training vectors
  int iterations = 0;
};

// Seeding, then Lloyd; empty clusters are re-seeded from the vectors that are farthest
// from their centroid. x: fp32 [d][n] dimension-major. n >= 1; n < C repeats vectors. weights: [n],
// how much the squared error of each vector counts; null: 1.
KMeansResult kmeans(const float* x, int64_t x_stride, int64_t n, int sub_dim,
                    const KMeansParams& params, const float* weights = nullptr);

struct TableReport {
  // Per KV head: sum w |y - y^|^2 / sum w |y|^2 over the training vectors, with the rounded tables.
  std::vector<double> relative_error;
};

// One k-means problem sees at most this many vectors: a random one out of each of as many equal
// ranges, by seed. For 256 centroids, 16k vectors lose 2 % to 65k, and 200k gain less than 1 %.
constexpr int64_t kMaxTrainingVectors = 65536;

// What the entries of a table may be. int8: integers of -127 to 127 times one power of two a
// table, which fp16 holds exactly; GPUs look such tables up fastest.
enum class TableEntries { fp16, int8 };

// Trains the tables of one side of one layer on x: [H, N, D] (original coordinates; transformed
// here; tokens with NaN or infinity are left out). n_tables: of a head; sub-vector m uses table
// m % n_tables. tables: fp16 [H, n_tables, C, D / n_subvectors]. `progress` (may be empty) is
// called from any thread with the fraction done. token_weights: how much the squared error of each
// token counts, positive, fp32 [H, N]; empty: 1.
TableReport train_vecinfer_tables(const TensorView& x, const Transform& transform, int n_subvectors,
                                  int n_tables, const KMeansParams& params,
                                  const MutableTensorView& tables,
                                  const std::function<void(double)>& progress = {},
                                  TableEntries entries = TableEntries::fp16,
                                  const TensorView& token_weights = {});

}  // namespace veloxquant
