// moments: count, mean and m2 per (group, channel), by the reduction in reduce.h.
//
// What a thread does with its values. They come in batches of kRows rows, all loaded before the first is used. For each
// of the values side by side (a "lane") the first value becomes the shift K, and of d = x - K a batch gives the mean b and
// then q = sum (d - b)^2, from registers; batches merge by Chan's formula. All of it is float32 for input of up to 32
// bits, and accurate, because:
//
//   d is small. K is a value of the same channel, close by. Where x and K are within a factor of 2, x - K is exact
//   (Sterbenz); else its rounding is relative to d. So |mean| / std is taken out of the problem before anything is
//   rounded, up to the 1e-7 * |mean| / std that the input itself cannot resolve.
//   Nothing cancels. q is taken about the batch's own mean, so it does not matter how far K is from the others: an
//   outlier as K costs 2^-24 K for each d, but its own share of m2 is K^2.
//   Chains are short. A batch is summed in pairs (at most 4 additions), and a thread has at most 16 batches
//   (partition.h): at worst about 20 roundings of 2^-24 in a row, 1.2e-6, and not all in the same direction; in
//   practice some 1e-7. Everything after that, from the values of a thread to the result, is float64.
//
// The squares of d can leave the range of float32. Then m2 is not finite, or tiny although some d is not 0 (a constant
// channel must not count), and the lane is done again in float64.
#include "moments.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../moments.h"
#include "reduce.h"

namespace precisebn::cuda {
namespace {

template <class T, int n>
__device__ inline bool any_nonzero(const T (&values)[n]) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < n; ++i) any = any || values[i] != 0;
  return any;
}

__device__ void write_as(ScalarType type, void* to, int64_t i, double value) {
  const auto single = static_cast<float>(value);
  if (type == ScalarType::Float) {
    static_cast<float*>(to)[i] = single;
  } else if (type == ScalarType::Half) {
    static_cast<__half*>(to)[i] = __float2half_rn(single);
  } else if (type == ScalarType::BFloat16) {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(single);
  } else {
    static_cast<double*>(to)[i] = value;
  }
}

// An Op of reduce.h: of a Partial, `first` is the mean and `second` m2.
template <class T, int size>
struct MomentsOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 1, kRows = size == 1 ? 8 : 4;

  const T* inputs[1];
  int64_t channels;
  MomentsResult result;

  // Squares below 2^-149 are lost; in a sum of at most 2^8 that is above this, they do not matter. Values of float16 are
  // multiples of 2^-24 and lose nothing.
  static constexpr Real kTiny{0x1p-110};
  static constexpr bool kCanUnderflow = sizeof(Real) == 4 && !std::is_same_v<T, __half>;

  __device__ double mean_of(int, int64_t) const { return 0; }  // none is given

  struct Lanes {
    Real shift[size], mean[size], m2[size];
    unsigned suspects;  // a bit for each lane with a batch whose squares may have been lost

    __device__ Lanes(const MomentsOp&, const Geometry&, int64_t, int, int) {
#pragma unroll
      for (int k = 0; k < size; ++k) shift[k] = mean[k] = m2[k] = 0;
      suspects = 0;
    }

    // `before` rows have been added; now `rows` more, which is kRows if `full`.
    template <bool full>
    __device__ void add(const Vec<T, size> (&x)[1][kRows], int before, int rows) {
      if (before == 0) {
#pragma unroll
        for (int k = 0; k < size; ++k) shift[k] = x[0][0][k];
      }
      const Real n = full ? Real{kRows} : static_cast<Real>(rows);
      const Real one_nth = full ? Real{1} / kRows : 1 / n;
      const Real weight = n / (static_cast<Real>(before) + n), square_weight = weight * static_cast<Real>(before);
#pragma unroll
      for (int k = 0; k < size; ++k) {
        Real d[kRows], sums[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          d[r] = x[0][r][k] - shift[k];
          if (!full && r >= rows) d[r] = 0;
          sums[r] = d[r];
        }
        const Real batch_mean = sum_in_pairs<kRows>(sums) * one_nth;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Real deviation = d[r] - batch_mean;
          if (!full && r >= rows) deviation = 0;
          sums[r] = deviation * deviation;
        }
        const Real squares = sum_in_pairs<kRows>(sums);
        if (kCanUnderflow && squares < kTiny) suspects |= static_cast<unsigned>(any_nonzero(d)) << k;
        const Real delta = batch_mean - mean[k];
        mean[k] += delta * weight;
        m2[k] += squares + delta * square_weight * delta;
      }
    }

    __device__ double mean_of(int k) const { return static_cast<double>(shift[k]) + static_cast<double>(mean[k]); }
    __device__ double2 finish(int k, double) const { return {mean_of(k), m2[k]}; }

    // All lanes as one: they are of one channel, and have `rows` values each.
    __device__ double2 fold(int rows, double) const {
      double sum = 0, between = 0, within = 0;
#pragma unroll
      for (int k = 1; k < size; ++k) sum += mean_of(k) - mean_of(0);
      const double center = mean_of(0) + sum / size;
#pragma unroll
      for (int k = 0; k < size; ++k) {
        between += (mean_of(k) - center) * (mean_of(k) - center);
        within += m2[k];
      }
      return {center, within + rows * between};
    }

    __device__ bool failed(int k) const {
      if constexpr (sizeof(Real) == 8) return false;
      return !(m2[k] <= Real{0x1p127}) || (m2[k] < kTiny && (suspects >> k & 1));
    }
  };

  // values [first, last) of each of the thread's rows, in float64.
  __device__ double2 again(const Column<T>& column, int first, int last, int64_t, int) const {
    const T* x = column.inputs[0];
    const double n = static_cast<double>(column.rows) * (last - first);
    if (n == 0) return {0, 0};
    const double shift = widen(x[column.offset(column.walk()) + first]);
    double sum = 0, m2 = 0;
    column.visit(first, last, [&](int64_t i) { sum += widen(x[i]) - shift; });
    const double mean = shift + sum / n;
    column.visit(first, last, [&](int64_t i) { m2 += (widen(x[i]) - mean) * (widen(x[i]) - mean); });
    return {mean, m2};
  }

  // The entries of a channel in two passes, without a division for each. Means are taken relative to the first one, so
  // that those of a constant channel stay exactly equal; entry 0 always has values.
  template <class Entry>
  __device__ static double2 combine(int n, int lane, int lanes, Entry entry) {
    const double origin = n > 0 ? entry(0).first : 0;
    double count = 0, sum = 0;
#pragma unroll 1
    for (int i = lane; i < n; i += lanes) {
      const Partial part = entry(i);
      count += part.count;
      sum += part.count * (part.first - origin);
    }
    count = sum_over_lanes(count, lanes);
    const double mean = origin + sum_over_lanes(sum, lanes) / (count > 0 ? count : 1);
    double m2 = 0;
#pragma unroll 1
    for (int i = lane; i < n; i += lanes) {
      const Partial part = entry(i);
      const double deviation = part.count > 0 ? part.first - mean : 0;
      m2 += part.second + part.count * deviation * deviation;
    }
    return {mean, sum_over_lanes(m2, lanes)};
  }

  __device__ static void merge(Partial& a, const Partial& b) {
    precisebn::merge(a.first, a.second, b.first, b.second, MergeWeights(a.count, b.count));
    a.count += b.count;
  }

  __device__ void emit(int group, int64_t channel, const Partial& merged) const {
    const int64_t i = group * channels + channel;
    if (result.batch_mean != nullptr) {
      write_as(result.mean_type, result.batch_mean, channel * result.mean_stride, merged.first);
    }
    if (result.batch_var != nullptr) {
      write_as(result.var_type, result.batch_var, channel * result.var_stride, merged.second / merged.count);
    }
    Partial total = merged;
    if (result.merge) {
      total = {__ldcg(result.count), result.mean[i], result.m2[i]};
      merge(total, merged);
    }
    result.mean[i] = total.first;
    result.m2[i] = total.second;
  }

  // Called once for a group; where results are merged, after all channels have read the count.
  __device__ bool count_comes_last() const { return result.merge; }
  __device__ void emit_count(int group, double count) const {
    if (result.merge) count += __ldcg(result.count);
    result.count[group] = count;
  }
};

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::moments: x must have at least 2 dimensions");
  const auto make = x.numel() == 0 ? torch::stable::new_zeros : torch::stable::new_empty;
  const auto array = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return make(x, size, ScalarType::Double, std::nullopt, std::nullopt, std::nullopt);
  };
  const Tensor count = array({num_groups}), mean = array({num_groups, x.size(1)}), m2 = array({num_groups, x.size(1)});
  if (x.numel() > 0) {
    moments_of(x, group, num_groups,
               {mutable_data<double>(count), mutable_data<double>(mean), mutable_data<double>(m2), false, nullptr,
                nullptr, ScalarType::Double, ScalarType::Double, 0, 0});
  }
  return {count, mean, m2};
}

}  // namespace

void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, const MomentsResult& result) {
  const OnDeviceOf where(x);
  const Tensor input = dense(x);
  const Groups groups = groups_of(group, x.size(0), num_groups);
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

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("moments", TORCH_BOX(&moments)); }

}  // namespace precisebn::cuda
