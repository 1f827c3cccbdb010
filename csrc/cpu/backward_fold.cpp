// backward_fold: the sums of backward_reduce as the coefficients of backward_apply, and the gradients of the affine.
#include <cmath>
#include <tuple>
#include <vector>

#include "../torch.h"
#include "operators.h"
#include "rows.h"

namespace precisebn {
namespace {

// What there is of one group. n is 0 where the statistics do not depend on x.
struct Group {
  double n;
  const double *mean, *spread, *weight, *sum_dy, *sum_dy_xmu;
};

template <class T>
void coefficients(const Group& of, const double* inverse_std, int64_t channels, T* a, T* b, T* c) {
  const double share = of.n > 0 ? -1.0 / of.n : 0.0;
  for (int64_t i = 0; i < channels; ++i) {
    const double slope = of.weight ? of.weight[i] * inverse_std[i] : inverse_std[i];
    const double per_value = share * slope, of_x = per_value * inverse_std[i] * inverse_std[i] * of.sum_dy_xmu[i];
    a[i] = static_cast<T>(slope);
    b[i] = static_cast<T>(of_x);
    c[i] = static_cast<T>(per_value * of.sum_dy[i] - of_x * of.mean[i]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_fold(const std::optional<Tensor>& count, const Tensor& mean,
                                                                 const Tensor& spread, const Tensor& sum_dy,
                                                                 const Tensor& sum_dy_xmu,
                                                                 const std::optional<Tensor>& weight, double eps,
                                                                 bool wide) {
  STD_TORCH_CHECK(mean.dim() >= 1, "precisebn::backward_fold: mean must have shape (C,) or (G, C)");
  const int64_t channels = mean.size(mean.dim() - 1);
  const Rows means("backward_fold", "mean", mean, channels), spreads("backward_fold", "spread", spread, channels),
      sums("backward_fold", "sum_dy", sum_dy, channels), products("backward_fold", "sum_dy_xmu", sum_dy_xmu, channels);
  const int64_t num_groups = means.size();
  STD_TORCH_CHECK(spreads.size() == num_groups && sums.size() == num_groups && products.size() == num_groups,
                  "precisebn::backward_fold: all must have as many rows as mean, ", num_groups);
  const OptionalRows weights("backward_fold", "weight", weight, channels);
  std::optional<Counts> counts;
  if (count) counts.emplace("backward_fold", *count, num_groups);
  const int64_t dim = weight ? weight->dim() : mean.dim();
  STD_TORCH_CHECK(dim == 1 || !weight || weights.size() == num_groups,
                  "precisebn::backward_fold: weight must have shape (C,) or (G, C), G = ", num_groups);

  const Dtype dtype = wide ? kFloat64 : kFloat32, affine_dtype = weight ? dtype_of(*weight) : kFloat64;
  const std::array size{num_groups, channels}, affine_size{dim == 2 ? num_groups : channels, channels};
  Tensor a = new_statistic(size, 2, dtype), b = new_statistic(size, 2, dtype), c = new_statistic(size, 2, dtype);
  Tensor grad_weight = new_statistic(affine_size, dim, affine_dtype),
         grad_bias = new_statistic(affine_size, dim, affine_dtype);
  std::vector<double> scratch(3 * channels);
  double *inverse_std = scratch.data(), *to_weight = inverse_std + channels, *to_bias = to_weight + channels;
  for (int64_t g = 0; g < num_groups; ++g) {
    const double n = counts ? std::fmax((*counts)[g], 1.0) : 0.0, divisor = counts ? n : 1.0;
    const Group of{n, means[g], spreads[g], weights[g], sums[g], products[g]};
    const bool adds = dim == 1 && g > 0;  // to what the groups before gave a weight that all share
    for (int64_t i = 0; i < channels; ++i) {
      inverse_std[i] = 1.0 / std::sqrt(of.spread[i] / divisor + eps);
      to_weight[i] = of.sum_dy_xmu[i] * inverse_std[i] + (adds ? to_weight[i] : 0.0);
      to_bias[i] = of.sum_dy[i] + (adds ? to_bias[i] : 0.0);
    }
    const auto run = [&](auto* to_a, auto* to_b, auto* to_c) {
      const int64_t first = g * channels;
      coefficients(of, inverse_std, channels, to_a + first, to_b + first, to_c + first);
    };
    if (wide) {
      run(a.mutable_data_ptr<double>(), b.mutable_data_ptr<double>(), c.mutable_data_ptr<double>());
    } else {
      run(a.mutable_data_ptr<float>(), b.mutable_data_ptr<float>(), c.mutable_data_ptr<float>());
    }
    if (dim == 2 || g == num_groups - 1) {
      write_row(grad_weight, g, to_weight, channels);
      write_row(grad_bias, g, to_bias, channels);
    }
  }
  return {a, b, c, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("backward_fold", TORCH_BOX(&backward_fold)); }

}  // namespace precisebn
