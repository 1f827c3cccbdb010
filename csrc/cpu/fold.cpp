// fold: statistics and affine as the scale and shift of normalize.
#include <cmath>
#include <tuple>

#include "../torch.h"
#include "operators.h"
#include "rows.h"

namespace precisebn {
namespace {

template <class T>
void fold_row(double n, const double* mean, const double* spread, const double* weight, const double* bias, double eps,
              int64_t channels, T* scale, T* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    const double slope = (weight ? weight[c] : 1.0) * (1.0 / std::sqrt(spread[c] / n + eps));
    scale[c] = static_cast<T>(slope);
    shift[c] = static_cast<T>((bias ? bias[c] : 0.0) - mean[c] * slope);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> fold(const std::optional<Tensor>& count, const Tensor& mean, const Tensor& spread,
                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                bool wide) {
  STD_TORCH_CHECK(mean.dim() >= 1, "precisebn::fold: mean must have shape (C,) or (R, C)");
  const int64_t channels = mean.size(mean.dim() - 1);
  const Rows means("fold", "mean", mean, channels), spreads("fold", "spread", spread, channels);
  const OptionalRows weights("fold", "weight", weight, channels), biases("fold", "bias", bias, channels);
  std::optional<Counts> counts;
  if (count) counts.emplace("fold", *count, means.size());
  const int64_t rows = common_rows("fold", {means.size(), spreads.size(), weights.size(), biases.size()});
  const Dtype dtype = wide ? kFloat64 : kFloat32;
  Tensor scale = new_statistic({rows, channels}, 2, dtype), shift = new_statistic({rows, channels}, 2, dtype);
  for (int64_t row = 0; row < rows; ++row) {
    const double n = counts ? std::fmax((*counts)[means.size() == 1 ? 0 : row], 1.0) : 1.0;
    const auto run = [&](auto* to_scale, auto* to_shift) {
      fold_row(n, means[row], spreads[row], weights[row], biases[row], eps, channels, to_scale + row * channels,
               to_shift + row * channels);
    };
    if (wide) {
      run(scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>());
    } else {
      run(scale.mutable_data_ptr<float>(), shift.mutable_data_ptr<float>());
    }
  }
  return {scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("fold", TORCH_BOX(&fold)); }

}  // namespace precisebn
