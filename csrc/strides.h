// Whether tensors of one shape lie alike in memory, and how they are made to.
#pragma once

#include "torch.h"

namespace precisebn {

using torch::stable::Tensor;

// Where a dimension has one element, its stride does not matter.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// t, or a copy of it that lies as `like`, a dense tensor.
inline Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  if (same_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace precisebn
