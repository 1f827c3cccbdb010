// backward_fold: the sums of backward_reduce as the coefficients of backward_apply, and the gradients of the affine. A
// thread for each channel, which goes through the groups in order: their sum has the same bits every time.
#include <tuple>

#include "../torch.h"
#include "operators.h"
#include "rows.h"

namespace precisebn::cuda {
namespace {

struct Operands {
  Counts count;
  Rows mean, spread, sum_dy, sum_dy_xmu, weight;
  Rows a, b, c, grad_weight, grad_bias;
  bool summed;  // over the groups: they share weight and bias
};

__global__ void __launch_bounds__(kRowThreads)
    fold_channels(const __grid_constant__ Operands of, double eps, int64_t groups, int64_t channels) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= channels) return;
  double to_weight = 0, to_bias = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const bool constant = of.count.data == nullptr;  // statistics that do not depend on x
    const double n = constant ? 1.0 : fmax(of.count[g], 1.0);
    const double inverse_std = 1.0 / sqrt(of.spread.read(g, i) / n + eps);
    const double dy = of.sum_dy.read(g, i), dy_xmu = of.sum_dy_xmu.read(g, i);
    const double a = of.weight.read_or(1.0, g, i) * inverse_std, per_value = constant ? 0.0 : -a / n;
    const double b = per_value * inverse_std * inverse_std * dy_xmu;
    of.a.write(g, i, a);
    of.b.write(g, i, b);
    of.c.write(g, i, per_value * dy - b * of.mean.read(g, i));
    to_weight = dy_xmu * inverse_std + (of.summed ? to_weight : 0.0);
    to_bias = dy + (of.summed ? to_bias : 0.0);
    if (!of.summed || g == groups - 1) {
      of.grad_weight.write(g, i, to_weight);
      of.grad_bias.write(g, i, to_bias);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_fold(const std::optional<Tensor>& count, const Tensor& mean,
                                                                 const Tensor& spread, const Tensor& sum_dy,
                                                                 const Tensor& sum_dy_xmu,
                                                                 const std::optional<Tensor>& weight, double eps,
                                                                 bool wide) {
  const int64_t channels = channels_of("backward_fold", mean);
  const auto rows = [&](const char* name, const std::optional<Tensor>& t) {
    return rows_of("backward_fold", name, t, mean, channels);
  };
  Operands of{};
  of.mean = rows("mean", mean);
  of.spread = rows("spread", spread);
  of.sum_dy = rows("sum_dy", sum_dy);
  of.sum_dy_xmu = rows("sum_dy_xmu", sum_dy_xmu);
  of.weight = rows("weight", weight);
  const int64_t groups = of.mean.size, dim = weight ? weight->dim() : mean.dim();
  of.count = counts_of("backward_fold", count, mean, groups);
  of.summed = dim == 1;
  STD_TORCH_CHECK(of.spread.size == groups && of.sum_dy.size == groups && of.sum_dy_xmu.size == groups &&
                      (of.summed || !weight || of.weight.size == groups),
                  "precisebn::backward_fold: all must have as many rows as mean, ", groups);

  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float,
                   affine_type = weight ? weight->scalar_type() : ScalarType::Double;
  const int64_t sizes[] = {groups, channels};
  const auto array = [&](int64_t dim, ScalarType type) {
    return torch::stable::new_empty(mean, {sizes + 2 - dim, static_cast<size_t>(dim)}, type);
  };
  const Tensor a = array(2, type), b = array(2, type), c = array(2, type), grad_weight = array(dim, affine_type),
               grad_bias = array(dim, affine_type);
  if (channels == 0) return {a, b, c, grad_weight, grad_bias};
  of.a = rows("a", a);
  of.b = rows("b", b);
  of.c = rows("c", c);
  of.grad_weight = rows("grad_weight", grad_weight);
  of.grad_bias = rows("grad_bias", grad_bias);
  const OnDeviceOf where(mean);
  fold_channels<<<blocks_for(channels), kRowThreads, 0, where.stream>>>(of, eps, groups, channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {a, b, c, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("backward_fold", TORCH_BOX(&backward_fold)); }

}  // namespace precisebn::cuda
