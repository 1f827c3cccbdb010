// The inner loops, as the operators see them: one table of functions per instruction set, indexed by dtype. The tables
// are defined by the *_kernel.cpp files, which are compiled once per instruction set; dispatch.cpp picks one table at
// run time.
#pragma once

#include <cstdint>

namespace precisebn {

enum Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16, kNumDtypes };

struct Kernels {
  // Both merge the moments of new values into mean[c], m2[c], which already hold `before` values a channel.
  struct {
    // `channels` planes of `length` values, the first at x, `stride` elements apart.
    void (*planes)(const void* x, int64_t stride, int64_t channels, int64_t length, double before, double* mean,
                   double* m2);
    // `rows` rows of `channels` values, the first at x, `stride` elements apart.
    void (*rows)(const void* x, int64_t stride, int64_t channels, int64_t rows, double before, double* mean,
                 double* m2);
  } moments[kNumDtypes];

  // scale and shift are of the compute dtype: double for kFloat64, else float.
  struct {
    // One plane: y[i] = scale[0] * x[i] + shift[0].
    void (*plane)(const void* x, void* y, int64_t length, const void* scale, const void* shift);
    // Rows, `stride` elements apart in both x and y: y[c] = scale[c] * x[c] + shift[c].
    void (*rows)(const void* x, void* y, int64_t stride, int64_t channels, int64_t rows, const void* scale,
                 const void* shift);
  } normalize[kNumDtypes];
};

// The table for the CPU at hand, and its name: "avx512", "avx2" or "baseline".
const Kernels& kernels();
const char* capability();

}  // namespace precisebn
