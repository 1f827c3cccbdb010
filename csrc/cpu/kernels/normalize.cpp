// (x - center) * scale + shift, a subtraction and a fused multiply-add per value between a load and a store: memory
// sets the pace, and the only care needed is to keep the coefficients in registers (planes) or in L1 (rows).
#include "normalize.h"

#include "vec.h"

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

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

// One row after the other, though the coefficients are loaded anew for each: they come from L1, and memory is up to
// half faster than where several rows are read and written side by side.
template <class T>
void rows(const void* x, void* y, int64_t stride, int64_t width, int64_t rows, const void* center, const void* scale,
          const void* shift) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  const auto *m = static_cast<const Scalar*>(center), *a = static_cast<const Scalar*>(scale),
             *b = static_cast<const Scalar*>(shift);
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  for (int64_t r = 0; r < rows; ++r, from += stride, to += stride) {
    int64_t i = 0;
    for (; i + kL <= width; i += kL) store(to + i, (load(from + i) - load(m + i)) * load(a + i) + load(b + i));
    const int rest = static_cast<int>(width - i);
    if (rest) {
      const V difference = load_first(from + i, rest) - load_first(m + i, rest);
      store_first(to + i, difference * load_first(a + i, rest) + load_first(b + i, rest), rest);
    }
  }
}

}  // namespace

const NormalizeKernels normalize_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::cpu::PRECISEBN_ISA
