// track: running statistics, moved towards those of a mini-batch. A block for each row: its threads read the number of
// mini-batches before one of them writes it.
#include "track.h"

#include "../arithmetic.h"
#include "../operators.h"

namespace precisebn::cuda {
namespace {

struct Operands {
  Counts count;
  Rows mean, m2, running_mean, running_var;
  int64_t* num_batches;
  int64_t num_batches_stride;
  bool cumulative;
  double momentum;
};

__global__ void __launch_bounds__(kRowThreads) track_rows(const __grid_constant__ Operands of, int64_t channels) {
  const int64_t row = blockIdx.x;
  const double n = of.count[row];
  if (!(n > 1)) return;
  int64_t* seen = of.num_batches + row * of.num_batches_stride;
  const int64_t batches = *seen + 1;
  __syncthreads();
  if (threadIdx.x == 0) *seen = batches;
  const double share = of.cumulative ? 1.0 / static_cast<double>(batches > 1 ? batches : 1) : of.momentum;
  for (int64_t c = threadIdx.x; c < channels; c += kRowThreads) {
    of.running_mean.write(row, c, precisebn::lerp(of.running_mean.read(row, c), of.mean.read(row, c), share));
    of.running_var.write(row, c, precisebn::lerp(of.running_var.read(row, c), of.m2.read(row, c) / (n - 1.0), share));
  }
}

}  // namespace

void track(const Tensor& count, const Tensor& mean, const Tensor& m2, const Tensor& running_mean,
           const Tensor& running_var, const Tensor& num_batches, std::optional<double> momentum) {
  const int64_t channels = channels_of("track", mean);
  Operands of{};
  of.mean = rows_of("track", "mean", mean, mean, channels);
  of.m2 = rows_of("track", "m2", m2, mean, channels);
  const int64_t rows = of.mean.size;
  of.count = counts_of("track", count, mean, rows);
  const RunningRows running(running_mean, running_var, num_batches, mean, channels, rows);
  STD_TORCH_CHECK(of.m2.size == rows, "precisebn::track: all must have as many rows as mean, ", rows);
  of.running_mean = running.mean;
  of.running_var = running.var;
  of.num_batches = running.num_batches;
  of.num_batches_stride = running.num_batches_stride;
  of.cumulative = !momentum;
  of.momentum = momentum.value_or(0.0);
  if (rows == 0) return;
  const OnDeviceOf where(mean);
  track_rows<<<static_cast<unsigned>(rows), kRowThreads, 0, where.stream>>>(of, channels);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

STABLE_TORCH_LIBRARY_IMPL(precisebn, CUDA, m) { m.impl("track", TORCH_BOX(&track)); }

}  // namespace precisebn::cuda
