#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace precisebn::cpu {

// dx = a * dy + b * (x - center) + c. The four are double for kFloat64 and float otherwise. dx may be x or dy.
struct BackwardApplyKernels {
  // `channels` planes of `length` values, `stride` elements apart in all three; one center, a, b and c a plane.
  void (*planes)(const void* dy, const void* x, void* dx, int64_t stride, int64_t channels, int64_t length,
                 const void* center, const void* a, const void* b, const void* c);
  // `rows` rows of `width` values, `stride` elements apart in all three; one center, a, b and c a column.
  void (*rows)(const void* dy, const void* x, void* dx, int64_t stride, int64_t width, int64_t rows, const void* center,
               const void* a, const void* b, const void* c);
};

PRECISEBN_DECLARE_TABLE(BackwardApplyKernels, backward_apply_kernels)

}  // namespace precisebn::cpu
