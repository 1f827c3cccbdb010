// normalize: scale * x + shift per (group, channel).
#include "kernels/normalize.h"
#include "../torch.h"
#include "elementwise.h"
#include "operators.h"

namespace precisebn {
namespace {

template <class Scalar>
void run(const Arrangement& to, const Tensor& scale, const Tensor& shift, const Groups& groups) {
  const NormalizeKernels& kernels = PRECISEBN_DISPATCH(normalize_kernels)[dtype_of(to.input)];
  const int64_t num_groups = scale.size(0);
  const Coefficients<Scalar> a(scale, to.view, num_groups), b(shift, to.view, num_groups);
  const auto element_size = static_cast<int64_t>(to.input.element_size());
  const char* x = static_cast<const char*>(to.input.const_data_ptr());
  char* y = static_cast<char*>(to.output.mutable_data_ptr());
  for_each_piece(
      to.view, element_size, groups,
      [&](int64_t group, int64_t offset, int64_t first, int64_t channels, int64_t length) {
        kernels.planes(x + offset * element_size, y + offset * element_size, to.view.plane_stride, channels, length,
                       a[group] + first, b[group] + first);
      },
      [&](int64_t group, int64_t offset, int64_t stride, int64_t width, int64_t rows) {
        kernels.rows(x + offset * element_size, y + offset * element_size, stride, width, rows, a[group], b[group]);
      });
}

template <class Scalar>
Tensor zeros(const Tensor& like) {
  Tensor zero = new_statistic({like.size(0), like.size(1)}, 2, dtype_of(like));
  std::fill_n(zero.mutable_data_ptr<Scalar>(), zero.numel(), Scalar{0});
  return zero;
}

}  // namespace

Tensor normalize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                 const std::optional<Tensor>& group) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::normalize: x must have at least 2 dimensions");
  STD_TORCH_CHECK(scale.dim() == 2, "precisebn::normalize: scale and shift must have shape (G, C)");
  check_group("normalize", group, x.size(0), scale.size(0));
  Arrangement to = arrange(x);
  const Groups groups(group);
  if (dtype_of(x) == kFloat64) {
    run<double>(to, scale, shift ? *shift : zeros<double>(scale), groups);
  } else {
    run<float>(to, scale, shift ? *shift : zeros<float>(scale), groups);
  }
  return finish(to);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("_normalize", TORCH_BOX(&normalize)); }

}  // namespace precisebn
