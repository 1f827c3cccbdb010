// Small tensors, one value per channel or per (row, channel), of any floating dtype and strides: what the operators
// that work on statistics and parameters alone read and write, in float64. The type is looked at for each value; there
// are few.
#pragma once

#include <cstdint>
#include <optional>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tensors.h"

namespace precisebn::cuda {

__device__ inline double read_as(ScalarType type, const void* from, int64_t i) {
  if (type == ScalarType::Float) return static_cast<const float*>(from)[i];
  if (type == ScalarType::Half) return __half2float(static_cast<const __half*>(from)[i]);
  if (type == ScalarType::BFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
  return static_cast<const double*>(from)[i];
}

__device__ inline void write_as(ScalarType type, void* to, int64_t i, double value) {
  const auto single = static_cast<float>(value);
  if (type == ScalarType::Float) {
    static_cast<float*>(to)[i] = single;
  } else if (type == ScalarType::Half) {
    static_cast<__half*>(to)[i] = __float2half_rn(single);
  } else if (type == ScalarType::BFloat16) {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(single);
  } else {
    static_cast<double*>(to)[i] = value;
  }
}

// (C), or (G, C). A single row serves for any row number.
struct Rows {
  void* data;  // null: there is no such tensor
  ScalarType type;
  int64_t size, row_stride, stride;

  __device__ double read(int64_t row, int64_t channel) const {
    return read_as(type, data, row * row_stride + channel * stride);
  }
  __device__ double read_or(double otherwise, int64_t row, int64_t channel) const {
    return data == nullptr ? otherwise : read(row, channel);
  }
  __device__ void write(int64_t row, int64_t channel, double value) const {
    write_as(type, data, row * row_stride + channel * stride, value);
  }
};

// `op` and `name` are for the error where t has another shape, dtype or device.
inline Rows rows_of(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& like,
                    int64_t channels) {
  if (!t) return {nullptr, ScalarType::Double, 1, 0, 0};
  const ScalarType type = t->scalar_type();
  const int64_t dim = t->dim();
  STD_TORCH_CHECK((dim == 1 || dim == 2) && t->size(dim - 1) == channels && t->is_cuda() &&
                      t->get_device_index() == like.get_device_index() &&
                      (type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                       type == ScalarType::BFloat16),
                  "precisebn::", op, ": ", name, " must be floating point, (C,) or (G, C), on the device of mean");
  const int64_t size = dim == 2 ? t->size(0) : 1;
  return {const_cast<void*>(t->const_data_ptr()), type, size, size == 1 ? 0 : t->stride(0), t->stride(dim - 1)};
}

// One number per row, float64: () or (G).
struct Counts {
  const double* data;  // null: there are none
  int64_t stride;

  __device__ double operator[](int64_t row) const { return data[row * stride]; }
  // By what a sum over values is divided: 1 where there are none.
  __device__ double divisor(int64_t row) const { return data == nullptr ? 1.0 : fmax((*this)[row], 1.0); }
};

inline Counts counts_of(const char* op, const std::optional<Tensor>& t, const Tensor& like, int64_t rows) {
  if (!t) return {nullptr, 0};
  STD_TORCH_CHECK(t->dim() <= 1 && t->numel() == rows && t->scalar_type() == ScalarType::Double && t->is_cuda() &&
                      t->get_device_index() == like.get_device_index(),
                  "precisebn::", op, ": count must be float64, () or (G,), on the device of mean");
  return {data<double>(*t), t->dim() == 1 && rows > 1 ? t->stride(0) : 0};
}

inline int64_t channels_of(const char* op, const Tensor& mean) {
  STD_TORCH_CHECK((mean.dim() == 1 || mean.dim() == 2) && mean.is_cuda(), "precisebn::", op,
                  ": mean must have shape (C,) or (G, C)");
  return mean.size(mean.dim() - 1);
}

constexpr int kRowThreads = 256;

inline unsigned blocks_for(int64_t values) { return static_cast<unsigned>((values + kRowThreads - 1) / kRowThreads); }

}  // namespace precisebn::cuda
