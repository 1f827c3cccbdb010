// Moments of a set of values: their count, mean and sum of squared deviations from the mean (m2), and how the moments
// of two disjoint sets make those of their union (Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm
// for Computing Sample Variances", 1979, equation 2.1). For host and device.
#pragma once

#if defined(__CUDACC__)
#define PRECISEBN_HOST_DEVICE __host__ __device__
#else
#define PRECISEBN_HOST_DEVICE
#endif

namespace precisebn {
// Internal linkage: this header is compiled for several instruction sets into one library, and a shared inline function
// would be kept once, from whichever of them the linker meets first.
namespace {

struct Moments {
  double mean;
  double m2;
};

// The part of a merge that depends on the counts only. All channels of a batch have the same count, so it is computed
// once for all of them.
struct MergeWeights {
  double mean;  // nb / n
  double m2;    // na * nb / n

  PRECISEBN_HOST_DEVICE MergeWeights(double na, double nb) : mean(na + nb > 0 ? nb / (na + nb) : 0), m2(mean * na) {}
};

// `a` keeps its bits where b is empty and takes those of b where a is empty and zero. The weight meets delta before
// delta is squared: delta may be so large that its square overflows although the weight is 0.
PRECISEBN_HOST_DEVICE inline void merge(double& mean, double& m2, double b_mean, double b_m2, MergeWeights weights) {
  const double delta = b_mean - mean;
  mean += delta * weights.mean;
  m2 += b_m2 + delta * weights.m2 * delta;
}

}  // namespace
}  // namespace precisebn
