#include "rows.h"

#include <algorithm>
#include <type_traits>

#include "../torch.h"

namespace precisebn::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls f(T{}) with the type of the elements.
template <class F>
void dispatch(const Tensor& t, const F& f) {
  switch (dtype_of(t)) {
    case kFloat32:
      return f(float{});
    case kFloat16:
      return f(Half{});
    case kBFloat16:
      return f(BFloat16{});
    default:
      return f(double{});
  }
}

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace

Rows::Rows(const char* op, const char* name, const Tensor& t, int64_t channels) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK((dim == 1 || dim == 2) && t.size(dim - 1) == channels, "precisebn::", op, ": ", name,
                  " must have shape (C,) or (G, C), C = ", channels);
  size_ = dim == 2 ? t.size(0) : 1;
  const int64_t row_stride = dim == 2 ? t.stride(0) : 0, step = t.stride(dim - 1);
  if (dtype_of(t) == kFloat64 && (step == 1 || channels <= 1)) {
    kept_ = t;
    values_ = t.const_data_ptr<double>();
    stride_ = size_ == 1 ? 0 : row_stride;
    return;
  }
  converted_.resize(size_ * channels);
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    double* to = converted_.data();
    for (int64_t row = 0; row < size_; ++row) {
      const T* from = static_cast<const T*>(t.const_data_ptr()) + row * row_stride;
      for (int64_t c = 0; c < channels; ++c) *to++ = static_cast<Wide<T>>(from[c * step]);
    }
  });
  values_ = converted_.data();
  stride_ = size_ == 1 ? 0 : channels;
}

int64_t common_rows(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t rows = 1;
  for (const int64_t size : sizes) {
    if (size != 1) rows = size;
  }
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size == 1 || size == rows, "precisebn::", op, ": operands have ", size, " and ", rows, " rows");
  }
  return rows;
}

Counts::Counts(const char* op, const Tensor& t, int64_t rows)
    : values_(t.const_data_ptr<double>()), stride_(t.dim() == 1 ? t.stride(0) : 0) {
  STD_TORCH_CHECK(t.dim() <= 1 && t.numel() == rows, "precisebn::", op,
                  ": count must have shape () or (G,), R = ", rows);
}

void write_row(const Tensor& t, int64_t row, const double* values, int64_t channels) {
  const int64_t dim = t.dim(), step = t.stride(dim - 1), offset = dim == 2 ? row * t.stride(0) : 0;
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(t.mutable_data_ptr()) + offset;
    for (int64_t c = 0; c < channels; ++c) to[c * step] = static_cast<T>(static_cast<Wide<T>>(values[c]));
  });
}

}  // namespace precisebn::cpu
