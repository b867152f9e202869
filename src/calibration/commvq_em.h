// EM of one stage of CommVQ, apart so that tests can look at single steps.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/commvq.h"

namespace veloxquant {

// What one stage has to encode: tiles of 64 vectors in planes [2][pairs][64]; vectors beyond
// `count` are padding.
struct StageVectors {
  int n_pairs = 0;
  int64_t count = 0;
  std::vector<float> tiles;

  int64_t n_tiles() const { return (count + 63) / 64; }
  int64_t tile_size() const { return 2 * int64_t{n_pairs} * 64; }
  float* tile(int64_t i) { return tiles.data() + i * tile_size(); }
  const float* tile(int64_t i) const { return tiles.data() + i * tile_size(); }
  double energy() const;  // sum of squares
};

// The sufficient statistics of an assignment. Entry l = (x, y), z = x + iy; centre (a, b) = z_a + i
// z_b.
struct StageMoments {
  std::vector<double> joint;  // [N][N]: sum of weights of (a, b)
  std::vector<double> as_a;   // [N][2][pairs]: sum of weight * vector over a = l
  std::vector<double> as_b;   // the same over b = l
  double error = 0;           // sum of weight * |v - centre|^2
  double nearest_error = 0;   // sum of |v - nearest centre|^2
};

// E step: weights softmax(-|v - c_ab|^2 / temperature) per vector; those below e^-12 of the largest
// are dropped, so that few of the N^2 centres are looked at. entries: fp32 [N][2][pairs].
StageMoments soft_assignment(const StageVectors& vectors, const std::vector<float>& entries,
                             int n_entries, double temperature);

// M step: the entries that minimise the weighted error of an assignment, in closed form. Entries
// that nothing is assigned to stay where they are.
void refit_entries(const StageMoments& moments, int n_pairs, std::vector<float>& entries);

// The weighted error that an assignment would have with other entries; `energy` is that of the
// vectors.
double weighted_error(const StageMoments& moments, int n_pairs, double energy,
                      const std::vector<float>& entries);

}  // namespace veloxquant
