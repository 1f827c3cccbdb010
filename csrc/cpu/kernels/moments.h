#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace precisebn::cpu {

// Both merge the moments of new values into mean[c], m2[c], which already hold `before` values per channel.
struct MomentsKernels {
  // `channels` planes of `length` contiguous values; plane c begins at x + c * stride.
  void (*planes)(const void* x, int64_t stride, int64_t channels, int64_t length, double before, double* mean,
                 double* m2);
  // `rows` rows of `channels` contiguous values; row r begins at x + r * stride.
  void (*rows)(const void* x, int64_t stride, int64_t channels, int64_t rows, double before, double* mean, double* m2);
};

PRECISEBN_DECLARE_TABLE(MomentsKernels, moments_kernels)

}  // namespace precisebn::cpu
