#include "src/codecs/qjl/sketch.h"

#include <algorithm>
#include <cmath>

#include "src/codecs/qjl/kernels.h"
#include "src/codecs/vecinfer/kernels.h"
#include "src/math/random.h"
#include "src/math/rotation.h"

namespace veloxquant::qjl {
namespace {

void multiply_row(float* row, float factor) {
  for (int t = 0; t < kBlockTokens; ++t) row[t] = mul(row[t], factor);
}

// Rotation::inverse of the 64 columns of a tile: rotate_row_back() with rows of the tile for
// coordinates.
void rotate_tile_back(Backend backend, const Rotation& rotation, float* x_t,
                      std::vector<float>& scratch) {
  const auto hadamard = vecinfer::kernels_of(backend).hadamard_tile;
  const int dim = rotation.head_dim(), step = rotation_step(dim);
  const float* signs = rotation.signs();
  hadamard(nullptr, dim, x_t);
  std::copy(x_t, x_t + static_cast<size_t>(dim) * kBlockTokens, scratch.data());
  for (int i = 0, from = 0; i < dim; ++i, from = (from + step) % dim) {
    float* row = x_t + i * kBlockTokens;
    std::copy_n(scratch.data() + from * kBlockTokens, kBlockTokens, row);
    multiply_row(row, signs[dim + from]);
  }
  hadamard(nullptr, dim, x_t);
  for (int i = 0; i < dim; ++i) multiply_row(x_t + i * kBlockTokens, signs[i]);
}

}  // namespace

Rotation sketch_rotation(int head_dim, uint64_t seed, int block) {
  // Streams 0 and 1 of a seed are those of Rotation(head_dim, seed) itself.
  return Rotation(head_dim, SplitMix64(seed, 2 + static_cast<uint64_t>(block)).next());
}

Sketch Sketch::structured(int head_dim, int m, uint64_t seed, int first_block) {
  Sketch sketch;
  sketch.dim_ = head_dim;
  sketch.m_ = m;
  sketch.constant_ = static_cast<float>(kRootHalfPi / m * std::sqrt(double(head_dim)));
  for (int block = 0; block < m / head_dim; ++block) {
    sketch.rotations_.push_back(sketch_rotation(head_dim, seed, first_block + block));
  }
  return sketch;
}

Sketch Sketch::dense(int head_dim, int m, const float* matrix) {
  Sketch sketch;
  sketch.dim_ = head_dim;
  sketch.m_ = m;
  sketch.constant_ = static_cast<float>(kRootHalfPi / m);
  sketch.matrix_.assign(matrix, matrix + static_cast<size_t>(m) * head_dim);
  sketch.transposed_.resize(sketch.matrix_.size());
  for (int j = 0; j < m; ++j) {
    for (int d = 0; d < head_dim; ++d) {
      sketch.transposed_[static_cast<size_t>(d) * m + j] = matrix[j * head_dim + d];
    }
  }
  return sketch;
}

void Sketch::signs(Backend backend, const float* rows, uint8_t* planes) const {
  const size_t tile_size = static_cast<size_t>(dim_) * kBlockTokens;
  std::vector<float> tile(tile_size);
  float squares[kBlockTokens], sums[kBlockTokens], levels[kBlockTokens];
  const auto encode = rabitq::levels_of(backend).encode;
  if (!is_structured()) {
    rabitq::to_tile(rows, kBlockTokens, dim_, tile.data());
    std::vector<float> sketched(static_cast<size_t>(m_) * kBlockTokens);
    project_of(backend)(matrix_.data(), m_, dim_, tile.data(), sketched.data());
    encode(sketched.data(), m_, 1, planes, squares, sums, levels);
    return;
  }
  for (const Rotation& rotation : rotations_) {
    std::vector<float> moved(rows, rows + tile_size);
    rotation.forward(backend, moved.data(), kBlockTokens);
    rabitq::to_tile(moved.data(), kBlockTokens, dim_, tile.data());
    encode(tile.data(), dim_, 1, planes, squares, sums, levels);
    planes += rabitq::plane_bytes(dim_, 1);
  }
}

void Sketch::project(const float* rows, int n, float* to) const {
  if (!is_structured()) {
    for (int r = 0; r < n; ++r) {
      for (int j = 0; j < m_; ++j) {
        float sum = 0.0f;
        for (int d = 0; d < dim_; ++d) sum += mul(matrix_[j * dim_ + d], rows[r * dim_ + d]);
        to[static_cast<int64_t>(r) * m_ + j] = sum;
      }
    }
    return;
  }
  std::vector<float> moved(static_cast<size_t>(n) * dim_);
  for (size_t block = 0; block < rotations_.size(); ++block) {
    std::copy(rows, rows + moved.size(), moved.data());
    rotations_[block].forward(Backend::cpu, moved.data(), n);
    for (int r = 0; r < n; ++r) {
      std::copy_n(moved.data() + r * dim_, dim_,
                  to + static_cast<int64_t>(r) * m_ + static_cast<int64_t>(block) * dim_);
    }
  }
}

void Sketch::back(Backend backend, const uint8_t* planes, float* x_t) const {
  const auto decode = rabitq::levels_of(backend).decode;
  if (!is_structured()) {
    std::vector<float> sign_tile(static_cast<size_t>(m_) * kBlockTokens);
    decode(planes, m_, 1, nullptr, nullptr, sign_tile.data());
    project_of(backend)(transposed_.data(), dim_, m_, sign_tile.data(), x_t);
    return;
  }
  const size_t tile_size = static_cast<size_t>(dim_) * kBlockTokens;
  std::vector<float> tile(tile_size), scratch(tile_size);
  for (size_t block = 0; block < rotations_.size(); ++block) {
    float* part = block == 0 ? x_t : tile.data();
    decode(planes, dim_, 1, nullptr, nullptr, part);
    rotate_tile_back(backend, rotations_[block], part, scratch);
    planes += rabitq::plane_bytes(dim_, 1);
    if (block == 0) continue;
    for (size_t i = 0; i < tile_size; ++i) x_t[i] += tile[i];
  }
}

}  // namespace veloxquant::qjl
