// backward_batch: backward_reduce, backward_fold and backward_apply in one call; normalize, where the statistics were
// given.
#include "../torch.h"
#include "operators.h"
#include "tensors.h"

namespace precisebn::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> backward_batch(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& count,
                                                  const Tensor& mean, const Tensor& spread,
                                                  const std::optional<Tensor>& weight, double eps,
                                                  const std::optional<Tensor>& group) {
  const Tensor gradient = with_strides_of(dy, x);  // once, for both passes over it
  const bool wide = x.scalar_type() == torch::headeronly::ScalarType::Double;
  const auto [sum_dy, sum_dy_xmu] = backward_reduce(gradient, x, mean, group, mean.dim() == 2 ? mean.size(0) : 1);
  const auto [a, b, c, grad_weight, grad_bias] =
      backward_fold(count, mean, spread, sum_dy, sum_dy_xmu, weight, eps, wide);
  const Tensor dx = count ? backward_apply(gradient, x, a, b, c, group) : normalize(gradient, a, std::nullopt, group);
  return {dx, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("backward_batch", TORCH_BOX(&backward_batch)); }

}  // namespace precisebn::cuda
