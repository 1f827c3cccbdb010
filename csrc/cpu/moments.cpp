// moments: count, mean and m2 per (group, channel).
#include "../moments.h"

#include <algorithm>
#include <tuple>

#include "../operators.h"
#include "../torch.h"
#include "kernels/moments.h"
#include "moments_of.h"
#include "reduction.h"

namespace precisebn::cpu {
namespace {

class MomentsOfElements {
 public:
  MomentsOfElements(const Tensor& x, const View& view)
      : kernels_(PRECISEBN_DISPATCH(moments_kernels)[dtype_of(x)]),
        x_(static_cast<const char*>(x.const_data_ptr())),
        element_size_(static_cast<int64_t>(x.element_size())),
        plane_stride_(view.plane_stride) {}

  void planes(int64_t, int64_t offset, int64_t, int64_t channels, int64_t length, double before, double* mean,
              double* m2) const {
    kernels_.planes(x_ + offset * element_size_, plane_stride_, channels, length, before, mean, m2);
  }
  void rows(int64_t, int64_t offset, int64_t, int64_t stride, int64_t width, int64_t rows, double before, double* mean,
            double* m2) const {
    kernels_.rows(x_ + offset * element_size_, stride, width, rows, before, mean, m2);
  }
  static void merge(double& mean, double& m2, double other_mean, double other_m2, MergeWeights weights) {
    precisebn::merge(mean, m2, other_mean, other_m2, weights);
  }

 private:
  const MomentsKernels& kernels_;
  const char* x_;
  const int64_t element_size_, plane_stride_;
};

std::tuple<Tensor, Tensor, Tensor> by_group(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups) {
  return moments(x, group, num_groups, 2);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups,
                                           int64_t dim) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::moments: x must have at least 2 dimensions");
  check_group("moments", group, x.size(0), num_groups);
  const int64_t channels = x.size(1);
  const std::array size{dim == 2 ? num_groups : channels, channels};
  Tensor count = new_statistic({num_groups, 1}, dim - 1), mean = new_statistic(size, dim),
         m2 = new_statistic(size, dim);
  moments_of(x, group, num_groups, count.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(),
             m2.mutable_data_ptr<double>());
  return {count, mean, m2};
}

void moments_of(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups, double* count, double* mean,
                double* m2) {
  const Tensor dense = with_view(x);
  const View view = *view_of(dense);
  const MomentsOfElements kernel(dense, view);
  const Reduction reduction(view, static_cast<int64_t>(dense.element_size()), group, num_groups, kernel);
  reduction.run(mean, m2);
  std::copy(reduction.count().begin(), reduction.count().end(), count);
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("_moments", TORCH_BOX(&by_group)); }

}  // namespace precisebn::cpu
