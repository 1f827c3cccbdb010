// backward_reduce: sum dy and sum dy * (x - mean) per (group, channel).
#include <tuple>

#include "../operators.h"
#include "../torch.h"
#include "elementwise.h"
#include "kernels/backward_reduce.h"
#include "reduction.h"

namespace precisebn::cpu {
namespace {

class SumsOfElements {
 public:
  SumsOfElements(const Pair& pair, const Tensor& mean, int64_t num_groups)
      : kernels_(PRECISEBN_DISPATCH(backward_reduce_kernels)[dtype_of(pair.x)]),
        dy_(static_cast<const char*>(pair.dy.const_data_ptr())),
        x_(static_cast<const char*>(pair.x.const_data_ptr())),
        mean_(mean, pair.view, num_groups),
        element_size_(static_cast<int64_t>(pair.x.element_size())),
        plane_stride_(pair.view.plane_stride) {}

  void planes(int64_t group, int64_t offset, int64_t first, int64_t channels, int64_t length, double, double* sum,
              double* product) const {
    const int64_t byte = offset * element_size_;
    kernels_.planes(dy_ + byte, x_ + byte, plane_stride_, channels, length, mean_[group] + first, sum, product);
  }
  void rows(int64_t group, int64_t offset, int64_t first, int64_t stride, int64_t width, int64_t rows, double,
            double* sum, double* product) const {
    const int64_t byte = offset * element_size_;
    kernels_.rows(dy_ + byte, x_ + byte, stride, width, rows, mean_[group] + first, sum, product);
  }
  static void merge(double& sum, double& product, double other_sum, double other_product, MergeWeights) {
    sum += other_sum;
    product += other_product;
  }

 private:
  const BackwardReduceKernels& kernels_;
  const char *dy_, *x_;
  const PerGroup<double> mean_;
  const int64_t element_size_, plane_stride_;
};

}  // namespace

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                           const std::optional<Tensor>& group, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::backward_reduce: x must have at least 2 dimensions");
  STD_TORCH_CHECK(mean.dim() == 1 || mean.dim() == 2, "precisebn::backward_reduce: mean must have shape (G, C)");
  check_same("backward_reduce", dy, x);
  check_group("backward_reduce", group, x.size(0), num_groups);
  const Pair pair = align(dy, x);
  Tensor sum = new_statistic({num_groups, x.size(1)}, 2), product = new_statistic({num_groups, x.size(1)}, 2);
  const SumsOfElements kernel(pair, mean, num_groups);
  Reduction(pair.view, static_cast<int64_t>(x.element_size()), group, num_groups, kernel)
      .run(sum.mutable_data_ptr<double>(), product.mutable_data_ptr<double>());
  return {sum, product};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("_backward_reduce", TORCH_BOX(&backward_reduce)); }

}  // namespace precisebn::cpu
