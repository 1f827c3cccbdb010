// a * dy + b * (x - center) + c: as in normalize.cpp, memory sets the pace.
#include "backward_apply.h"

#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

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

// One row after the other, as in normalize.cpp.
template <class T>
void rows(const void* dy, const void* x, void* dx, int64_t stride, int64_t width, int64_t rows, const void* center,
          const void* a, const void* b, const void* c) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  const auto *m = static_cast<const Scalar*>(center), *of_dy = static_cast<const Scalar*>(a),
             *of_x = static_cast<const Scalar*>(b), *shift = static_cast<const Scalar*>(c);
  const T *from_dy = static_cast<const T*>(dy), *from_x = static_cast<const T*>(x);
  T* to = static_cast<T*>(dx);
  for (int64_t r = 0; r < rows; ++r, from_dy += stride, from_x += stride, to += stride) {
    int64_t i = 0;
    for (; i + kL <= width; i += kL) {
      const V inner = load(of_x + i) * (load(from_x + i) - load(m + i)) + load(shift + i);
      store(to + i, load(of_dy + i) * load(from_dy + i) + inner);
    }
    const int rest = static_cast<int>(width - i);
    if (rest) {
      const V difference = load_first(from_x + i, rest) - load_first(m + i, rest);
      const V inner = load_first(of_x + i, rest) * difference + load_first(shift + i, rest);
      store_first(to + i, load_first(of_dy + i, rest) * load_first(from_dy + i, rest) + inner, rest);
    }
  }
}

}  // namespace

const BackwardApplyKernels backward_apply_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::cpu::PRECISEBN_ISA
