// normalize: scale * x + shift per (group, channel), by the kernel in map.h.
#include <array>

#include "../torch.h"
#include "map.h"
#include "operators.h"

namespace precisebn::cuda {
namespace {

template <class T, int size>
struct NormalizeOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 1, kCoefficients = 2, kRows = size == 1 ? 8 : 4;

  const T* inputs[kInputs];
  const Real* coefficients[kCoefficients];
  T* output;

  __device__ static Real formula(const Real (&x)[1], const Real (&scale_shift)[2]) {
    return fma(scale_shift[0], x[0], scale_shift[1]);
  }
};

}  // namespace

Tensor normalize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                 const std::optional<Tensor>& group) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::normalize: x must have at least 2 dimensions");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Mapping to = mapping(x);
  launch_map<NormalizeOp>(to, groups_of(group, x.size(0), scale.size(0)), std::array{to.input},
                          std::array<std::optional<Tensor>, 2>{scale, shift});
  return to.finish();
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_normalize", TORCH_BOX(&normalize)); }

}  // namespace precisebn::cuda
