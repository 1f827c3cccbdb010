#include "elementwise.h"

namespace precisebn::cpu {
void check_same(const char* op, const Tensor& dy, const Tensor& x) {
  bool same = dy.dim() == x.dim() && dtype_of(dy) == dtype_of(x);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = dy.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "precisebn::", op, ": dy must have the shape and dtype of x");
}

Pair align(const Tensor& dy, const Tensor& x) {
  if (same_strides(dy, x)) {
    if (const auto view = view_of(x)) return {dy, x, *view};
  }
  Tensor dense = new_like(x);
  if (!view_of(dense)) dense = torch::stable::contiguous(dense);
  return {with_strides_of(dy, dense), with_strides_of(x, dense), *view_of(dense)};
}

Arrangement arrange(const Tensor& x) {
  Tensor result = new_like(x);
  if (const auto view = view_of(result)) {
    if (same_strides(x, result)) return {x, result, result, *view};
    torch::stable::copy_(result, x);
    return {result, result, result, *view};
  }
  const Tensor dense = torch::stable::contiguous(x);
  return {dense, new_like(dense), result, *view_of(dense)};
}

Tensor finish(Arrangement& arrangement) {
  if (arrangement.output.get() != arrangement.result.get()) {
    torch::stable::copy_(arrangement.result, arrangement.output);
  }
  return arrangement.result;
}

}  // namespace precisebn::cpu
