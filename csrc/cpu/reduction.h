// Reductions to two numbers per (group, channel), a and b: mean and m2, or two sums. Tasks (a slab of samples, a block
// of channels: see partition.h) reduce their values into numbers of their own; a second, small pass merges the slabs of
// each group in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../moments.h"
#include "../torch.h"
#include "partition.h"

namespace precisebn::cpu {

// A Kernel has
//   void planes(group, offset, first channel, channels, length, before, a, b) const
//   void rows(group, offset, first channel, stride, width, rows, before, a, b) const
// which add new values, from element `offset` on, to a and b, which hold `before` values per channel already, and
//   static void merge(a, b, other a, other b, weights)
// which adds what another part of the data gave.
template <class Kernel>
class Reduction {
 public:
  Reduction(const View& view, int64_t element_size, const std::optional<Tensor>& group, int64_t num_groups,
            const Kernel& kernel)
      : view_(view),
        kernel_(kernel),
        bytes_(view.bytes(element_size)),
        partition_(partition(view, element_size, group, num_groups)),
        slab_a_(new double[partition_.slabs.size() * view.channels]),
        slab_b_(new double[partition_.slabs.size() * view.channels]) {}

  // Values per channel of every group.
  const std::vector<int64_t>& count() const { return partition_.group_count; }

  // Writes a and b [G, C].
  void run(double* a, double* b) const {
    const int64_t blocks = partition_.channel_blocks(view_), slabs = static_cast<int64_t>(partition_.slabs.size());
    const int64_t tasks = slabs * blocks;
    torch::stable::parallel_for(0, tasks, grain_for(tasks, bytes_, 1), [&](int64_t begin, int64_t end) {
      // A thread's tasks that are blocks of the same slab are done as one: it then reads longer runs of memory.
      while (begin < end) {
        const int64_t slab = begin / blocks, stop = std::min(end, (slab + 1) * blocks);
        const int64_t first = begin % blocks * partition_.channel_block;
        const int64_t last = std::min(view_.channels, (stop - slab * blocks) * partition_.channel_block);
        reduce_slab(slab, first, last);
        begin = stop;
      }
    });
    constexpr int64_t kGrainMerges = 32768;
    torch::stable::parallel_for(0, view_.channels, kGrainMerges / (slabs + 1) + 64,
                                [&](int64_t begin, int64_t end) { merge_slabs(begin, end, a, b); });
  }

 private:
  void reduce_slab(int64_t index, int64_t first, int64_t last) const {
    const Slab& slab = partition_.slabs[index];
    double *a = &slab_a_[index * view_.channels], *b = &slab_b_[index * view_.channels];
    std::fill(a + first, a + last, 0.0);
    std::fill(b + first, b + last, 0.0);
    if (view_.by_rows && (rows_joined(view_) > 1 || view_.inner > 1)) return reduce_joined(slab, a, b);
    int64_t before = 0;
    for (int64_t i = slab.first; i < slab.last; before += partition_.segments[i].length, ++i) {
      const auto [offset, length] = partition_.segments[i];
      if (view_.by_rows) {
        kernel_.rows(slab.group, offset + first, first, view_.row_stride, last - first, length,
                     static_cast<double>(before), a + first, b + first);
      } else {
        kernel_.planes(slab.group, offset + first * view_.plane_stride, first, last - first, length,
                       static_cast<double>(before), a + first, b + first);
      }
    }
  }

  // Rows in which a channel occurs several times: as many virtual channels as a row has values, each with an a and b of
  // its own, merged into the channels at the end. Narrow rows are joined first; those left over come after.
  void reduce_joined(const Slab& slab, double* a, double* b) const {
    const int64_t joined = rows_joined(view_), width = joined * view_.width;
    std::vector<double> scratch(4 * width, 0.0);
    double *joined_a = scratch.data(), *joined_b = joined_a + width, *rest_a = joined_b + width,
           *rest_b = rest_a + width;
    double joined_count = 0, rest_count = 0;
    for (int64_t i = slab.first; i < slab.last; ++i) {
      const auto [offset, length] = partition_.segments[i];
      const int64_t whole = length / joined, rest = length % joined;
      kernel_.rows(slab.group, offset, 0, joined * view_.row_stride, width, whole, joined_count, joined_a, joined_b);
      kernel_.rows(slab.group, offset + whole * joined * view_.row_stride, 0, view_.row_stride, view_.width, rest,
                   rest_count, rest_a, rest_b);
      joined_count += static_cast<double>(whole);
      rest_count += static_cast<double>(rest);
    }
    merge_virtual(joined_a, joined_b, joined_count, joined, 0, a, b);
    merge_virtual(rest_a, rest_b, rest_count, 1, joined_count * static_cast<double>(joined * view_.inner), a, b);
  }

  // Each virtual channel has `each` values, and a channel has had `before`. Value v of a row is of channel
  // v / inner % channels, so a channel has `inner` neighbours in each of the joined rows.
  void merge_virtual(const double* from_a, const double* from_b, double each, int64_t joined, double before, double* a,
                     double* b) const {
    if (each == 0) return;
    for (int64_t row = 0; row < joined; ++row) {
      for (int64_t i = 0; i < view_.inner; ++i, before += each) {
        const MergeWeights weights(before, each);
        for (int64_t c = 0; c < view_.channels; ++c) {
          const int64_t v = row * view_.width + c * view_.inner + i;
          Kernel::merge(a[c], b[c], from_a[v], from_b[v], weights);
        }
      }
    }
  }

  void merge_slabs(int64_t begin, int64_t end, double* a, double* b) const {
    const int64_t channels = view_.channels, groups = static_cast<int64_t>(count().size());
    for (int64_t g = 0; g < groups; ++g) {
      std::fill(a + g * channels + begin, a + g * channels + end, 0.0);
      std::fill(b + g * channels + begin, b + g * channels + end, 0.0);
    }
    int64_t group = -1;
    double before = 0;
    for (size_t s = 0; s < partition_.slabs.size(); ++s) {
      const Slab& slab = partition_.slabs[s];
      if (slab.group != group) group = slab.group, before = 0;
      int64_t units = 0;
      for (int64_t i = slab.first; i < slab.last; ++i) units += partition_.segments[i].length;
      const auto values = static_cast<double>(view_.by_rows ? units * (view_.length / view_.sample_rows) : units);
      const MergeWeights weights(before, values);
      const double *from_a = &slab_a_[s * channels], *from_b = &slab_b_[s * channels];
      double *to_a = a + group * channels, *to_b = b + group * channels;
      for (int64_t c = begin; c < end; ++c) Kernel::merge(to_a[c], to_b[c], from_a[c], from_b[c], weights);
      before += values;
    }
  }

  const View view_;
  const Kernel& kernel_;
  const int64_t bytes_;
  const Partition partition_;
  const std::unique_ptr<double[]> slab_a_, slab_b_;
};

}  // namespace precisebn::cpu
