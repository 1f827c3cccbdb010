#include "elementwise.h"

namespace precisebn {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

}  // namespace

Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  if (same_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

Arrangement arrange(const Tensor& x) {
  Tensor result = torch::stable::empty_like(x);
  if (const auto view = view_of(result)) {
    if (same_strides(x, result)) return {x, result, result, *view};
    torch::stable::copy_(result, x);
    return {result, result, result, *view};
  }
  const Tensor dense = torch::stable::contiguous(x);
  return {dense, torch::stable::empty_like(dense), result, *view_of(dense)};
}

Tensor finish(Arrangement& arrangement) {
  if (arrangement.output.get() != arrangement.result.get()) {
    torch::stable::copy_(arrangement.result, arrangement.output);
  }
  return arrangement.result;
}

Groups::Groups(const std::optional<Tensor>& group, int64_t batch, int64_t num_groups) {
  if (!group) return;
  STD_TORCH_CHECK(group->dim() == 1 && group->size(0) == batch,
                  "precisebn: group must have one element per sample of x");
  ids_ = group->const_data_ptr<int64_t>();
  stride_ = group->stride(0);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t id = (*this)[i];
    STD_TORCH_CHECK(id >= 0 && id < num_groups, "precisebn: group holds ", id, ", but there are ", num_groups);
  }
}

}  // namespace precisebn
