// backward_coefficients: the sums of backward_reduce as the coefficients of backward_apply, and the gradients of the
// affine.
#include <vector>

#include "../arithmetic.h"
#include "../operators.h"
#include "rows.h"

namespace precisebn::cpu {
namespace {

struct Group {
  const double *mean, *var, *weight, *sum_dy, *sum_dy_xmu;
  double share;    // of one value in the statistics: 0 where they are constants
  double divisor;  // of var
};

// Adds to the gradients where the group is not the first of those that share weight and bias.
template <class T>
void write_coefficients(const Group& of, double eps, int64_t channels, bool adds, T* center, T* a, T* b, T* c,
                        double* to_weight, double* to_bias) {
  for (int64_t i = 0; i < channels; ++i) {
    const BackwardCoefficients to(of.share, of.mean[i], of.var[i] / of.divisor, of.sum_dy[i], of.sum_dy_xmu[i],
                                  of.weight ? of.weight[i] : 1.0, eps, sizeof(T) == sizeof(double));
    center[i] = static_cast<T>(to.center);
    a[i] = static_cast<T>(to.a);
    b[i] = static_cast<T>(to.b);
    c[i] = static_cast<T>(to.c);
    to_weight[i] = to.grad_weight + (adds ? to_weight[i] : 0.0);
    to_bias[i] = of.sum_dy[i] + (adds ? to_bias[i] : 0.0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> of_variance(const std::optional<Tensor>& count,
                                                                       const Tensor& mean, const Tensor& var,
                                                                       const Tensor& sum_dy, const Tensor& sum_dy_xmu,
                                                                       const std::optional<Tensor>& weight, double eps,
                                                                       bool wide) {
  return backward_coefficients(count, mean, {var, kNone}, sum_dy, sum_dy_xmu, weight, eps, wide);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_coefficients(
    const std::optional<Tensor>& count, const Tensor& mean, const Variance& var, const Tensor& sum_dy,
    const Tensor& sum_dy_xmu, const std::optional<Tensor>& weight, double eps, bool wide) {
  constexpr const char* kOp = "backward_coefficients";
  STD_TORCH_CHECK(mean.dim() >= 1, "precisebn::", kOp, ": mean must have shape (C,) or (G, C)");
  const int64_t channels = mean.size(mean.dim() - 1);
  const Rows means(kOp, "mean", mean, channels), vars(kOp, "var", var.values, channels),
      sums(kOp, "sum_dy", sum_dy, channels), products(kOp, "sum_dy_xmu", sum_dy_xmu, channels);
  const int64_t num_groups = means.size();
  STD_TORCH_CHECK(vars.size() == num_groups && sums.size() == num_groups && products.size() == num_groups,
                  "precisebn::", kOp, ": all must have as many rows as mean, ", num_groups);
  const OptionalRows weights(kOp, "weight", weight, channels);
  const Divisors counts(kOp, count, num_groups), divisors(kOp, var.count, num_groups);
  const int64_t dim = weight ? weight->dim() : mean.dim();
  STD_TORCH_CHECK(dim == 1 || !weight || weights.size() == num_groups, "precisebn::", kOp,
                  ": weight must have shape (C,) or (G, C), G = ", num_groups);

  const auto result = [&] { return new_statistic({num_groups, channels}, 2, wide ? kFloat64 : kFloat32); };
  const auto gradient = [&] {
    return new_statistic({dim == 2 ? num_groups : channels, channels}, dim, weight ? dtype_of(*weight) : kFloat64);
  };
  Tensor center = result(), a = result(), b = result(), c = result();
  Tensor grad_weight = gradient(), grad_bias = gradient();
  std::vector<double> to_weight(channels), to_bias(channels);
  for (int64_t g = 0; g < num_groups; ++g) {
    const Group of{means[g], vars[g], weights[g], sums[g], products[g], count ? 1.0 / counts[g] : 0.0, divisors[g]};
    const auto write = [&]<class T>(T*) {
      const auto row = [&](Tensor& t) { return t.mutable_data_ptr<T>() + g * channels; };
      write_coefficients(of, eps, channels, dim == 1 && g > 0, row(center), row(a), row(b), row(c), to_weight.data(),
                         to_bias.data());
    };
    if (wide) {
      write(static_cast<double*>(nullptr));
    } else {
      write(static_cast<float*>(nullptr));
    }
    if (dim == 2 || g == num_groups - 1) {
      write_row(grad_weight, g, to_weight.data(), channels);
      write_row(grad_bias, g, to_bias.data(), channels);
    }
  }
  return {center, a, b, c, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("backward_coefficients", TORCH_BOX(&of_variance)); }

}  // namespace precisebn::cpu
