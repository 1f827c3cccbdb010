// accumulate: the moments of x, merged into running accumulators, and its mean and variance for the layer that x
// enters. The kernel is that of moments: the block that has a channel's moments, in the same launch, merges them and
// writes all that is wanted, so a layer costs one launch. The running count belongs to all channels; the very last
// block adds to it, when the others have read it.
#include "../torch.h"
#include "moments.h"

namespace precisebn::cuda {
namespace {

double* accumulator(const Tensor& t, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(
      t.numel() == size && t.is_contiguous() && t.scalar_type() == ScalarType::Double &&
          t.get_device_index() == x.get_device_index(),
      "precisebn::accumulate: count [1], mean [C] and m2 [C] must be contiguous float64 on the device of x");
  return mutable_data<double>(t);
}

void* statistic(const std::optional<Tensor>& t, const Tensor& x, ScalarType& type, int64_t& stride) {
  if (!t) return nullptr;
  type = t->scalar_type();
  stride = t->dim() == 1 ? t->stride(0) : 0;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && t->get_device_index() == x.get_device_index(),
                  "precisebn::accumulate: batch_mean and batch_var must have one element per channel");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "precisebn::accumulate: batch_mean and batch_var must be floating point");
  return t->mutable_data_ptr();
}

void accumulate(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                const std::optional<Tensor>& batch_mean, const std::optional<Tensor>& batch_var) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::accumulate: x must have at least 2 dimensions");
  MomentsResult result{};
  result.merge = true;
  result.count = accumulator(count, x, 1);
  result.mean = accumulator(mean, x, x.size(1));
  result.m2 = accumulator(m2, x, x.size(1));
  result.batch_mean = statistic(batch_mean, x, result.mean_type, result.mean_stride);
  result.batch_var = statistic(batch_var, x, result.var_type, result.var_stride);
  if (x.numel() > 0) moments_of(x, std::nullopt, 1, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("accumulate", TORCH_BOX(&accumulate)); }

}  // namespace precisebn::cuda
