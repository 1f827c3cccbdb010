// The moments of a tensor on a CUDA device, for the operators that need them.
#pragma once

#include <optional>

#include "tensors.h"

namespace precisebn::cuda {

// Where moments go: per group and channel as they are, or merged into accumulators [1], [C], [C].
struct MomentsResult {
  double *count, *mean, *m2;
  bool merge;
  // Where to write the mean and the biased variance themselves as well; null: nowhere. Of any floating type.
  void *batch_mean, *batch_var;
  ScalarType mean_type, var_type;
  int64_t mean_stride, var_stride;
};

// x must have values. The result is on its device.
void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, const MomentsResult& result);

}  // namespace precisebn::cuda
