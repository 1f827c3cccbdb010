// fold: statistics and affine as the scale and shift of normalize. A thread for each (row, channel).
#include <tuple>

#include "../torch.h"
#include "operators.h"
#include "rows.h"

namespace precisebn::cuda {
namespace {

struct Operands {
  Counts count;
  Rows mean, spread, weight, bias;
  Rows scale, shift;
};

__global__ void __launch_bounds__(kRowThreads)
    fold_rows(const __grid_constant__ Operands of, double eps, int64_t rows, int64_t channels) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= rows * channels) return;
  const int64_t row = i / channels, channel = i - row * channels;
  const double n = of.count.data == nullptr ? 1.0 : fmax(of.count[row], 1.0);
  const double inverse_std = 1.0 / sqrt(of.spread.read(row, channel) / n + eps);
  const double scale = of.weight.read_or(1.0, row, channel) * inverse_std;
  of.scale.write(row, channel, scale);
  of.shift.write(row, channel, of.bias.read_or(0.0, row, channel) - of.mean.read(row, channel) * scale);
}

}  // namespace

std::tuple<Tensor, Tensor> fold(const std::optional<Tensor>& count, const Tensor& mean, const Tensor& spread,
                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                bool wide) {
  const int64_t channels = channels_of("fold", mean);
  Operands of{};
  of.mean = rows_of("fold", "mean", mean, mean, channels);
  of.spread = rows_of("fold", "spread", spread, mean, channels);
  of.weight = rows_of("fold", "weight", weight, mean, channels);
  of.bias = rows_of("fold", "bias", bias, mean, channels);
  of.count = counts_of("fold", count, mean, of.mean.size);
  int64_t rows = 1;
  for (const Rows& operand : {of.mean, of.spread, of.weight, of.bias}) {
    STD_TORCH_CHECK(rows == 1 || operand.size == 1 || operand.size == rows,
                    "precisebn::fold: operands have different numbers of rows");
    if (operand.size != 1) rows = operand.size;
  }
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor scale = torch::stable::new_empty(mean, {rows, channels}, type),
               shift = torch::stable::new_empty(mean, {rows, channels}, type);
  if (rows * channels == 0) return {scale, shift};
  of.scale = rows_of("fold", "scale", scale, mean, channels);
  of.shift = rows_of("fold", "shift", shift, mean, channels);
  const OnDeviceOf where(mean);
  fold_rows<<<blocks_for(rows * channels), kRowThreads, 0, where.stream>>>(of, eps, rows, channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("fold", TORCH_BOX(&fold)); }

}  // namespace precisebn::cuda
