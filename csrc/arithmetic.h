// What is computed of the numbers of one channel, in float64. For host and device.
#pragma once

#include <cmath>

#include "moments.h"

namespace precisebn {
namespace {  // as in moments.h

// As torch.lerp: exact at both ends.
PRECISEBN_HOST_DEVICE inline double lerp(double from, double to, double share) {
  return share < 0.5 ? from + share * (to - from) : to - (1.0 - share) * (to - from);
}

// a * b + c where c is a product as well. Of two products CUDA's compiler chooses which one it does not round, in one
// kernel this and in the next perhaps the other; so here it is told, as wherever the same bits are promised.
PRECISEBN_HOST_DEVICE inline double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// As a float holds it, where the coefficients are floats.
PRECISEBN_HOST_DEVICE inline double as_coefficient(double value, bool wide) {
  return wide ? value : static_cast<double>(static_cast<float>(value));
}

// y = (x - center) * scale + shift. The center is the mean as a coefficient can hold it, and the shift makes up for
// what the mean lost. So x loses no digits where the mean is large against the standard deviation: the difference is
// exact, or rounds at its own size, where scale * x + (bias - mean * scale) rounds at the size of x.
struct Coefficients {
  double center, scale, shift;

  PRECISEBN_HOST_DEVICE Coefficients(double mean, double var, double weight, double bias, double eps, bool wide)
      : center(as_coefficient(mean, wide)), scale(weight * (1.0 / sqrt(var + eps))) {
    shift = bias + (center - mean) * scale;
  }
};

// dx = a * dy + b * (x - center) + c, and what a channel of a group adds to the gradient of the weight: the gradient of
// batch normalization (Ioffe & Szegedy 2015, algorithm 1). `share` is 1 / n, or 0 where the statistics are constants.
struct BackwardCoefficients {
  double center, a, b, c, grad_weight;

  PRECISEBN_HOST_DEVICE BackwardCoefficients(double share, double mean, double var, double sum_dy, double sum_dy_xmu,
                                             double weight, double eps, bool wide)
      : center(as_coefficient(mean, wide)) {
    const double inverse_std = 1.0 / sqrt(var + eps);
    grad_weight = sum_dy_xmu * inverse_std;
    a = weight * inverse_std;
    b = share == 0 ? 0 : -a * share * inverse_std * grad_weight;
    c = share == 0 ? 0 : fused(b, center - mean, -a * share * sum_dy);
  }
};

}  // namespace
}  // namespace precisebn
