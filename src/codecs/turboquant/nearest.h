// The nearest of up to 16 scalar centroids by comparisons alone, with the decisions of
// nearest_centroid (src/math/centroids.h), which squares a distance for every centroid.
//
// Between two neighbours a < b the rounded distance to a never falls and that to b never rises, so
// there is one smallest float from which b wins: the step. A code is the number of steps at or
// below x. Far away from the table, where rounding makes distances to several centroids equal, this
// does not hold: ScalarSteps::bound says up to where it does, what is beyond is compared directly.
#pragma once

#include <cstdint>

namespace veloxquant::turboquant {

constexpr int kMaxSteps = 15;

struct ScalarSteps {
  float step[kMaxSteps];        // ascending; +infinity from n_steps on
  int n_steps = 0;              // distinct centroids - 1
  uint8_t code[kMaxSteps + 1];  // of the value between the steps, for every count
  bool ascending = true;        // code[i] == i
  float bound = 0.0f;           // of |x|
  const float* centroids = nullptr;
  int n_centroids = 0;
};

// False where comparisons cannot serve: more than 16 centroids, some not finite, or so close to
// each other that rounding decides. `centroids` must outlive the steps.
bool find_steps(const float* centroids, int n_centroids, ScalarSteps& steps);

// codes[i] = nearest_centroid of x[i], on the CPU kernels.
void nearest_by_steps(const ScalarSteps& steps, const float* x, int64_t n, uint8_t* codes);

// The same of H (diag * row) / sqrt(dim), rows [n_rows][dim]; dim a power of two.
void nearest_of_hadamard_by_steps(const ScalarSteps& steps, const float* rows, int64_t n_rows,
                                  int dim, const float* diag, uint8_t* codes);

}  // namespace veloxquant::turboquant
