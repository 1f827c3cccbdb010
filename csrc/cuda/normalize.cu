// normalize: (x - center) * scale + shift per (group, channel), by the kernel in map.h.
#include <array>

#include "../operators.h"
#include "formulas.h"
#include "map.h"

namespace precisebn::cuda {
namespace {

template <class T, int size>
struct NormalizeOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 1, kCoefficients = 3, kRows = size == 1 ? 8 : 4;

  const T* inputs[kInputs];
  const Real* coefficients[kCoefficients];
  T* output;

  __device__ static Real formula(const Real (&x)[1], const Real (&center_scale_shift)[3]) {
    return normalized(x, center_scale_shift);
  }
};

Tensor like_x(const Tensor& x, const std::optional<Tensor>& center, const Tensor& scale,
              const std::optional<Tensor>& shift, const std::optional<Tensor>& group) {
  return normalize(x, center, scale, shift, group, x);
}

}  // namespace

Tensor normalize(const Tensor& x, const std::optional<Tensor>& center, const Tensor& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& group, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() >= 2 && scale.dim() == 2,
                  "precisebn::normalize: x must have at least 2 dimensions, center, scale and shift 2");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Mapping to = mapping(like);
  const Tensor input = x.get() == like.get() ? to.input : with_strides_of(x, to.input);
  launch_map<NormalizeOp>(to, groups_of(group, x, scale.size(0)), std::array{input},
                          std::array<std::optional<Tensor>, 3>{center, scale, shift});
  return to.finish();
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_normalize", TORCH_BOX(&like_x)); }

}  // namespace precisebn::cuda
