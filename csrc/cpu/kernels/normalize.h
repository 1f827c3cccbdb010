#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace precisebn::cpu {

// y = (x - center) * scale + shift. The three are double for kFloat64 and float otherwise. y may be x.
struct NormalizeKernels {
  // `channels` planes of `length` values, `stride` elements apart in x and y alike; one center, scale and shift a
  // plane.
  void (*planes)(const void* x, void* y, int64_t stride, int64_t channels, int64_t length, const void* center,
                 const void* scale, const void* shift);
  // `rows` rows of `width` values, `stride` elements apart; one center, scale and shift a column.
  void (*rows)(const void* x, void* y, int64_t stride, int64_t width, int64_t rows, const void* center,
               const void* scale, const void* shift);
};

PRECISEBN_DECLARE_TABLE(NormalizeKernels, normalize_kernels)

}  // namespace precisebn::cpu
