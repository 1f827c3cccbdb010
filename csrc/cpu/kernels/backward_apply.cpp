// a * dy + b * (x - center) + c: as in normalize.cpp, memory sets the pace.
#include "backward_apply.h"

#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

constexpr int kRowsAbreast = 4;

template <class T>
void planes(const void* dy, const void* x, void* dx, int64_t stride, int64_t channels, int64_t length,
            const void* center, const void* a, const void* b, const void* c) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const T *from_dy = static_cast<const T*>(dy) + channel * stride,
            *from_x = static_cast<const T*>(x) + channel * stride;
    T* to = static_cast<T*>(dx) + channel * stride;
    const V m = broadcast<V>(static_cast<const Scalar*>(center)[channel]);
    const V of_dy = broadcast<V>(static_cast<const Scalar*>(a)[channel]);
    const V of_x = broadcast<V>(static_cast<const Scalar*>(b)[channel]);
    const V shift = broadcast<V>(static_cast<const Scalar*>(c)[channel]);
    int64_t i = 0;
    for (; i + kL <= length; i += kL) {
      store(to + i, of_dy * load(from_dy + i) + (of_x * (load(from_x + i) - m) + shift));
    }
    const int rest = static_cast<int>(length - i);
    if (rest) {
      const V inner = of_x * (load_first(from_x + i, rest) - m) + shift;
      store_first(to + i, of_dy * load_first(from_dy + i, rest) + inner, rest);
    }
  }
}

// Several rows side by side, as in normalize.cpp.
template <class T, int kRows>
PRECISEBN_INLINE void rows_abreast(const T* dy, const T* x, T* dx, int64_t stride, int64_t width,
                                   const typename Compute<T>::Scalar* center, const typename Compute<T>::Scalar* a,
                                   const typename Compute<T>::Scalar* b, const typename Compute<T>::Scalar* c) {
  using V = typename Compute<T>::Vec;
  constexpr int kL = kLanes<V>;
  int64_t i = 0;
  for (; i + kL <= width; i += kL) {
    const V m = load(center + i), of_dy = load(a + i), of_x = load(b + i), shift = load(c + i);
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * stride + i;
      store(dx + at, of_dy * load(dy + at) + (of_x * (load(x + at) - m) + shift));
    }
  }
  const int rest = static_cast<int>(width - i);
  if (rest) {
    const V m = load_first(center + i, rest), of_dy = load_first(a + i, rest), of_x = load_first(b + i, rest),
            shift = load_first(c + i, rest);
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * stride + i;
      const V of_difference = of_x * (load_first(x + at, rest) - m) + shift;
      store_first(dx + at, of_dy * load_first(dy + at, rest) + of_difference, rest);
    }
  }
}

template <class T>
void rows(const void* dy, const void* x, void* dx, int64_t stride, int64_t width, int64_t rows, const void* center,
          const void* a, const void* b, const void* c) {
  using Scalar = typename Compute<T>::Scalar;
  const auto *m = static_cast<const Scalar*>(center), *of_dy = static_cast<const Scalar*>(a),
             *of_x = static_cast<const Scalar*>(b), *shift = static_cast<const Scalar*>(c);
  const auto run = [&]<int kRows>(int64_t r) {
    rows_abreast<T, kRows>(static_cast<const T*>(dy) + r * stride, static_cast<const T*>(x) + r * stride,
                           static_cast<T*>(dx) + r * stride, stride, width, m, of_dy, of_x, shift);
  };
  int64_t r = 0;
  for (; r + kRowsAbreast <= rows; r += kRowsAbreast) run.template operator()<kRowsAbreast>(r);
  for (; r < rows; ++r) run.template operator()<1>(r);
}

}  // namespace

const BackwardApplyKernels backward_apply_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::cpu::PRECISEBN_ISA
