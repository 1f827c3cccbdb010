// How the values of a tensor (N, C, *) lie in memory, reduced to what the kernels distinguish: planes of one channel
// (NCHW) or rows of all channels (NHWC).
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "../torch.h"
#include "dispatch.h"

namespace precisebn::cpu {

using torch::stable::Tensor;

struct View {
  int64_t batch, channels, length;  // length: values per channel of one sample
  int64_t sample_stride;            // elements

  // false: a sample is `channels` planes of `length` contiguous values, `plane_stride` apart.
  // true: a sample is `sample_rows` rows of `width` contiguous values, `row_stride` apart; value v of a row is of
  // channel v / inner % channels. Mostly width = channels and inner = 1. Planes too short to fill a vector are taken as
  // one row: width = channels * length, inner = length.
  bool by_rows;
  int64_t plane_stride;
  int64_t sample_rows, width, row_stride, inner;

  int64_t bytes(int64_t element_size) const { return batch * channels * length * element_size; }
  bool empty() const { return batch == 0 || channels == 0 || length == 0; }
};

// The view of x, or nothing where its strides fit neither form.
std::optional<View> view_of(const Tensor& x);

// x itself where it has a view, else a contiguous copy.
Tensor with_view(const Tensor& x);

Dtype dtype_of(const Tensor& x);

// An uninitialized tensor of one or two dimensions, and one of the size and strides of a dense x. A call through the
// dispatcher would take as long as the statistics of a small x.
Tensor new_statistic(std::array<int64_t, 2> size, int64_t dim, Dtype dtype = kFloat64);
Tensor new_like(const Tensor& x);

// One group number per sample, each in range: the last line before memory, also behind the checks in Python.
void check_group(const char* op, const std::optional<Tensor>& group, int64_t batch, int64_t num_groups);

}  // namespace precisebn::cpu
