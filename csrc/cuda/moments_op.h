// What a thread does with its values to find their moments. They come in batches of kRows rows, all loaded before the
// first is used. For each of the values side by side (a "lane") the mean of the first batch becomes the shift K, and
// sums of d = x - K and of its square are all that is kept: 10 instructions a value with the loads, where memory leaves
// time for 16. When there are twice, four and eight times as many values, K moves to their mean, and the sums with it.
// At the end, m2 = sum(d^2) - sum(d)^2 / n. The sums are float32 for input of up to 32 bits, and accurate, because:
//
//   d is small. K is the mean of some of the values. Where x and K are within a factor of 2, x - K is exact (Sterbenz);
//   else its rounding is relative to d. So |mean| / std is taken out of the problem before anything is rounded.
//   Little cancels. Whatever the data, the mean K of k out of n values is no further from the mean m of all n than
//   (K - m)^2 <= var * (n - k) / k. As K is the mean of half of the values at least, sum d^2 is at most twice m2: an
//   outlier that comes first does no harm, nor a first batch of one value before others of another. For ordinary data
//   it is 1 + 1 / k times. Chains are short. A batch is summed in pairs, and a thread has at most 16 (partition.h):
//   with d * d and the moves of K no more than 26 roundings of 2^-24 in a row. Were all of one direction, on data of
//   which half cancels, m2 would be off by 3e-6: that is the bound. They go both ways, in practice by some 1e-7, and
//   those of different threads are independent. Everything after that, from the sums of a thread to the result, is
//   float64.
//
// The squares of d can leave the range of float32. Then their sum is not finite, or tiny although some d is not 0 (a
// constant channel must not count), and the lane is done again in float64, in two passes.
#pragma once

#include <type_traits>

#include "../moments.h"
#include "moments.h"
#include "reduce.h"
#include "rows.h"

namespace precisebn::cuda {

// An Op of reduce.h: of a Partial, `first` is the mean and `second` m2.
template <class T, int size>
struct MomentsOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 1, kRows = size == 8 ? 4 : 8;

  const T* inputs[1];
  int64_t channels;
  MomentsResult result;

  // Squares below 2^-149 are lost; in a sum of at most 2^8 that is above this, they do not matter. Values of float16
  // are multiples of 2^-24 and lose nothing.
  static constexpr Real kTiny{0x1p-110};
  static constexpr bool kCanUnderflow = sizeof(Real) == 4 && !std::is_same_v<T, __half>;

  __device__ double mean_of(int, int64_t) const { return 0; }  // none is given

  struct Lanes {
    Real shift[size], sum[size], squares[size];
    unsigned suspects = 0;  // a bit for each lane of which squares may have been lost

    __device__ Lanes(const MomentsOp&, const Geometry&, int64_t, int, int) {
#pragma unroll
      for (int k = 0; k < size; ++k) shift[k] = sum[k] = squares[k] = 0;
    }

    // `before` rows have been added; now `rows` more, which is kRows if `full`.
    template <bool full>
    __device__ void add(const Vec<T, size> (&x)[1][kRows], int before, int rows) {
      if (before == 0) {
        const Real one_nth = full ? Real{1} / kRows : Real{1} / static_cast<Real>(rows);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          Real d[kRows];  // from the first, so that K is exactly the value of a constant channel
#pragma unroll
          for (int r = 0; r < kRows; ++r) d[r] = full || r < rows ? x[0][r][k] - x[0][0][k] : 0;
          shift[k] = x[0][0][k] + sum_in_pairs<kRows>(d) * one_nth;
        }
      } else if ((before & (before - 1)) == 0) {
        move_shift(static_cast<Real>(before));
      }
      Real smallest = INFINITY;
#pragma unroll
      for (int k = 0; k < size; ++k) {
        Real d[kRows], squares_of_pairs[kRows / 2];
#pragma unroll
        for (int r = 0; r < kRows; ++r) d[r] = full || r < rows ? x[0][r][k] - shift[k] : 0;
#pragma unroll
        for (int r = 0; r < kRows / 2; ++r) {
          squares_of_pairs[r] = fma(d[2 * r + 1], d[2 * r + 1], d[2 * r] * d[2 * r]);
        }
        const Real of_batch = sum_in_pairs<kRows / 2>(squares_of_pairs);
        smallest = min(smallest, of_batch);
        squares[k] += of_batch;
        sum[k] += sum_in_pairs<kRows>(d);
      }
      if (kCanUnderflow && smallest < kTiny) note_suspects<full>(x, rows);
    }

    // To the mean of the n values so far: (x - K - by)^2 = d^2 - 2 * by * d + by^2.
    __device__ void move_shift(Real n) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        const Real moved = shift[k] + sum[k] / n, by = moved - shift[k];
        squares[k] += by * fma(n, by, -2 * sum[k]);
        sum[k] -= n * by;
        shift[k] = moved;
      }
    }

    template <bool full>
    __device__ void note_suspects(const Vec<T, size> (&x)[1][kRows], int rows) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (full || r < rows) suspects |= static_cast<unsigned>(x[0][r][k] != shift[k]) << k;
        }
      }
    }

    __device__ bool failed(int k) const {
      if constexpr (sizeof(Real) == 8) return false;
      return !(squares[k] <= Real{0x1p127}) || (squares[k] < kTiny && (suspects >> k & 1));
    }

    __device__ double2 finish(int k, int rows, double) const {
      const double shift_error = static_cast<double>(sum[k]) / max(rows, 1);
      const double m2 = squares[k] - sum[k] * shift_error;
      return {shift[k] + shift_error, m2 < 0 ? 0 : m2};  // NaN stays
    }

    // All lanes as one: they are of one channel, and have `rows` values each.
    __device__ double2 join(int rows, double) const {
      const double2 first = finish(0, rows, 0);
      double between = 0, offset = 0, within = first.y;
#pragma unroll
      for (int k = 1; k < size; ++k) {  // the k-th lane merges with k lanes
        const double2 lane = finish(k, rows, 0);
        const double delta = lane.x - first.x - offset;
        offset += delta * (1.0 / (k + 1));
        between += delta * (static_cast<double>(k) / (k + 1)) * delta;
        within += lane.y;
      }
      return {first.x + offset, within + rows * between};
    }
  };

  // values [first, last) of each of the thread's rows, in float64.
  template <class Values>
  __device__ double2 again(const Values& column, int first, int last, int64_t, int) const {
    const T* x = column.inputs[0];
    const double n = static_cast<double>(column.rows) * (last - first);
    if (n == 0) return {0, 0};
    const double shift = widen(__ldg(x + column.first() + first));
    double sum = 0, m2 = 0;
    column.visit(first, last, [&](int64_t i) { sum += widen(__ldg(x + i)) - shift; });
    const double mean = shift + sum / n;
    column.visit(first, last, [&](int64_t i) { m2 += (widen(__ldg(x + i)) - mean) * (widen(__ldg(x + i)) - mean); });
    return {mean, m2};
  }

  // The parts of a channel in two passes, without a division for each. Means are taken relative to the first one, so
  // that those of a constant channel stay exactly equal; part 0 always has values.
  template <class AllParts>
  __device__ static double2 combine(int n, int lane, int lanes, const AllParts& parts) {
    const double origin = n > 0 ? parts.at(0).x : 0;
    double count = 0, sum = 0;
    parts.visit(n, lane, lanes, [&](const Partial& part) {
      count += part.count;
      sum += part.count * (part.first - origin);
    });
    count = sum_over_lanes(count, lanes);
    const double mean = origin + sum_over_lanes(sum, lanes) / (count > 0 ? count : 1);
    double m2 = 0;
    parts.visit(n, lane, lanes, [&](const Partial& part) {
      const double deviation = part.count > 0 ? part.first - mean : 0;
      m2 += part.second + part.count * deviation * deviation;
    });
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

}  // namespace precisebn::cuda
