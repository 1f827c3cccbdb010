// Running statistics as kernels see them, and their update, for the operators that do more than that.
#pragma once

#include "rows.h"

namespace precisebn::cuda {

struct RunningRows {
  Rows mean, var;
  int64_t* num_batches;
  int64_t num_batches_stride;

  // `channels` for each of `rows` groups, on the device of `like`.
  RunningRows(const Tensor& running_mean, const Tensor& running_var, const Tensor& batches, const Tensor& like,
              int64_t channels, int64_t rows)
      : mean(rows_of("track", "running_mean", running_mean, like, channels)),
        var(rows_of("track", "running_var", running_var, like, channels)),
        num_batches(mutable_data<int64_t>(batches)),
        num_batches_stride(batches.dim() == 1 ? batches.stride(0) : 0) {
    STD_TORCH_CHECK(mean.size == rows && var.size == rows, "precisebn::track: all must have as many rows as mean, ",
                    rows);
    STD_TORCH_CHECK(batches.dim() <= 1 && batches.numel() == rows && batches.scalar_type() == ScalarType::Long &&
                        on_device_of(batches, like),
                    "precisebn::track: num_batches must be int64, () or (G,), on the device of mean");
  }
};

}  // namespace precisebn::cuda
