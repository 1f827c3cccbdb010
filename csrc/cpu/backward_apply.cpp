// backward_apply: a * dy + b * (x - center) + c per (group, channel).
#include "kernels/backward_apply.h"
#include "../operators.h"
#include "../torch.h"
#include "elementwise.h"

namespace precisebn::cpu {
namespace {

template <class Scalar>
void run(const Tensor& dy, const Arrangement& to, const Tensor& center, const Tensor& a, const Tensor& b,
         const Tensor& c, const Groups& groups) {
  const BackwardApplyKernels& kernels = PRECISEBN_DISPATCH(backward_apply_kernels)[dtype_of(to.input)];
  const int64_t num_groups = a.size(0);
  const PerGroup<Scalar> centers(center, to.view, num_groups), of_dy(a, to.view, num_groups),
      of_x(b, to.view, num_groups), shifts(c, to.view, num_groups);
  const auto element_size = static_cast<int64_t>(to.input.element_size());
  const char *dy_data = static_cast<const char*>(dy.const_data_ptr()),
             *x_data = static_cast<const char*>(to.input.const_data_ptr());
  char* dx_data = static_cast<char*>(to.output.mutable_data_ptr());
  for_each_piece(
      to.view, element_size, groups,
      [&](int64_t group, int64_t offset, int64_t first, int64_t channels, int64_t length) {
        const int64_t byte = offset * element_size;
        kernels.planes(dy_data + byte, x_data + byte, dx_data + byte, to.view.plane_stride, channels, length,
                       centers[group] + first, of_dy[group] + first, of_x[group] + first, shifts[group] + first);
      },
      [&](int64_t group, int64_t offset, int64_t stride, int64_t width, int64_t rows) {
        const int64_t byte = offset * element_size;
        kernels.rows(dy_data + byte, x_data + byte, dx_data + byte, stride, width, rows, centers[group], of_dy[group],
                     of_x[group], shifts[group]);
      });
}

}  // namespace

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& center, const Tensor& a, const Tensor& b,
                      const Tensor& c, const std::optional<Tensor>& group) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::backward_apply: x must have at least 2 dimensions");
  STD_TORCH_CHECK(a.dim() == 2, "precisebn::backward_apply: center, a, b and c must have shape (G, C)");
  check_same("backward_apply", dy, x);
  check_group("backward_apply", group, x.size(0), a.size(0));
  Arrangement to = arrange(x);
  const Tensor aligned = with_strides_of(dy, to.input);
  const Groups groups(group);
  if (dtype_of(x) == kFloat64) {
    run<double>(aligned, to, center, a, b, c, groups);
  } else {
    run<float>(aligned, to, center, a, b, c, groups);
  }
  return finish(to);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("_backward_apply", TORCH_BOX(&backward_apply)); }

}  // namespace precisebn::cpu
