// normalize_batch: moments, coefficients and normalize in one call.
#include "operators.h"

namespace precisebn::PRECISEBN_DEVICE {

Normalized normalize_step_by_step(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& group,
                                  int64_t num_groups) {
  STD_TORCH_CHECK(group || num_groups == 1, "precisebn::normalize_batch: several groups need a group for each sample");
  const auto [count, mean, m2] = moments(x, group, num_groups, group ? 2 : 1);
  const auto [center, scale, shift] = coefficients(mean, {m2, count}, weight, bias, eps, computes_wide(x));
  return {normalize(x, center, scale, shift, group, x), count, mean, m2};
}

Normalized normalize_batch(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           double eps, const std::optional<Tensor>& group, int64_t num_groups) {
#if defined(USE_CUDA)
  if (auto done = normalize_at_once(x, weight, bias, eps, group, num_groups)) return *done;
#endif
  return normalize_step_by_step(x, weight, bias, eps, group, num_groups);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, PRECISEBN_DISPATCH_KEY, m) {
  m.impl("normalize_batch", TORCH_BOX(&normalize_batch));
}

}  // namespace precisebn::PRECISEBN_DEVICE
