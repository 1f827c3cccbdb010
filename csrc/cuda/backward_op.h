// What a thread does with its values to find sum dy and sum dy * (x - mean).
//
// It adds up to 16 batches of kRows rows per lane, each batch summed in pairs, in float32 for input of up to 32
// bits: chains of at most 20 additions; from there on in float64. x - K is taken about K, the mean rounded to float32,
// which keeps what x has over the mean (see moments_op.h); what the rounding of K leaves out, (K - mean) * sum dy, is
// added in float64. A lane whose float32 sums overflow is done again in float64.
#pragma once

#include "reduce.h"

namespace precisebn::cuda {

// An Op of reduce.h: of a Partial, `first` is sum dy and `second` sum dy * (x - mean).
template <class T, int size>
struct BackwardOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 2, kRows = size == 1 ? 8 : 4;

  const T* inputs[2];  // dy, x
  const double* mean;  // [G, C]
  double *sum_dy, *sum_dy_xmu;
  int64_t channels;

  __device__ double mean_of(int group, int64_t channel) const { return __ldg(mean + group * channels + channel); }

  struct Lanes {
    Real shift[size], sum_dy[size], sum_product[size];

    __device__ Lanes(const BackwardOp& op, const Geometry& at, int64_t column_block, int column, int group) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        shift[k] = static_cast<Real>(op.mean_of(group, at.channel(column_block, column, k)));
        sum_dy[k] = sum_product[k] = 0;
      }
    }

    // Rows beyond `rows` are 0 in both inputs and add nothing: not even where the mean is NaN, which is that of a
    // channel whose sum is NaN anyway.
    template <bool full>
    __device__ void add(const Vec<T, size> (&values)[2][kRows], int, int) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        Real dy[kRows], products[kRows / 2];
#pragma unroll
        for (int r = 0; r < kRows; ++r) dy[r] = values[0][r][k];
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
          products[r / 2] = fma(dy[r + 1], values[1][r + 1][k] - shift[k], dy[r] * (values[1][r][k] - shift[k]));
        }
        sum_product[k] += sum_in_pairs<kRows / 2>(products);
        sum_dy[k] += sum_in_pairs<kRows>(dy);
      }
    }

    // `mean`: that of the lane.
    __device__ double2 finish(int k, int, double mean) const {
      const double lost = static_cast<double>(shift[k]) - mean;
      return {sum_dy[k], sum_product[k] + (lost == 0 ? 0 : lost * sum_dy[k])};
    }

    // All lanes as one: they are of one channel.
    __device__ double2 join(int, double mean) const {
      double2 sum{0, 0};
#pragma unroll
      for (int k = 0; k < size; ++k) {
        const double2 lane = finish(k, 0, mean);
        sum.x += lane.x;
        sum.y += lane.y;
      }
      return sum;
    }

    __device__ bool failed(int k) const {
      if constexpr (sizeof(Real) == 8) return false;
      return !(fabsf(sum_dy[k]) <= 0x1p127f) || !(fabsf(sum_product[k]) <= 0x1p127f);
    }
  };

  // values [first, last) of each of the thread's rows, in float64.
  template <class Values>
  __device__ double2 again(const Values& column, int first, int last, int64_t channel, int group) const {
    const T *dy = column.inputs[0], *x = column.inputs[1];
    const double center = mean_of(group, channel);
    double2 sum{0, 0};
    column.visit(first, last, [&](int64_t i) {
      const double gradient = widen(__ldg(dy + i));
      sum.x += gradient;
      sum.y += gradient * (widen(__ldg(x + i)) - center);
    });
    return sum;
  }

  template <class AllParts>
  __device__ static double2 combine(int n, int lane, int lanes, const AllParts& parts) {
    double a = 0, b = 0;
    parts.visit(n, lane, lanes, [&](const Partial& part) {
      if (part.count > 0) a += part.first, b += part.second;
    });
    return {sum_over_lanes(a, lanes), sum_over_lanes(b, lanes)};
  }

  __device__ static void merge(Partial& a, const Partial& b) {
    a.count += b.count;
    a.first += b.first;
    a.second += b.second;
  }

  __device__ void emit(int group, int64_t channel, const Partial& merged) const {
    const int64_t i = group * channels + channel;
    sum_dy[i] = merged.first;
    sum_dy_xmu[i] = merged.second;
  }

  __device__ bool count_comes_last() const { return false; }
  __device__ void emit_count(int, double) const {}
};

}  // namespace precisebn::cuda
