// backward_reduce: sum dy and sum dy * (x - mean) per (group, channel), by the reduction in reduce.h with what
// backward_op.h says of it.
#include <tuple>

#include "../operators.h"
#include "../torch.h"
#include "backward_op.h"
#include "reduce.h"

namespace precisebn::cuda {

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                           const std::optional<Tensor>& group, int64_t num_groups) {
  check_same("backward_reduce", dy, x);
  const Groups groups = groups_of(group, x, num_groups);
  const Tensor center = per_group<double>(mean, x);
  STD_TORCH_CHECK((center.dim() == 2 ? center.size(0) : 1) == num_groups,
                  "precisebn::backward_reduce: mean must have shape (num_groups, C)");
  const OnDeviceOf where(x);
  if (x.numel() == 0) {
    return {torch::stable::new_zeros(center, center.sizes()), torch::stable::new_zeros(center, center.sizes())};
  }
  const Tensor sum_dy = torch::stable::empty_like(center), sum_dy_xmu = torch::stable::empty_like(center);
  const Tensor input = dense(x), gradient = with_strides_of(dy, input);
  const View view = simplified(*view_of(input), groups.ids != nullptr);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    const T *of_dy = data<T>(gradient), *of_x = data<T>(input);
    plan_and_launch<T>(view, aligned(of_dy) && aligned(of_x), groups, BackwardOp<T, kVector<T>>::kRows,
                       where.multiprocessors, [&](auto size, const ReductionPlan& plan) {
                         const BackwardOp<T, size> op{{of_dy, of_x},
                                                      data<double>(center),
                                                      mutable_data<double>(sum_dy),
                                                      mutable_data<double>(sum_dy_xmu),
                                                      view.channels};
                         launch_reduction(where, input, view, groups, op, plan);
                       });
  });
  return {sum_dy, sum_dy_xmu};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_backward_reduce", TORCH_BOX(&backward_reduce)); }

}  // namespace precisebn::cuda
