// backward_apply: a * dy + b * (x - center) + c per (group, channel), by the kernel in map.h.
#include <array>

#include "../operators.h"
#include "../torch.h"
#include "formulas.h"
#include "map.h"

namespace precisebn::cuda {
namespace {

template <class T, int size>
struct ApplyOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 2, kCoefficients = 4, kRows = size == 1 ? 8 : 4;

  const T* inputs[kInputs];
  const Real* coefficients[kCoefficients];
  T* output;

  __device__ static Real formula(const Real (&dy_x)[2], const Real (&center_a_b_c)[4]) {
    return applied(dy_x, center_a_b_c);
  }
};

}  // namespace

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& center, const Tensor& a, const Tensor& b,
                      const Tensor& c, const std::optional<Tensor>& group) {
  check_same("backward_apply", dy, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Mapping to = mapping(x);
  const Tensor gradient = with_strides_of(dy, to.input);
  launch_map<ApplyOp>(to, groups_of(group, x, a.size(0)), std::array{gradient, to.input},
                      std::array<std::optional<Tensor>, 4>{center, a, b, c});
  return to.finish();
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_backward_apply", TORCH_BOX(&backward_apply)); }

}  // namespace precisebn::cuda
