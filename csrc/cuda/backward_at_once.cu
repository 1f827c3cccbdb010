// backward_batch of a small tensor, in one launch (whole.h).
#include "../arithmetic.h"
#include "../operators.h"
#include "backward_op.h"
#include "formulas.h"
#include "rows.h"
#include "whole.h"

namespace precisebn::cuda {
namespace {

// A Map of whole.h.
template <class T>
struct ApplyMap {
  static constexpr int kCoefficients = 4;

  T* output;
  Counts count;
  Rows mean, m2, weight, grad_weight, grad_bias;
  double eps;

  template <class Set>
  __device__ void emit(int group, int64_t channel, const Partial& sums, bool writes, Set set) const {
    const double n = count.divisor(group);
    const BackwardCoefficients to(1.0 / n, mean.read(group, channel), m2.read(group, channel) / n, sums.first,
                                  sums.second, weight.read_or(1.0, group, channel), eps, std::is_same_v<T, double>);
    set(0, to.center);
    set(1, to.a);
    set(2, to.b);
    set(3, to.c);
    if (!writes) return;
    grad_weight.write(group, channel, to.grad_weight);
    grad_bias.write(group, channel, sums.first);
  }

  template <class Real>
  __device__ static Real formula(const Real (&dy_x)[2], const Real (&coefficients)[4]) {
    return applied(dy_x, coefficients);
  }
};

}  // namespace

std::optional<std::tuple<Tensor, Tensor, Tensor>> backward_at_once(const Tensor& dy, const Tensor& x,
                                                                   const Tensor& count, const Tensor& mean,
                                                                   const Tensor& m2,
                                                                   const std::optional<Tensor>& weight, double eps,
                                                                   const std::optional<Tensor>& group) {
  constexpr const char* kOp = "backward_batch";
  check_same(kOp, dy, x);
  const int64_t num_groups = mean.dim() == 2 ? mean.size(0) : 1, dims = weight ? weight->dim() : mean.dim();
  if (x.numel() == 0 || !same_strides(dy, x)) return std::nullopt;
  if (num_groups > 1 && dims == 1) return std::nullopt;  // gradients are sums over groups, and so over blocks
  const std::optional<View> dense_view = view_of(x);
  if (!dense_view) return std::nullopt;  // it is copied first anyway
  const OnDeviceOf where(x);
  const Groups groups = groups_of(group, x, num_groups);
  const View view = simplified(*dense_view, groups.ids != nullptr);
  const int64_t channels = x.size(1);
  const Tensor center = per_group<double>(mean, x);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> result;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T *const of_dy = data<T>(dy), *const of_x = data<T>(x);
    const auto launch = [&](auto size, const ReductionPlan& plan) {
      using Op = BackwardOp<T, size>;
      using Map = ApplyMap<T>;
      if (!fits_whole<Map, typename Op::Real>(where, groups, plan)) return;
      const int64_t sizes[] = {num_groups, channels};
      const auto gradient = [&] {
        return torch::stable::new_empty(mean, {sizes + 2 - dims, static_cast<size_t>(dims)},
                                        weight ? weight->scalar_type() : ScalarType::Double);
      };
      const Tensor grad_weight = gradient(), grad_bias = gradient();
      Mapping to = mapping(x);
      const auto rows = [&](const char* name, const std::optional<Tensor>& t) {
        const Rows of = rows_of(kOp, name, t, x, channels);
        STD_TORCH_CHECK(!t || of.size == num_groups, "precisebn::", kOp, ": all must have as many rows as mean, ",
                        num_groups);
        return of;
      };
      const Map map{mutable_data<T>(to.output),   counts_of(kOp, count, x, num_groups),
                    rows("mean", mean),           rows("m2", m2),
                    rows("weight", weight),       rows("grad_weight", grad_weight),
                    rows("grad_bias", grad_bias), eps};
      launch_whole(where, groups, Op{{of_dy, of_x}, data<double>(center), nullptr, nullptr, channels}, map, plan);
      result = {to.finish(), grad_weight, grad_bias};
    };
    plan_and_launch<T>(view, aligned(of_dy) && aligned(of_x), groups, BackwardOp<T, kVector<T>>::kRows,
                       where.multiprocessors, launch);
  });
  return result;
}

}  // namespace precisebn::cuda
