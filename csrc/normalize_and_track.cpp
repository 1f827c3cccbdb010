// normalize_and_track: normalize_batch and track in one call.
#include "operators.h"

namespace precisebn::PRECISEBN_DEVICE {
namespace {

Normalized normalize_and_track(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                               double eps, const Tensor& running_mean, const Tensor& running_var,
                               const Tensor& num_batches, std::optional<double> momentum,
                               const std::optional<Tensor>& group, int64_t num_groups) {
  auto normalize = normalize_batch;
#if defined(USE_CUDA)
  if (momentum) {
    if (auto done = normalize_and_track_at_once(x, weight, bias, eps, running_mean, running_var, num_batches, *momentum,
                                                group, num_groups)) {
      return *done;
    }
    normalize = normalize_step_by_step;  // or the same would be tried again
  }
#endif
  const Normalized result = normalize(x, weight, bias, eps, group, num_groups);
  const auto& [y, count, mean, m2] = result;
  track(count, mean, m2, running_mean, running_var, num_batches, momentum);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, PRECISEBN_DISPATCH_KEY, m) {
  m.impl("normalize_and_track", TORCH_BOX(&normalize_and_track));
}

}  // namespace precisebn::PRECISEBN_DEVICE
