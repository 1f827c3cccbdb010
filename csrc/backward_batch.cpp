// backward_batch: backward_reduce, backward_coefficients and backward_apply in one call.
#include "operators.h"
#include "strides.h"

namespace precisebn::PRECISEBN_DEVICE {
namespace {

std::tuple<Tensor, Tensor, Tensor> backward_batch(const Tensor& dy, const Tensor& x, const Tensor& count,
                                                  const Tensor& mean, const Tensor& m2,
                                                  const std::optional<Tensor>& weight, double eps,
                                                  const std::optional<Tensor>& group) {
  const Tensor gradient = with_strides_of(dy, x);  // once, for both passes over it
#if defined(USE_CUDA)
  if (auto done = backward_at_once(gradient, x, count, mean, m2, weight, eps, group)) return *done;
#endif
  const auto [sum_dy, sum_dy_xmu] = backward_reduce(gradient, x, mean, group, mean.dim() == 2 ? mean.size(0) : 1);
  const auto [center, a, b, c, grad_weight, grad_bias] =
      backward_coefficients(count, mean, {m2, count}, sum_dy, sum_dy_xmu, weight, eps, computes_wide(x));
  return {backward_apply(gradient, x, center, a, b, c, group), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, PRECISEBN_DISPATCH_KEY, m) {
  m.impl("backward_batch", TORCH_BOX(&backward_batch));
}

}  // namespace precisebn::PRECISEBN_DEVICE
