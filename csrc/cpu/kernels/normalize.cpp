// scale * x + shift, one fused multiply-add per value between a load and a store: memory sets the pace, and the only
// care needed is to keep the coefficients in registers (planes) or in L1 (rows).
#include "normalize.h"

#include "vec.h"

namespace precisebn::PRECISEBN_ISA {
namespace {

template <class T>
void planes(const void* x, void* y, int64_t stride, int64_t channels, int64_t length, const void* scale,
            const void* shift) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = static_cast<const T*>(x) + c * stride;
    T* to = static_cast<T*>(y) + c * stride;
    const V a = broadcast<V>(static_cast<const Scalar*>(scale)[c]),
            b = broadcast<V>(static_cast<const Scalar*>(shift)[c]);
    int64_t i = 0;
    for (; i + kL <= length; i += kL) store(to + i, a * load(from + i) + b);
    const int rest = static_cast<int>(length - i);
    if (rest) store_first(to + i, a * load_first(from + i, rest) + b, rest);
  }
}

template <class T>
void rows(const void* x, void* y, int64_t stride, int64_t width, int64_t rows, const void* scale, const void* shift) {
  using V = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  constexpr int kL = kLanes<V>;
  const Scalar *a = static_cast<const Scalar*>(scale), *b = static_cast<const Scalar*>(shift);
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(x) + r * stride;
    T* to = static_cast<T*>(y) + r * stride;
    int64_t c = 0;
    for (; c + kL <= width; c += kL) store(to + c, load(a + c) * load(from + c) + load(b + c));
    const int rest = static_cast<int>(width - c);
    if (rest) store_first(to + c, load_first(a + c, rest) * load_first(from + c, rest) + load_first(b + c, rest), rest);
  }
}

}  // namespace

const NormalizeKernels normalize_kernels[kNumDtypes] = {
    {planes<float>, rows<float>},
    {planes<double>, rows<double>},
    {planes<Half>, rows<Half>},
    {planes<BFloat16>, rows<BFloat16>},
};

}  // namespace precisebn::PRECISEBN_ISA
