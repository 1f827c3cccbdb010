// backward_coefficients: the sums of backward_reduce as the coefficients of backward_apply, and the gradients of the
// affine. Up to 32 threads for each channel, which share the groups; where these share weight and bias, the threads'
// sums meet in a tree. Who adds what depends on the number of groups alone, so sums have the same bits every time.
#include "../arithmetic.h"
#include "../operators.h"
#include "rows.h"

namespace precisebn::cuda {
namespace {

struct Operands {
  Counts count, divisor;  // none: the statistics are constants; the variance is divided already
  Rows mean, var, sum_dy, sum_dy_xmu, weight;
  Rows center, a, b, c, grad_weight, grad_bias;
  bool summed;  // over the groups: they share weight and bias
};

// `threads`: of each channel, a power of two. Adjacent threads have adjacent channels.
__global__ void __launch_bounds__(kRowThreads)
    write_coefficients(const __grid_constant__ Operands of, double eps, bool wide, int threads, int64_t groups,
                       int64_t channels) {
  __shared__ double2 sums[kRowThreads];
  const int block_channels = kRowThreads / threads, part = static_cast<int>(threadIdx.x) / block_channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_channels + threadIdx.x % block_channels;
  double to_weight = 0, to_bias = 0;
  for (int64_t g = part; g < groups && i < channels; g += threads) {
    const double share = of.count.data == nullptr ? 0.0 : 1.0 / of.count.divisor(g), sum_dy = of.sum_dy.read(g, i);
    const BackwardCoefficients to(share, of.mean.read(g, i), of.var.read(g, i) / of.divisor.divisor(g), sum_dy,
                                  of.sum_dy_xmu.read(g, i), of.weight.read_or(1.0, g, i), eps, wide);
    of.center.write(g, i, to.center);
    of.a.write(g, i, to.a);
    of.b.write(g, i, to.b);
    of.c.write(g, i, to.c);
    to_weight += to.grad_weight;
    to_bias += sum_dy;
    if (!of.summed) {
      of.grad_weight.write(g, i, to.grad_weight);
      of.grad_bias.write(g, i, sum_dy);
    }
  }
  if (!of.summed) return;
  for (int left = threads / 2; left > 0; left /= 2) {
    if (part < 2 * left) sums[threadIdx.x] = {to_weight, to_bias};
    __syncthreads();  // the next round writes what none of this round reads
    if (part < left) {
      const double2 other = sums[threadIdx.x + left * block_channels];
      to_weight += other.x;
      to_bias += other.y;
    }
  }
  if (part > 0 || i >= channels) return;
  of.grad_weight.write(0, i, to_weight);
  of.grad_bias.write(0, i, to_bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> of_variance(const std::optional<Tensor>& count,
                                                                       const Tensor& mean, const Tensor& var,
                                                                       const Tensor& sum_dy, const Tensor& sum_dy_xmu,
                                                                       const std::optional<Tensor>& weight, double eps,
                                                                       bool wide) {
  return backward_coefficients(count, mean, {var, kNone}, sum_dy, sum_dy_xmu, weight, eps, wide);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_coefficients(
    const std::optional<Tensor>& count, const Tensor& mean, const Variance& var, const Tensor& sum_dy,
    const Tensor& sum_dy_xmu, const std::optional<Tensor>& weight, double eps, bool wide) {
  constexpr const char* kOp = "backward_coefficients";
  const int64_t channels = channels_of(kOp, mean);
  const auto operand = [&](const char* name, const std::optional<Tensor>& t) {
    return rows_of(kOp, name, t, mean, channels);
  };
  Operands of{};
  of.mean = operand("mean", mean);
  of.var = operand("var", var.values);
  of.sum_dy = operand("sum_dy", sum_dy);
  of.sum_dy_xmu = operand("sum_dy_xmu", sum_dy_xmu);
  of.weight = operand("weight", weight);
  const int64_t groups = of.mean.size, dim = weight ? weight->dim() : mean.dim();
  of.count = counts_of(kOp, count, mean, groups);
  of.divisor = counts_of(kOp, var.count, mean, groups);
  of.summed = dim == 1;
  STD_TORCH_CHECK(of.var.size == groups && of.sum_dy.size == groups && of.sum_dy_xmu.size == groups &&
                      (of.summed || !weight || of.weight.size == groups),
                  "precisebn::", kOp, ": all must have as many rows as mean, ", groups);

  const int64_t sizes[] = {groups, channels};
  const auto array = [&](int64_t dim, ScalarType type) {
    return torch::stable::new_empty(mean, {sizes + 2 - dim, static_cast<size_t>(dim)}, type);
  };
  const auto result = [&] { return array(2, wide ? ScalarType::Double : ScalarType::Float); };
  const auto gradient = [&] { return array(dim, weight ? weight->scalar_type() : ScalarType::Double); };
  const Tensor center = result(), a = result(), b = result(), c = result();
  const Tensor grad_weight = gradient(), grad_bias = gradient();
  if (channels == 0) return {center, a, b, c, grad_weight, grad_bias};
  of.center = operand("center", center);
  of.a = operand("a", a);
  of.b = operand("b", b);
  of.c = operand("c", c);
  of.grad_weight = operand("grad_weight", grad_weight);
  of.grad_bias = operand("grad_bias", grad_bias);
  const OnDeviceOf where(mean);
  int threads = 1;
  while (threads < 32 && threads < groups) threads *= 2;
  write_coefficients<<<blocks_for(channels * threads), kRowThreads, 0, where.stream>>>(of, eps, wide, threads, groups,
                                                                                       channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {center, a, b, c, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("backward_coefficients", TORCH_BOX(&of_variance)); }

}  // namespace precisebn::cuda
