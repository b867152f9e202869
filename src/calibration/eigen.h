// Eigen for the calibration, in a namespace of our own and without SIMD.
//
// Scalar, so that the order of sums, and with it the bits of a rotation, does not depend on the
// SIMD level that the library was compiled for. Renamed, because a program that links this static
// library may use Eigen with other settings, and the linker would mix the two instances of the same
// templates.
#pragma once

#ifdef EIGEN_WORLD_VERSION
#error "include src/calibration/eigen.h before any header of Eigen"
#endif
#define EIGEN_DONT_VECTORIZE
#define EIGEN_DONT_PARALLELIZE
#define Eigen veloxquant_eigen
#include <Eigen/Eigenvalues>
#undef Eigen

namespace veloxquant {
using Matrix = veloxquant_eigen::MatrixXd;
}  // namespace veloxquant
