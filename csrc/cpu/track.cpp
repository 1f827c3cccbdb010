// track: running statistics, moved towards those of a mini-batch.
#include <algorithm>

#include "../arithmetic.h"
#include "../operators.h"
#include "rows.h"

namespace precisebn::cpu {
namespace {

void move_row(const Tensor& running, int64_t row, const double* old, const double* batch, double divisor, double share,
              int64_t channels) {
  std::vector<double> values(channels);
  for (int64_t c = 0; c < channels; ++c) values[c] = lerp(old[c], batch[c] / divisor, share);
  write_row(running, row, values.data(), channels);
}

}  // namespace

void track(const Tensor& count, const Tensor& mean, const Tensor& m2, const Tensor& running_mean,
           const Tensor& running_var, const Tensor& num_batches, std::optional<double> momentum) {
  STD_TORCH_CHECK(mean.dim() >= 1, "precisebn::track: mean must have shape (C,) or (G, C)");
  const int64_t channels = mean.size(mean.dim() - 1);
  const Rows means("track", "mean", mean, channels), m2s("track", "m2", m2, channels),
      old_means("track", "running_mean", running_mean, channels),
      old_vars("track", "running_var", running_var, channels);
  const int64_t rows = means.size();
  const Counts counts("track", count, rows);
  STD_TORCH_CHECK(m2s.size() == rows && old_means.size() == rows && old_vars.size() == rows &&
                      num_batches.numel() == rows && num_batches.dim() <= 1,
                  "precisebn::track: all must have as many rows as mean, ", rows);
  int64_t* seen = num_batches.mutable_data_ptr<int64_t>();
  const int64_t step = num_batches.dim() == 1 ? num_batches.stride(0) : 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double n = counts[row];
    if (!(n > 1)) continue;
    const int64_t batches = ++seen[row * step];
    const double share = momentum ? *momentum : 1.0 / static_cast<double>(std::max<int64_t>(batches, 1));
    move_row(running_mean, row, old_means[row], means[row], 1.0, share, channels);
    move_row(running_var, row, old_vars[row], m2s[row], n - 1.0, share, channels);
  }
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("track", TORCH_BOX(&track)); }

}  // namespace precisebn::cpu
