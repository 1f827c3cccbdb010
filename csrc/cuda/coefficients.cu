// coefficients: statistics and affine as the center, scale and shift of normalize. A thread for each (row, channel).
#include "../arithmetic.h"
#include "../operators.h"
#include "rows.h"

namespace precisebn::cuda {
namespace {

struct Operands {
  Counts count;  // that divides var
  Rows mean, var, weight, bias;
  Rows center, scale, shift;
};

__global__ void __launch_bounds__(kRowThreads)
    write_coefficients(const __grid_constant__ Operands of, double eps, bool wide, int64_t rows, int64_t channels) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= rows * channels) return;
  const int64_t row = i / channels, channel = i - row * channels;
  const Coefficients to(of.mean.read(row, channel), of.var.read(row, channel) / of.count.divisor(row),
                        of.weight.read_or(1.0, row, channel), of.bias.read_or(0.0, row, channel), eps, wide);
  of.center.write(row, channel, to.center);
  of.scale.write(row, channel, to.scale);
  of.shift.write(row, channel, to.shift);
}

std::tuple<Tensor, Tensor, Tensor> of_variance(const Tensor& mean, const Tensor& var,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               double eps, bool wide) {
  return coefficients(mean, {var, kNone}, weight, bias, eps, wide);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> coefficients(const Tensor& mean, const Variance& var,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                double eps, bool wide) {
  const int64_t channels = channels_of("coefficients", mean);
  const auto operand = [&](const char* name, const std::optional<Tensor>& t) {
    return rows_of("coefficients", name, t, mean, channels);
  };
  Operands of{};
  of.mean = operand("mean", mean);
  of.var = operand("var", var.values);
  of.weight = operand("weight", weight);
  of.bias = operand("bias", bias);
  of.count = counts_of("coefficients", var.count, mean, of.var.size);
  int64_t rows = 1;
  for (const Rows& each : {of.mean, of.var, of.weight, of.bias}) {
    STD_TORCH_CHECK(rows == 1 || each.size == 1 || each.size == rows,
                    "precisebn::coefficients: operands have different numbers of rows");
    if (each.size != 1) rows = each.size;
  }
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const auto result = [&] { return torch::stable::new_empty(mean, {rows, channels}, type); };
  const Tensor center = result(), scale = result(), shift = result();
  if (rows * channels == 0) return {center, scale, shift};
  of.center = operand("center", center);
  of.scale = operand("scale", scale);
  of.shift = operand("shift", shift);
  const OnDeviceOf where(mean);
  write_coefficients<<<blocks_for(rows * channels), kRowThreads, 0, where.stream>>>(of, eps, wide, rows, channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {center, scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("coefficients", TORCH_BOX(&of_variance)); }

}  // namespace precisebn::cuda
