// What the operators that map every value of x to a value of their result have in common: how the result lies in
// memory, how threads share the work, and how coefficients [G, C] reach the lanes of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../strides.h"
#include "../torch.h"
#include "partition.h"
#include "view.h"

namespace precisebn::cpu {

// The arrangement for y = f(x): y is like x in strides, and `input`, with the same strides, has the values of x.
struct Arrangement {
  Tensor input;   // x, or a copy of it where x has no view of its own or empty_like(x) is laid out differently
  Tensor output;  // what the kernel writes
  Tensor result;  // what the operator returns: `output`, or its copy with the strides that empty_like(x) asks for
  View view;
};

Arrangement arrange(const Tensor& x);
Tensor finish(Arrangement& arrangement);

// dy is to have the shape and dtype of x.
void check_same(const char* op, const Tensor& dy, const Tensor& x);

// dy and x, or copies of them, with the same strides, and their view.
struct Pair {
  Tensor dy, x;
  View view;
};
Pair align(const Tensor& dy, const Tensor& x);

// The group of each sample; all 0 where there are no groups.
class Groups {
 public:
  explicit Groups(const std::optional<Tensor>& group)
      : ids_(group ? group->const_data_ptr<int64_t>() : nullptr), stride_(group ? group->stride(0) : 0) {}
  bool all_equal() const { return ids_ == nullptr; }
  int64_t operator[](int64_t sample) const { return ids_ ? ids_[sample * stride_] : 0; }

 private:
  const int64_t* ids_;
  int64_t stride_;
};

// Coefficients [G, C], or [C] of one group, row by row as wide as the (joined) rows of the view. None are zeros.
template <class T>
class PerGroup {
 public:
  PerGroup(const std::optional<Tensor>& t, const View& view, int64_t num_groups) {
    const bool as_given = !view.by_rows || (view.inner == 1 && rows_joined(view) == 1);
    stride_ = as_given ? view.channels : rows_joined(view) * view.width;
    if (!t || !as_given) {
      expanded_.resize(num_groups * stride_);
      values_ = expanded_.data();
    }
    if (!t) return;
    const bool fits = t->dim() == 2 ? t->size(0) == num_groups : t->dim() == 1 && num_groups == 1;
    STD_TORCH_CHECK(fits && t->size(t->dim() - 1) == view.channels,
                    "precisebn: every coefficient must have shape (G, C) = (", num_groups, ", ", view.channels, ")");
    dense_ = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    const T* from = dense_->const_data_ptr<T>();
    if (as_given) {
      values_ = from;
      return;
    }
    T* to = expanded_.data();
    for (int64_t g = 0; g < num_groups; ++g) {
      for (int64_t row = 0; row < rows_joined(view); ++row) {
        for (int64_t c = 0; c < view.channels; ++c) to = std::fill_n(to, view.inner, from[g * view.channels + c]);
      }
    }
  }
  const T* operator[](int64_t group) const { return values_ + group * stride_; }

 private:
  std::optional<Tensor> dense_;
  std::vector<T> expanded_;
  const T* values_;
  int64_t stride_;
};

// Calls planes(group, offset, first channel, channels, length) or rows(group, offset, stride, width, rows) for pieces
// that together cover the view, from several threads; every piece is of one group. Offsets and strides are in elements.
template <class Planes, class Rows>
void for_each_piece(const View& view, int64_t element_size, const Groups& groups, const Planes& planes,
                    const Rows& rows) {
  constexpr int64_t kGrainBytes = 32 << 10, kLongPlane = 16 << 10;
  if (view.empty()) return;
  const int64_t bytes = 2 * view.bytes(element_size);  // read and written
  if (view.by_rows) {
    const int64_t joined = rows_joined(view), per_sample = view.sample_rows;
    const bool seamless =
        groups.all_equal() && (per_sample == 1 ? view.row_stride == view.sample_stride || view.batch == 1
                                               : view.sample_stride == per_sample * view.row_stride);
    const int64_t total = view.batch * per_sample;
    const int64_t grain = grain_for(total, bytes, kGrainBytes / (view.width * element_size) + joined);
    torch::stable::parallel_for(0, total, grain, [&](int64_t row, int64_t end) {
      while (row < end) {
        const int64_t sample = row / per_sample, stop = seamless ? end : std::min(end, (sample + 1) * per_sample);
        const int64_t offset = sample * view.sample_stride + row % per_sample * view.row_stride;
        const int64_t count = stop - row, whole = count / joined, rest = count % joined;
        rows(groups[sample], offset, joined * view.row_stride, joined * view.width, whole);
        if (rest) rows(groups[sample], offset + whole * joined * view.row_stride, view.row_stride, view.width, rest);
        row = stop;
      }
    });
    return;
  }
  const int64_t parts = std::max<int64_t>(1, view.length / kLongPlane);
  const int64_t total = view.batch * view.channels * parts;
  const int64_t grain = grain_for(total, bytes, kGrainBytes * parts / (view.length * element_size) + 1);
  torch::stable::parallel_for(0, total, grain, [&](int64_t unit, int64_t end) {
    while (unit < end) {
      const int64_t plane = unit / parts, part = unit % parts, sample = plane / view.channels,
                    channel = plane % view.channels;
      const int64_t channels = parts > 1 ? 1 : std::min(view.channels - channel, end - unit);
      const int64_t begin = view.length * part / parts, stop = view.length * (part + 1) / parts;
      planes(groups[sample], sample * view.sample_stride + channel * view.plane_stride + begin, channel, channels,
             stop - begin);
      unit += channels;
    }
  });
}

}  // namespace precisebn::cpu
