#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace precisebn::cpu {

// Both add to sum[c] the dy, and to product[c] the dy * (x - mean[c]), of new values.
struct BackwardReduceKernels {
  // `channels` planes of `length` values, `stride` elements apart in dy and x alike.
  void (*planes)(const void* dy, const void* x, int64_t stride, int64_t channels, int64_t length, const double* mean,
                 double* sum, double* product);
  // `rows` rows of `width` values, `stride` elements apart in dy and x alike.
  void (*rows)(const void* dy, const void* x, int64_t stride, int64_t width, int64_t rows, const double* mean,
               double* sum, double* product);
};

PRECISEBN_DECLARE_TABLE(BackwardReduceKernels, backward_reduce_kernels)

}  // namespace precisebn::cpu
