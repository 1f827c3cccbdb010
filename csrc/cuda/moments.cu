// moments: count, mean and m2 per (group, channel), by the reduction in reduce.h with what moments_op.h says of it.
#include "moments.h"

#include <tuple>

#include "../operators.h"
#include "../torch.h"
#include "moments_op.h"
#include "reduce.h"

namespace precisebn::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> by_group(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups) {
  return moments(x, group, num_groups, 2);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups,
                                           int64_t dim) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::moments: x must have at least 2 dimensions");
  const int64_t sizes[] = {num_groups, x.size(1)};
  const auto array = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return x.numel() == 0 ? torch::stable::new_zeros(x, size, ScalarType::Double)
                          : torch::stable::new_empty(x, size, ScalarType::Double);
  };
  const torch::headeronly::IntHeaderOnlyArrayRef size(sizes + 2 - dim, dim);
  const Tensor count = array({sizes, static_cast<size_t>(dim - 1)}), mean = array(size), m2 = array(size);
  if (x.numel() > 0) {
    moments_of(x, group, num_groups,
               {mutable_data<double>(count), mutable_data<double>(mean), mutable_data<double>(m2), false, nullptr,
                nullptr, ScalarType::Double, ScalarType::Double, 0, 0});
  }
  return {count, mean, m2};
}

void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, const MomentsResult& result) {
  const OnDeviceOf where(x);
  const Tensor input = dense(x);
  const Groups groups = groups_of(group, x, num_groups);
  const View view = simplified(*view_of(input), groups.ids != nullptr);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    const T* values = data<T>(input);
    plan_and_launch<T>(view, aligned(values), groups, MomentsOp<T, kVector<T>>::kRows, where.multiprocessors,
                       [&](auto size, const ReductionPlan& plan) {
                         const MomentsOp<T, size> op{{values}, view.channels, result};
                         launch_reduction(where, input, view, groups, op, plan);
                       });
  });
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_moments", TORCH_BOX(&by_group)); }

}  // namespace precisebn::cuda
