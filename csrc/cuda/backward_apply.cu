// backward_apply: a * dy + b * x + c per (group, channel), by the kernel in map.h.
#include <array>

#include "../torch.h"
#include "map.h"
#include "operators.h"

namespace precisebn::cuda {
namespace {

template <class T, int size>
struct ApplyOp {
  using Type = T;
  using Real = Compute<T>;
  static constexpr int kSize = size, kInputs = 2, kCoefficients = 3, kRows = size == 1 ? 8 : 4;

  const T* inputs[kInputs];
  const Real* coefficients[kCoefficients];
  T* output;

  __device__ static Real formula(const Real (&dy_x)[2], const Real (&a_b_c)[3]) {
    return fma(a_b_c[0], dy_x[0], fma(a_b_c[1], dy_x[1], a_b_c[2]));
  }
};

}  // namespace

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& c,
                      const std::optional<Tensor>& group) {
  STD_TORCH_CHECK(x.dim() >= 2 && dy.dim() == x.dim() && dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(),
                  "precisebn::backward_apply: dy must have the shape and dtype of x, at least 2 dimensions");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Mapping to = mapping(x);
  const Tensor gradient = with_strides_of(dy, to.input);
  launch_map<ApplyOp>(to, groups_of(group, x.size(0), a.size(0)), std::array{gradient, to.input},
                      std::array<std::optional<Tensor>, 3>{a, b, c});
  return to.finish();
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("_backward_apply", TORCH_BOX(&backward_apply)); }

}  // namespace precisebn::cuda
