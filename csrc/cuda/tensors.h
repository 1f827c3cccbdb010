// From tensors to what kernels take: the view of a tensor, the copy that has one where it has none, the type as a
// template argument, and the stream.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include <cuda_runtime.h>

#include "../strides.h"
#include "../torch.h"
#include "partition.h"
#include "vec.h"

namespace precisebn::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- Layout --------------------------------------------------------------------------------------------------------

// Whether the elements lie densely in memory, the last dimension innermost; or, channels-last, dimension 1.
inline bool is_dense(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto step = [&](int64_t d) {
    const bool fits = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fits;
  };
  bool dense = !channels_last || step(1);
  for (int64_t d = x.dim() - 1; d >= 0; --d) dense = dense && ((channels_last && d == 1) || step(d));
  return dense;
}

inline std::optional<View> view_of(const Tensor& x) {
  View view{x.size(0), x.size(1), 1, true};
  for (int64_t d = 2; d < x.dim(); ++d) view.length *= x.size(d);
  if (view.values() == 0 || is_dense(x, false)) return view;
  view.planes = false;
  if (is_dense(x, true)) return view;
  return std::nullopt;
}

// x itself where it has a view, else a copy that has one.
inline Tensor dense(const Tensor& x) {
  if (view_of(x)) return x;
  using torch::headeronly::MemoryFormat;
  const bool channels_inside = x.stride(1) == 1 && x.size(1) > 1;
  const auto format = channels_inside && x.dim() == 4   ? MemoryFormat::ChannelsLast
                      : channels_inside && x.dim() == 5 ? MemoryFormat::ChannelsLast3d
                                                        : MemoryFormat::Contiguous;
  return torch::stable::contiguous(x, format);
}

// y = f(x): y is what empty_like(x) gives. Where x and y both have the same view, f reads the one and writes the other;
// else f goes from a dense copy of x to a dense tensor, which is then copied.
struct Mapping {
  Tensor input, output, result;
  View view;

  Tensor finish() {
    if (output.get() != result.get()) torch::stable::copy_(result, output);
    return result;
  }
};

inline Mapping mapping(const Tensor& x) {
  Tensor result = torch::stable::empty_like(x);
  const Tensor input = dense(x);
  const Tensor output = same_strides(input, result) ? result : torch::stable::empty_like(input);
  return {input, output, result, *view_of(input)};
}

inline bool on_device_of(const Tensor& t, const Tensor& x) {
  return t.is_cuda() && t.get_device_index() == x.get_device_index();
}

// dy is to have the shape, dtype and device of x.
inline void check_same(const char* op, const Tensor& dy, const Tensor& x) {
  bool same = x.dim() >= 2 && dy.dim() == x.dim() && dy.scalar_type() == x.scalar_type() && on_device_of(dy, x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "precisebn::", op,
                  ": dy must have the shape, dtype and device of x, which must have at least 2 dimensions");
}

// Numbers (G, C), or (C) of one group, contiguous and of the type that is computed with.
template <class T>
Tensor per_group(const Tensor& t, const Tensor& x) {
  constexpr auto type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK((t.dim() == 1 || (t.dim() == 2 && t.size(0) >= 1)) && t.size(t.dim() - 1) == x.size(1) &&
                      t.scalar_type() == type && on_device_of(t, x),
                  "precisebn: coefficients must have shape (G, C), the dtype of the computation and the device of x");
  return torch::stable::contiguous(t);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with the type of the elements.
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "precisebn: x must be float32, float64, float16 or bfloat16");
  }
}

// ---- Groups --------------------------------------------------------------------------------------------------------

// The group of each sample. On the device a number cannot be refused without waiting for it: samples with one out of
// range belong to no group.
struct Groups {
  const int64_t* ids;  // null: all samples are of group 0
  int64_t stride, count;

  static constexpr int kNone = -1;
  __device__ int operator[](int64_t sample) const {
    if (ids == nullptr) return 0;
    const int64_t id = __ldg(ids + sample * stride);
    return id >= 0 && id < count ? static_cast<int>(id) : kNone;
  }
};

inline Groups groups_of(const std::optional<Tensor>& group, const Tensor& x, int64_t num_groups) {
  STD_TORCH_CHECK(num_groups >= 1 && num_groups < (int64_t{1} << 31), "precisebn: num_groups must be at least 1");
  if (!group) return {nullptr, 0, 1};
  STD_TORCH_CHECK(group->dim() == 1 && group->size(0) == x.size(0) && group->scalar_type() == ScalarType::Long &&
                      on_device_of(*group, x),
                  "precisebn: group must be int64, one element per sample of x, on the device of x");
  return {data<int64_t>(*group), group->stride(0), num_groups};
}

// ---- The device ----------------------------------------------------------------------------------------------------

// Makes the device of x the current one for its lifetime.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : device(x.get_device_index()), guard_(device) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  }

  const int32_t device;
  cudaStream_t stream;
  int multiprocessors;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace precisebn::cuda
