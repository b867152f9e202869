#include "src/codecs/rotation.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/codecs/rotation.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "src/codecs/hadamard-inl.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant::HWY_NAMESPACE {

void rotate_rows(const float* signs, int head_dim, bool back, float* scratch, float* rows,
                 int64_t n) {
  const int step = rotation_step(head_dim);
  for (int64_t r = 0; r < n; ++r) {
    float* x = rows + r * head_dim;
    if (back) {
      rotate_row_back_simd(signs, head_dim, step, x, scratch);
    } else {
      rotate_row_simd(signs, head_dim, step, x, scratch);
    }
  }
}

void transform_rows(int head_dim, float* rows, int64_t n) {
  for (int64_t r = 0; r < n; ++r) hadamard_signed_row(rows + r * head_dim, head_dim, nullptr);
}

}  // namespace veloxquant::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "src/backends/cpu/simd_targets.h"
#include "src/math/random.h"
#include "veloxquant/error.h"

namespace veloxquant {

HWY_EXPORT(rotate_rows);
HWY_EXPORT(transform_rows);

Rotation::Rotation(int head_dim, uint64_t seed) : dim_(head_dim) {
  require(head_dim >= 1, "[rotation] head_dim: got ", head_dim, ", wanted at least 1");
  for (uint64_t round = 0; round < 2; ++round) {
    SplitMix64 random(seed, round);
    for (int i = 0; i < head_dim; ++i) signs_.push_back(random.next() >> 63 ? 1.0f : -1.0f);
  }
}

void Rotation::forward(Backend backend, float* rows, int64_t n) const {
  std::vector<float> scratch(dim_);
  if (backend == Backend::cpu) {
    cpu::apply_environment();
    HWY_DYNAMIC_DISPATCH(rotate_rows)(signs(), dim_, false, scratch.data(), rows, n);
    return;
  }
  for (int64_t r = 0; r < n; ++r) rotate_row(signs(), dim_, rows + r * dim_, scratch.data());
}

void Rotation::inverse(Backend backend, float* rows, int64_t n) const {
  std::vector<float> scratch(dim_);
  if (backend == Backend::cpu) {
    cpu::apply_environment();
    HWY_DYNAMIC_DISPATCH(rotate_rows)(signs(), dim_, true, scratch.data(), rows, n);
    return;
  }
  for (int64_t r = 0; r < n; ++r) rotate_row_back(signs(), dim_, rows + r * dim_, scratch.data());
}

void hadamard_rows(Backend backend, int head_dim, float* rows, int64_t n) {
  if (backend == Backend::cpu) {
    cpu::apply_environment();
    HWY_DYNAMIC_DISPATCH(transform_rows)(head_dim, rows, n);
    return;
  }
  for (int64_t r = 0; r < n; ++r) hadamard_row(rows + r * head_dim, head_dim);
}

}  // namespace veloxquant
#endif  // HWY_ONCE
