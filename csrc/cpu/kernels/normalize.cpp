// (x - center) * scale + shift, a subtraction and a fused multiply-add per value between a load and a store: memory
// sets the pace, and the only care needed is to keep the coefficients in registers (planes) or in L1 (rows).
#include "normalize.h"

#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kRowsAbreast = 4;

template <class T>
void planes(const void* x, void* y, int64_t stride, int64_t channels, int64_t length, const void* center,
            const void* scale, const void* shift) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = static_cast<const T*>(x) + c * stride;
    T* to = static_cast<T*>(y) + c * stride;
    const V m = broadcast<V>(static_cast<const Scalar*>(center)[c]),
            a = broadcast<V>(static_cast<const Scalar*>(scale)[c]),
            b = broadcast<V>(static_cast<const Scalar*>(shift)[c]);
    int64_t i = 0;
    for (; i + kL <= length; i += kL) store(to + i, (load(from + i) - m) * a + b);
    const int rest = static_cast<int>(length - i);
    if (rest) store_first(to + i, (load_first(from + i, rest) - m) * a + b, rest);
  }
}

// Several rows side by side: the coefficients are loaded once for them.
template <class T, int kRows>
PRECISEBN_INLINE void rows_abreast(const T* from, T* to, int64_t stride, int64_t width,
                                   const typename Compute<T>::Scalar* center, const typename Compute<T>::Scalar* scale,
                                   const typename Compute<T>::Scalar* shift) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  int64_t i = 0;
  for (; i + kL <= width; i += kL) {
    const V m = load(center + i), a = load(scale + i), b = load(shift + i);
    for (int r = 0; r < kRows; ++r) store(to + r * stride + i, (load(from + r * stride + i) - m) * a + b);
  }
  const int rest = static_cast<int>(width - i);
  if (rest) {
    const V m = load_first(center + i, rest), a = load_first(scale + i, rest), b = load_first(shift + i, rest);
    for (int r = 0; r < kRows; ++r) {
      store_first(to + r * stride + i, (load_first(from + r * stride + i, rest) - m) * a + b, rest);
    }
  }
}

template <class T>
void rows(const void* x, void* y, int64_t stride, int64_t width, int64_t rows, const void* center, const void* scale,
          const void* shift) {
  using Scalar = typename Compute<T>::Scalar;
  const auto *m = static_cast<const Scalar*>(center), *a = static_cast<const Scalar*>(scale),
             *b = static_cast<const Scalar*>(shift);
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  int64_t r = 0;
  for (; r + kRowsAbreast <= rows; r += kRowsAbreast) {
    rows_abreast<T, kRowsAbreast>(from + r * stride, to + r * stride, stride, width, m, a, b);
  }
  for (; r < rows; ++r) rows_abreast<T, 1>(from + r * stride, to + r * stride, stride, width, m, a, b);
}

}  // namespace

const NormalizeKernels normalize_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::cpu::PRECISEBN_ISA
