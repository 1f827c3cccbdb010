// The moments of a tensor on the CPU, for the operators that need them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "view.h"

namespace precisebn::cpu {

// count [num_groups], mean and m2 [num_groups, C]; all are overwritten.
void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, double* count, double* mean,
                double* m2);

}  // namespace precisebn::cpu
