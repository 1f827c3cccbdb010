// normalize_at_once, normalize_and_track_at_once: normalize_batch and normalize_and_track of a small tensor in one
// launch (whole.h).
#include "../arithmetic.h"
#include "../operators.h"
#include "formulas.h"
#include "moments_op.h"
#include "rows.h"
#include "track.h"
#include "whole.h"

namespace precisebn::cuda {
namespace {

// Running statistics that move by a fixed share. (The average over all mini-batches takes their number, which all
// blocks of a group would have to read before one of them writes it.)
struct Running {
  Rows mean, var;        // without data: there are none
  int64_t* num_batches;  // of each group
  int64_t num_batches_stride;
  double share;

  __device__ void move(int group, int64_t channel, const Partial& batch) const {
    if (mean.data == nullptr || !(batch.count > 1)) return;
    mean.write(group, channel, precisebn::lerp(mean.read(group, channel), batch.first, share));
    var.write(group, channel, precisebn::lerp(var.read(group, channel), batch.second / (batch.count - 1.0), share));
    if (channel == 0) ++num_batches[group * num_batches_stride];
  }
};

// A Map of whole.h.
template <class T>
struct NormalizeMap {
  static constexpr int kCoefficients = 3;

  T* output;
  double *count, *mean, *m2;
  int64_t channels;
  Rows weight, bias;
  Running running;
  double eps;

  template <class Set>
  __device__ void emit(int group, int64_t channel, const Partial& moments, bool writes, Set set) const {
    const Coefficients to(moments.first, moments.second / fmax(moments.count, 1.0), weight.read_or(1.0, group, channel),
                          bias.read_or(0.0, group, channel), eps, std::is_same_v<T, double>);
    set(0, to.center);
    set(1, to.scale);
    set(2, to.shift);
    if (!writes) return;
    const int64_t i = group * channels + channel;
    mean[i] = moments.first;
    m2[i] = moments.second;
    if (channel == 0) count[group] = moments.count;
    running.move(group, channel, moments);
  }

  template <class Real>
  __device__ static Real formula(const Real (&x)[1], const Real (&coefficients)[3]) {
    return normalized(x, coefficients);
  }
};

std::optional<Normalized> at_once(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& group,
                                  int64_t num_groups, const Running& running) {
  if (x.dim() < 2 || x.numel() == 0) return std::nullopt;
  if (!group && num_groups != 1) return std::nullopt;  // which is refused step by step
  const std::optional<View> dense_view = view_of(x);
  if (!dense_view) return std::nullopt;  // it is copied first anyway
  const OnDeviceOf where(x);
  const Groups groups = groups_of(group, x, num_groups);
  const View view = simplified(*dense_view, groups.ids != nullptr);
  const int64_t channels = x.size(1);
  std::optional<Normalized> result;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T* const values = data<T>(x);
    const auto launch = [&](auto size, const ReductionPlan& plan) {
      using Op = MomentsOp<T, size>;
      using Map = NormalizeMap<T>;
      if (!fits_whole<Map, typename Op::Real>(where, groups, plan)) return;
      const int64_t sizes[] = {num_groups, channels}, dims = group ? 2 : 1;
      const auto array = [&](int64_t dim) {
        const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes + (group ? 0 : 1), static_cast<size_t>(dim));
        return torch::stable::new_empty(x, shape, ScalarType::Double);
      };
      const Tensor count = array(dims - 1), mean = array(dims), m2 = array(dims);
      Mapping to = mapping(x);
      const auto affine = [&](const char* name, const std::optional<Tensor>& t) {
        const Rows rows = rows_of("normalize_batch", name, t, x, channels);
        STD_TORCH_CHECK(rows.size == 1 || rows.size == num_groups,
                        "precisebn::normalize_batch: weight and bias must be (C,) or (G, C)");
        return rows;
      };
      const Map map{mutable_data<T>(to.output),
                    mutable_data<double>(count),
                    mutable_data<double>(mean),
                    mutable_data<double>(m2),
                    channels,
                    affine("weight", weight),
                    affine("bias", bias),
                    running,
                    eps};
      launch_whole(where, groups, Op{{values}, channels, {}}, map, plan);
      result = {to.finish(), count, mean, m2};
    };
    plan_and_launch<T>(view, aligned(values), groups, MomentsOp<T, kVector<T>>::kRows, where.multiprocessors, launch);
  });
  return result;
}

}  // namespace

std::optional<Normalized> normalize_at_once(const Tensor& x, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, double eps,
                                            const std::optional<Tensor>& group, int64_t num_groups) {
  return at_once(x, weight, bias, eps, group, num_groups, {});
}

std::optional<Normalized> normalize_and_track_at_once(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps,
                                                      const Tensor& running_mean, const Tensor& running_var,
                                                      const Tensor& num_batches, double momentum,
                                                      const std::optional<Tensor>& group, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::normalize_and_track: x must have at least 2 dimensions");
  const RunningRows rows(running_mean, running_var, num_batches, x, x.size(1), num_groups);
  return at_once(x, weight, bias, eps, group, num_groups,
                 {rows.mean, rows.var, rows.num_batches, rows.num_batches_stride, momentum});
}

}  // namespace precisebn::cuda
