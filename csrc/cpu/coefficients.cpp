// coefficients: statistics and affine as the center, scale and shift of normalize.
#include "../arithmetic.h"
#include "../operators.h"
#include "rows.h"

namespace precisebn::cpu {
namespace {

struct Row {
  const double *mean, *var, *weight, *bias;
  double divisor;  // of var
};

template <class T>
void write_coefficients(const Row& of, double eps, int64_t channels, T* center, T* scale, T* shift) {
  for (int64_t i = 0; i < channels; ++i) {
    const Coefficients to(of.mean[i], of.var[i] / of.divisor, of.weight ? of.weight[i] : 1.0,
                          of.bias ? of.bias[i] : 0.0, eps, sizeof(T) == sizeof(double));
    center[i] = static_cast<T>(to.center);
    scale[i] = static_cast<T>(to.scale);
    shift[i] = static_cast<T>(to.shift);
  }
}

std::tuple<Tensor, Tensor, Tensor> of_variance(const Tensor& mean, const Tensor& var,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               double eps, bool wide) {
  return coefficients(mean, {var, kNone}, weight, bias, eps, wide);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> coefficients(const Tensor& mean, const Variance& var,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                double eps, bool wide) {
  STD_TORCH_CHECK(mean.dim() >= 1, "precisebn::coefficients: mean must have shape (C,) or (G, C)");
  const int64_t channels = mean.size(mean.dim() - 1);
  const Rows means("coefficients", "mean", mean, channels), vars("coefficients", "var", var.values, channels);
  const OptionalRows weights("coefficients", "weight", weight, channels),
      biases("coefficients", "bias", bias, channels);
  const Divisors divisors("coefficients", var.count, vars.size());
  const int64_t rows = common_rows("coefficients", {means.size(), vars.size(), weights.size(), biases.size()});
  const auto result = [&] { return new_statistic({rows, channels}, 2, wide ? kFloat64 : kFloat32); };
  Tensor center = result(), scale = result(), shift = result();
  for (int64_t row = 0; row < rows; ++row) {
    const Row of{means[row], vars[row], weights[row], biases[row], divisors[vars.size() == 1 ? 0 : row]};
    const auto write = [&](auto* to_center, auto* to_scale, auto* to_shift) {
      const int64_t first = row * channels;
      write_coefficients(of, eps, channels, to_center + first, to_scale + first, to_shift + first);
    };
    if (wide) {
      write(center.mutable_data_ptr<double>(), scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>());
    } else {
      write(center.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(), shift.mutable_data_ptr<float>());
    }
  }
  return {center, scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("coefficients", TORCH_BOX(&of_variance)); }

}  // namespace precisebn::cpu
