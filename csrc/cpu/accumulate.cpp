// accumulate: the moments of x, merged into running accumulators, and its mean and variance for the layer that x
// enters.
#include "../moments.h"

#include "../torch.h"
#include "moments_of.h"
#include "rows.h"

namespace precisebn::cpu {
namespace {

void write_statistic(const std::optional<Tensor>& out, const double* values, int64_t channels) {
  if (!out) return;
  STD_TORCH_CHECK(out->dim() == 1 && out->size(0) == channels,
                  "precisebn::accumulate: batch_mean and batch_var must have one element per channel");
  write_row(*out, 0, values, channels);
}

double* accumulator(const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.numel() == size && t.is_contiguous(),
                  "precisebn::accumulate: count [1], mean [C] and m2 [C] must be contiguous, of ", size, " elements");
  return t.mutable_data_ptr<double>();
}

void accumulate(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                const std::optional<Tensor>& batch_mean, const std::optional<Tensor>& batch_var) {
  STD_TORCH_CHECK(x.dim() >= 2, "precisebn::accumulate: x must have at least 2 dimensions");
  const int64_t channels = x.size(1);
  double *total = accumulator(count, 1), *to_mean = accumulator(mean, channels), *to_m2 = accumulator(m2, channels);
  if (x.numel() == 0) return;

  double n;
  std::vector<double> own(3 * channels);
  double *own_mean = own.data(), *own_m2 = own_mean + channels, *own_var = own_m2 + channels;
  moments_of(x, std::nullopt, 1, &n, own_mean, own_m2);
  for (int64_t c = 0; c < channels; ++c) own_var[c] = own_m2[c] / n;
  write_statistic(batch_mean, own_mean, channels);
  write_statistic(batch_var, own_var, channels);
  const MergeWeights weights(*total, n);
  for (int64_t c = 0; c < channels; ++c) precisebn::merge(to_mean[c], to_m2[c], own_mean[c], own_m2[c], weights);
  *total += n;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, CPU, m) { m.impl("accumulate", TORCH_BOX(&accumulate)); }

}  // namespace precisebn::cpu
