// What a backend implements for QJL; levels and planes come from rabitq.
#pragma once

#include "src/codecs/rabitq/levels.h"

namespace veloxquant::qjl {

constexpr double kRootHalfPi = 1.2533141373155002512;  // sqrt(pi / 2)

// y_t[j][t] = sum_i matrix[j][i] x_t[i][t], ascending i. Tiles of 64 columns.
using ProjectTile = void (*)(const float* matrix, int n_rows, int n_columns, const float* x_t,
                             float* y_t);

ProjectTile reference_project();
ProjectTile cpu_project();
inline ProjectTile project_of(Backend backend) {
  return backend == Backend::reference ? reference_project() : cpu_project();
}

// norms[t] = |column t|, ascending sum of squares.
void column_norms(const float* x_t, int dim, float* norms);

}  // namespace veloxquant::qjl
