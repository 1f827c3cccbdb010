// Sums of dy and of dy * (x - mean), in one reading. Products and sums are float32 lanes for chains of at most 32, and
// float64 beyond. The float32 lanes subtract the mean rounded to float32; what rounding took off the mean is put back
// as (rounded - mean) * sum dy, in float64, once a block. Products that overflow or underflow float32 do so here as
// they would in the float32 backward of torch.
#include "backward_reduce.h"

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

// kWidth vectors of channels, or one of which only the first n lanes count.
template <class T, int kWidth, bool kPartial>
PRECISEBN_INLINE void add_columns(const T* dy, const T* x, int64_t stride, int64_t rows, int n, const double* mean,
                                  double* sum, double* product) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  alignas(64) Scalar rounded[kWidth * kL] = {};
  for (int i = 0; i < n; ++i) rounded[i] = static_cast<Scalar>(mean[i]);
  V sums[kWidth] = {}, products[kWidth] = {};
  for (int64_t r = 0; r < rows; ++r, dy += stride, x += stride) {
    for (int k = 0; k < kWidth; ++k) {
      const V g = kPartial ? load_first(dy, n) : load(dy + k * kL);
      sums[k] += g;
      products[k] += g * ((kPartial ? load_first(x, n) : load(x + k * kL)) - load(rounded + k * kL));
    }
  }
  alignas(64) Scalar block_sum[kWidth * kL], block_product[kWidth * kL];
  for (int k = 0; k < kWidth; ++k) {
    store(block_sum + k * kL, sums[k]);
    store(block_product + k * kL, products[k]);
  }
  for (int i = 0; i < n; ++i) {
    const double s = block_sum[i];
    sum[i] += s;
    product[i] += block_product[i] + (static_cast<double>(rounded[i]) - mean[i]) * s;
  }
}

template <class T>
void rows(const void* dy, const void* x, int64_t stride, int64_t width, int64_t rows, const double* mean, double* sum,
          double* product) {
  constexpr int kL = kLanes<typename Compute<T>::Vec>, kColumns = 4;
  for (int64_t r = 0; r < rows; r += kChain) {
    const T *g = static_cast<const T*>(dy) + r * stride, *v = static_cast<const T*>(x) + r * stride;
    const int64_t height = rows - r < kChain ? rows - r : kChain;
    int64_t c = 0;
    for (; c + kColumns * kL <= width; c += kColumns * kL) {
      add_columns<T, kColumns, false>(g + c, v + c, stride, height, kColumns * kL, mean + c, sum + c, product + c);
    }
    for (; c + kL <= width; c += kL) {
      add_columns<T, 1, false>(g + c, v + c, stride, height, kL, mean + c, sum + c, product + c);
    }
    const int rest = static_cast<int>(width - c);
    if (rest) add_columns<T, 1, true>(g + c, v + c, stride, height, rest, mean + c, sum + c, product + c);
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
