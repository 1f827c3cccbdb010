// moments: count, mean and m2 per (group, channel). Tasks (slab of samples x block of channels, see partition.h) each
// reduce their values into moments of their own, with the kernels of moments_kernel.cpp; a second, small pass merges
// the slabs of each group in order.
#include "../moments.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "moments_kernel.h"
#include "moments_of.h"
#include "partition.h"

namespace precisebn {
namespace {

class Reduction {
 public:
  Reduction(const Tensor& x, const View& view, const std::optional<Tensor>& group, int64_t num_groups)
      : data_(static_cast<const char*>(x.const_data_ptr())),
        element_size_(static_cast<int64_t>(x.element_size())),
        view_(view),
        kernels_(PRECISEBN_DISPATCH(moments_kernels)[dtype_of(x)]),
        partition_(partition(view, element_size_, group, num_groups)),
        slab_mean_(new double[partition_.slabs.size() * view.channels]),
        slab_m2_(new double[partition_.slabs.size() * view.channels]) {}

  void run(double* count, double* mean, double* m2) {
    const int64_t blocks = partition_.channel_blocks(view_), slabs = partition_.slabs.size();
    torch::stable::parallel_for(0, slabs * blocks, 1, [&](int64_t begin, int64_t end) {
      // A thread's tasks that are blocks of the same slab are done as one: it then reads longer runs of memory.
      while (begin < end) {
        const int64_t slab = begin / blocks, stop = std::min(end, (slab + 1) * blocks);
        const int64_t first = begin % blocks * partition_.channel_block;
        const int64_t last = std::min(view_.channels, (stop - slab * blocks) * partition_.channel_block);
        reduce_slab(slab, first, last);
        begin = stop;
      }
    });
    for (size_t g = 0; g < partition_.group_count.size(); ++g) count[g] = partition_.group_count[g];
    const int64_t merges_per_channel = std::max<int64_t>(1, slabs);
    torch::stable::parallel_for(0, view_.channels, 32768 / merges_per_channel + 64,
                                [&](int64_t begin, int64_t end) { merge_slabs(begin, end, mean, m2); });
  }

 private:
  const void* at(int64_t offset) const { return data_ + offset * element_size_; }

  void reduce_slab(int64_t index, int64_t first, int64_t last) {
    const Slab& slab = partition_.slabs[index];
    double *mean = &slab_mean_[index * view_.channels], *m2 = &slab_m2_[index * view_.channels];
    std::fill(mean + first, mean + last, 0.0);
    std::fill(m2 + first, m2 + last, 0.0);
    const Segment *segment = &partition_.segments[slab.first], *end = segment + (slab.last - slab.first);
    if (!view_.by_rows) {
      double before = 0;
      for (; segment != end; before += segment->length, ++segment) {
        kernels_.planes(at(segment->offset + first * view_.plane_stride), view_.plane_stride, last - first,
                        segment->length, before, mean + first, m2 + first);
      }
    } else if (rows_joined(view_) == 1 && view_.inner == 1) {
      double before = 0;
      for (; segment != end; before += segment->length, ++segment) {
        kernels_.rows(at(segment->offset), view_.row_stride, view_.width, segment->length, before, mean, m2);
      }
    } else {
      reduce_folded(segment, end, mean, m2);
    }
  }

  // Rows in which a channel occurs several times: as many virtual channels as a row has values, each with moments of
  // its own, folded into the channels at the end. Narrow rows are joined first; what does not fill a joined row comes
  // after.
  void reduce_folded(const Segment* segment, const Segment* end, double* mean, double* m2) const {
    const int64_t joined = rows_joined(view_), width = joined * view_.width;
    std::vector<double> virtual_moments(4 * width, 0.0);
    double *joined_mean = virtual_moments.data(), *joined_m2 = joined_mean + width, *rest_mean = joined_m2 + width,
           *rest_m2 = rest_mean + width;
    double joined_count = 0, rest_count = 0;
    for (; segment != end; ++segment) {
      const int64_t whole = segment->length / joined, rest = segment->length % joined;
      kernels_.rows(at(segment->offset), joined * view_.row_stride, width, whole, joined_count, joined_mean, joined_m2);
      joined_count += whole;
      kernels_.rows(at(segment->offset + whole * joined * view_.row_stride), view_.row_stride, view_.width, rest,
                    rest_count, rest_mean, rest_m2);
      rest_count += rest;
    }
    const double count = fold(joined_mean, joined_m2, joined_count, width, 0, mean, m2);
    fold(rest_mean, rest_m2, rest_count, view_.width, count, mean, m2);
  }

  // Returns how many values a channel holds afterwards.
  double fold(const double* from_mean, const double* from_m2, double each, int64_t width, double before, double* mean,
              double* m2) const {
    if (each == 0) return before;
    // Within a row all channels get their k-th value before any gets its (k + 1)-th if inner is 1, else channel by
    // channel; either way the k-th merge into a channel has the same weights for all.
    const int64_t repeats = width / view_.channels;
    for (int64_t k = 0; k < repeats; ++k, before += each) {
      const MergeWeights weights(before, each);
      const int64_t start = k / view_.inner * view_.channels * view_.inner + k % view_.inner;
      for (int64_t c = 0; c < view_.channels; ++c) {
        const int64_t v = start + c * view_.inner;
        merge(mean[c], m2[c], from_mean[v], from_m2[v], weights);
      }
    }
    return before;
  }

  void merge_slabs(int64_t begin, int64_t end, double* mean, double* m2) const {
    const auto groups = static_cast<int64_t>(partition_.group_count.size()), channels = view_.channels;
    for (int64_t g = 0; g < groups; ++g) {
      std::fill(mean + g * channels + begin, mean + g * channels + end, 0.0);
      std::fill(m2 + g * channels + begin, m2 + g * channels + end, 0.0);
    }
    int64_t group = -1;
    double before = 0;
    for (size_t s = 0; s < partition_.slabs.size(); ++s) {
      const Slab& slab = partition_.slabs[s];
      if (slab.group != group) group = slab.group, before = 0;
      double count = 0;
      for (int64_t i = slab.first; i < slab.last; ++i) count += partition_.segments[i].length;
      count *= view_.by_rows ? view_.length / view_.sample_rows : 1;
      const MergeWeights weights(before, count);
      const double *from_mean = &slab_mean_[s * channels], *from_m2 = &slab_m2_[s * channels];
      double *to_mean = mean + group * channels, *to_m2 = m2 + group * channels;
      for (int64_t c = begin; c < end; ++c) merge(to_mean[c], to_m2[c], from_mean[c], from_m2[c], weights);
      before += count;
    }
  }

  const char* data_;
  const int64_t element_size_;
  const View view_;
  const MomentsKernels& kernels_;
  const Partition partition_;
  const std::unique_ptr<double[]> slab_mean_, slab_m2_;
};

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::moments: x must have at least 2 dimensions");
  STD_TORCH_CHECK(num_groups >= 1, "precisebn::moments: num_groups must be at least 1");
  STD_TORCH_CHECK(!group || (group->dim() == 1 && group->size(0) == x.size(0)),
                  "precisebn::moments: group must have one element per sample of x");
  using torch::headeronly::ScalarType;
  const int64_t channels = x.size(1);
  Tensor count = torch::stable::new_empty(x, {num_groups}, ScalarType::Double);
  Tensor mean = torch::stable::new_empty(x, {num_groups, channels}, ScalarType::Double);
  Tensor m2 = torch::stable::new_empty(x, {num_groups, channels}, ScalarType::Double);
  moments_of(x, group, num_groups, count.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(),
             m2.mutable_data_ptr<double>());
  return {count, mean, m2};
}

}  // namespace

void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, double* count, double* mean,
                double* m2) {
  const Tensor dense = with_view(x);
  Reduction(dense, *view_of(dense), group, num_groups).run(count, mean, m2);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("moments", TORCH_BOX(&moments)); }

}  // namespace precisebn
