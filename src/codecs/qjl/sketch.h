// The sketch of a QJL codec: stacked rotations, or a matrix that was given.
#pragma once

#include <cstdint>
#include <vector>

#include "src/codecs/rotation.h"
#include "veloxquant/backend.h"
#include "veloxquant/tensor_view.h"

namespace veloxquant::qjl {

// Block `block` of the structured sketch of a seed, independent of all others and of the rotations
// that other codecs make from the same seed.
Rotation sketch_rotation(int head_dim, uint64_t seed, int block);

class Sketch {
 public:
  Sketch() = default;
  // m / head_dim stacked rotations, from block `first_block` on.
  static Sketch structured(int head_dim, int m, uint64_t seed, int first_block);
  // The first m rows of a row-major fp32 [>= m, head_dim].
  static Sketch dense(int head_dim, int m, const float* matrix);

  int m() const { return m_; }
  bool is_structured() const { return !rotations_.empty(); }
  const Rotation& rotation() const { return rotations_.front(); }
  // sqrt(pi/2) / m, times the length of a row of S where the rotations stand for it.
  float score_constant() const { return constant_; }

  // planes[j] = signs of row j of S times each of 64 rows of fp32 [64][head_dim].
  void signs(Backend backend, const float* rows, uint8_t* planes) const;
  // to[r][j] = <S_j, rows[r]>, rows of length 1 for a structured S; fp32 [n][m].
  void project(const float* rows, int n, float* to) const;
  // x_t[d][t] = sum_j S_jd sign_jt, rows of length 1 for a structured S.
  void back(Backend backend, const uint8_t* planes, float* x_t) const;

 private:
  int dim_ = 0;
  int m_ = 0;
  float constant_ = 0.0f;
  std::vector<Rotation> rotations_;
  std::vector<float> matrix_, transposed_;  // [m][dim], [dim][m]
};

}  // namespace veloxquant::qjl
