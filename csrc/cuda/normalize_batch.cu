// normalize_batch: moments, fold and normalize in one call.
#include "../torch.h"
#include "operators.h"

namespace precisebn::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_batch(const Tensor& x, const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& bias, double eps,
                                                           const std::optional<Tensor>& group, int64_t num_groups) {
  STD_TORCH_CHECK(group || num_groups == 1, "precisebn::normalize_batch: several groups need a group for each sample");
  const auto [count, mean, m2] = moments(x, group, num_groups, group ? 2 : 1);
  const bool wide = x.scalar_type() == torch::headeronly::ScalarType::Double;
  const auto [scale, shift] = fold(count, mean, m2, weight, bias, eps, wide);
  return {normalize(x, scale, shift, group), count, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("normalize_batch", TORCH_BOX(&normalize_batch)); }

}  // namespace precisebn::cuda
