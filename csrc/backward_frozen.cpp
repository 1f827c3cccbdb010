// backward_frozen: the backward of a normalization by given statistics, in one call.
#include "operators.h"
#include "strides.h"

namespace precisebn::PRECISEBN_DEVICE {
namespace {

Tensor in_float64(const Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.scalar_type() == ScalarType::Double) return t;
  Tensor converted = torch::stable::new_empty(t, t.sizes(), ScalarType::Double);
  torch::stable::copy_(converted, t);
  return converted;
}

std::tuple<Tensor, Tensor, Tensor> backward_frozen(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                   const Tensor& var, const std::optional<Tensor>& weight, double eps,
                                                   const std::optional<Tensor>& group) {
  const Tensor gradient = with_strides_of(dy, x);  // once, for both passes over it
  const auto [sum_dy, sum_dy_xmu] =
      backward_reduce(gradient, x, in_float64(mean), group, mean.dim() == 2 ? mean.size(0) : 1);
  const auto [center, a, b, c, grad_weight, grad_bias] =
      backward_coefficients(kNone, mean, {var, kNone}, sum_dy, sum_dy_xmu, weight, eps, computes_wide(x));
  return {normalize(gradient, kNone, a, kNone, group, x), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, PRECISEBN_DISPATCH_KEY, m) {
  m.impl("backward_frozen", TORCH_BOX(&backward_frozen));
}

}  // namespace precisebn::PRECISEBN_DEVICE
