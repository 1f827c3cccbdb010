// normalize: (x - center) * scale + shift per (group, channel).
#include "kernels/normalize.h"
#include "../operators.h"
#include "../torch.h"
#include "elementwise.h"

namespace precisebn::cpu {
namespace {

template <class Scalar>
void run(const Tensor& input, const Arrangement& to, const std::optional<Tensor>& center, const Tensor& scale,
         const std::optional<Tensor>& shift, const Groups& groups) {
  const NormalizeKernels& kernels = PRECISEBN_DISPATCH(normalize_kernels)[dtype_of(input)];
  const int64_t num_groups = scale.size(0);
  const PerGroup<Scalar> centers(center, to.view, num_groups), scales(scale, to.view, num_groups),
      shifts(shift, to.view, num_groups);
  const auto element_size = static_cast<int64_t>(input.element_size());
  const char* x = static_cast<const char*>(input.const_data_ptr());
  char* y = static_cast<char*>(to.output.mutable_data_ptr());
  for_each_piece(
      to.view, element_size, groups,
      [&](int64_t group, int64_t offset, int64_t first, int64_t channels, int64_t length) {
        kernels.planes(x + offset * element_size, y + offset * element_size, to.view.plane_stride, channels, length,
                       centers[group] + first, scales[group] + first, shifts[group] + first);
      },
      [&](int64_t group, int64_t offset, int64_t stride, int64_t width, int64_t rows) {
        kernels.rows(x + offset * element_size, y + offset * element_size, stride, width, rows, centers[group],
                     scales[group], shifts[group]);
      });
}

Tensor like_x(const Tensor& x, const std::optional<Tensor>& center, const Tensor& scale,
              const std::optional<Tensor>& shift, const std::optional<Tensor>& group) {
  return normalize(x, center, scale, shift, group, x);
}

}  // namespace

Tensor normalize(const Tensor& x, const std::optional<Tensor>& center, const Tensor& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& group, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::normalize: x must have at least 2 dimensions");
  STD_TORCH_CHECK(scale.dim() == 2, "precisebn::normalize: center, scale and shift must have shape (G, C)");
  check_group("normalize", group, x.size(0), scale.size(0));
  Arrangement to = arrange(like);
  const Tensor input = x.get() == like.get() ? to.input : with_strides_of(x, to.input);
  const Groups groups(group);
  if (dtype_of(x) == kFloat64) {
    run<double>(input, to, center, scale, shift, groups);
  } else {
    run<float>(input, to, center, scale, shift, groups);
  }
  return finish(to);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("_normalize", TORCH_BOX(&like_x)); }

}  // namespace precisebn::cpu
