// Sums of dy and of dy * (x - mean), in one reading. Products and sums are float32 lanes for chains of at most 32, and
// float64 beyond. The float32 lanes subtract the mean rounded to float32; what rounding took off the mean is put back
// as (rounded - mean) * sum dy, in float64, once a block. Products that overflow or underflow float32 do so here as
// they would in the float32 backward of torch.
#include "backward_reduce.h"

#include "columns.h"
#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kChain = 32;

template <class T>
PRECISEBN_INLINE void add_plane(const T* dy, const T* x, int64_t length, double mean, double& sum, double& product) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>, kStep = kUnroll * kL;
  const auto rounded = static_cast<Scalar>(mean);
  const V center = broadcast<V>(rounded);
  typename Compute<T>::Wide total_sum = {}, total_product = {};
  int64_t i = 0;
  while (i < length) {
    V sums[kUnroll] = {}, products[kUnroll] = {};
    const int64_t left = (length - i) / kStep, steps = left < kChain ? left : kChain;
    for (int64_t step = 0; step < steps; ++step, i += kStep) {
      for (int k = 0; k < kUnroll; ++k) {
        const V g = load(dy + i + k * kL);
        sums[k] += g;
        products[k] += g * (load(x + i + k * kL) - center);
      }
    }
    if (steps < kChain) {
      for (int k = 0; i + kL <= length; ++k, i += kL) {
        const V g = load(dy + i);
        sums[0] += g;
        products[0] += g * (load(x + i) - center);
      }
      const int rest = static_cast<int>(length - i);
      if (rest) {
        const V g = load_first(dy + i, rest);  // zeros behind the end: so are the products, but for a NaN or Inf mean
        sums[1] += g;
        products[1] += first_lanes(g * (load_first(x + i, rest) - center), rest);
      }
      i = length;
    }
    total_sum += widen((sums[0] + sums[1]) + (sums[2] + sums[3]));
    total_product += widen((products[0] + products[1]) + (products[2] + products[3]));
  }
  const double plane_sum = sum_of_lanes(total_sum);
  sum += plane_sum;
  product += sum_of_lanes(total_product) + (static_cast<double>(rounded) - mean) * plane_sum;
}

template <class T>
void planes(const void* dy, const void* x, int64_t stride, int64_t channels, int64_t length, const double* mean,
            double* sum, double* product) {
  for (int64_t c = 0; c < channels; ++c) {
    add_plane(static_cast<const T*>(dy) + c * stride, static_cast<const T*>(x) + c * stride, length, mean[c], sum[c],
              product[c]);
  }
}

// One vector of channels of a block of rows.
template <class V>
struct Column {
  V center, sum, product;
};

// The first n means, rounded, as center of a column.
template <class T>
PRECISEBN_INLINE Column<typename Compute<T>::Vec> centered(const double* mean, int n) {
  using V = typename Compute<T>::Vec;
  alignas(64) typename Compute<T>::Scalar rounded[kLanes<V>] = {};
  for (int i = 0; i < n; ++i) rounded[i] = static_cast<typename Compute<T>::Scalar>(mean[i]);
  return {load(rounded), V{}, V{}};
}

// Adds kRows rows to a column, as one link of the chains of its sums.
template <class T, int kRows, bool kPartial>
PRECISEBN_INLINE void add_to_column(const T* dy, const T* x, int64_t stride, int n,
                                    Column<typename Compute<T>::Vec>& column) {
  using V = typename Compute<T>::Vec;
  V g[kRows], d[kRows];
  for (int i = 0; i < kRows; ++i) {
    g[i] = kPartial ? load_first(dy + i * stride, n) : load(dy + i * stride);
    d[i] = (kPartial ? load_first(x + i * stride, n) : load(x + i * stride)) - column.center;
  }
  column.sum += in_pairs<kRows>([&](int i) { return g[i]; });
  column.product += in_pairs<kRows>([&](int i) { return g[i] * d[i]; });
}

// Adds what a block has left in a column of n channels to their sums, and empties the column.
template <class V>
PRECISEBN_INLINE void end_block(Column<V>& column, int n, const double* mean, double* sum, double* product) {
  using W = decltype(widen(V{}));
  constexpr int kL = kLanes<V>;
  double buffer[3][kL];
  const bool partial = n < kL;
  const double* of_mean = mean;
  double *to_sum = sum, *to_product = product;
  if (partial) {
    for (int i = 0; i < kL; ++i) {
      buffer[0][i] = i < n ? mean[i] : 0, buffer[1][i] = i < n ? sum[i] : 0, buffer[2][i] = i < n ? product[i] : 0;
    }
    of_mean = buffer[0], to_sum = buffer[1], to_product = buffer[2];
  }
  W exact, total_sum, total_product;
  load_accumulator(of_mean, exact);
  load_accumulator(to_sum, total_sum);
  load_accumulator(to_product, total_product);
  const W block_sum = widen(column.sum);
  store_accumulator(to_sum, total_sum + block_sum);
  store_accumulator(to_product, total_product + (widen(column.product) + (widen(column.center) - exact) * block_sum));
  if (partial) {
    for (int i = 0; i < n; ++i) sum[i] = buffer[1][i], product[i] = buffer[2][i];
  }
  column.sum = column.product = V{};
}

// Rows of so few whole vectors that all sums are in registers are read one after the other, as they lie.
template <class T, int kWidth>
PRECISEBN_INLINE void narrow_block(const T* dy, const T* x, int64_t stride, int64_t rows, const double* mean,
                                   double* sum, double* product) {
  constexpr int kL = kLanes<typename Compute<T>::Vec>;
  Column<typename Compute<T>::Vec> columns[kWidth];
  for (int k = 0; k < kWidth; ++k) columns[k] = centered<T>(mean + k * kL, kL);
  for (int64_t r = 0; r < rows; ++r, dy += stride, x += stride) {
    for (int k = 0; k < kWidth; ++k) add_to_column<T, 1, false>(dy + k * kL, x + k * kL, stride, kL, columns[k]);
  }
  for (int k = 0; k < kWidth; ++k) end_block(columns[k], kL, mean + k * kL, sum + k * kL, product + k * kL);
}

template <class T, int kWidth>
void narrow_rows(const T* dy, const T* x, int64_t stride, int64_t rows, const double* mean, double* sum,
                 double* product) {
  for (int64_t r = 0; r < rows; r += kChain) {
    const int64_t height = rows - r < kChain ? rows - r : kChain;
    narrow_block<T, kWidth>(dy + r * stride, x + r * stride, stride, height, mean, sum, product);
  }
}

// Other rows are read as columns.h says. Four are one link, of two additions among them; the up to three rows left over
// are links each.
constexpr int64_t kBlock = kTogether * (kChain - 4);

template <class T>
PRECISEBN_INLINE void add_wide_block(const T* dy, const T* x, int64_t stride, int64_t rows, int64_t channels,
                                     int64_t ahead, Column<typename Compute<T>::Vec>* columns) {
  for_each_four(rows, [&]<int kRows>(int64_t r) {
    const T *const from_dy = dy + r * stride, *const from_x = x + r * stride;
    for_each_column<T, kRows>(
        channels,
        [&](int row, int64_t byte) {
          __builtin_prefetch(reinterpret_cast<const char*>(from_dy + row * stride + ahead) + byte);
          __builtin_prefetch(reinterpret_cast<const char*>(from_x + row * stride + ahead) + byte);
        },
        [&]<bool kPartial>(int64_t k, int n) {
          constexpr int kL = kLanes<typename Compute<T>::Vec>;
          add_to_column<T, kRows, kPartial>(from_dy + k * kL, from_x + k * kL, stride, n, columns[k]);
        });
  });
}

template <class T>
void wide_rows(const T* dy, const T* x, int64_t stride, int64_t channels, int64_t rows, const double* mean, double* sum,
               double* product) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  const int64_t ahead = ahead_in_rows<T>(stride, channels);
  const auto lanes = [&](int64_t c) { return channels - c < kL ? static_cast<int>(channels - c) : kL; };
  Column<V> columns[kColumns<T>];
  for (int64_t c = 0; c < channels; c += kL) columns[c / kL] = centered<T>(mean + c, lanes(c));
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int64_t height = rows - r < kBlock ? rows - r : kBlock;
    add_wide_block(dy + r * stride, x + r * stride, stride, height, channels, ahead, columns);
    for (int64_t c = 0; c < channels; c += kL) {
      end_block(columns[c / kL], lanes(c), mean + c, sum + c, product + c);
    }
  }
}

template <class T>
void rows(const void* dy, const void* x, int64_t stride, int64_t channels, int64_t rows, const double* mean,
          double* sum, double* product) {
  const T *from_dy = static_cast<const T*>(dy), *from_x = static_cast<const T*>(x);
  constexpr int kL = kLanes<typename Compute<T>::Vec>;
  if (channels == kL) return narrow_rows<T, 1>(from_dy, from_x, stride, rows, mean, sum, product);
  if (channels == 2 * kL) return narrow_rows<T, 2>(from_dy, from_x, stride, rows, mean, sum, product);
  if (channels == 4 * kL) return narrow_rows<T, 4>(from_dy, from_x, stride, rows, mean, sum, product);
  if constexpr (kBytes == 64) {  // which has twice the registers
    if (channels == 8 * kL) return narrow_rows<T, 8>(from_dy, from_x, stride, rows, mean, sum, product);
  }
  for (int64_t c = 0; c < channels; c += kRun) {
    wide_rows(from_dy + c, from_x + c, stride, channels - c < kRun ? channels - c : kRun, rows, mean + c, sum + c,
              product + c);
  }
}

}  // namespace

const BackwardReduceKernels backward_reduce_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::cpu::PRECISEBN_ISA
