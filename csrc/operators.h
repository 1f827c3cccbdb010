// Operators as functions, of either device, for those that are made of them. From one to the next through torch's
// dispatcher would take as long as the work on a small x. Sources beside this header use nothing else of a device; they
// are compiled into both libraries.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "torch.h"

#if defined(USE_CUDA)
#define PRECISEBN_DEVICE cuda
#define PRECISEBN_DISPATCH_KEY CUDA
#else
#define PRECISEBN_DEVICE cpu
#define PRECISEBN_DISPATCH_KEY CPU
#endif

namespace precisebn::PRECISEBN_DEVICE {

using torch::stable::Tensor;

// A biased variance (C), or (G, C): as it is, or not yet divided, which saves a launch where it comes of moments.
struct Variance {
  const Tensor& values;                // var, or m2 where there is a count
  const std::optional<Tensor>& count;  // () or (G); of a group without values taken as 1
};

inline const std::optional<Tensor> kNone;

// `dim` is that of mean and m2: 2, or, where there is one group, also 1.
std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups,
                                           int64_t dim);

std::tuple<Tensor, Tensor, Tensor> coefficients(const Tensor& mean, const Variance& var,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                double eps, bool wide);

// The result has the strides of empty_like(like).
Tensor normalize(const Tensor& x, const std::optional<Tensor>& center, const Tensor& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& group, const Tensor& like);

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                           const std::optional<Tensor>& group, int64_t num_groups);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_coefficients(
    const std::optional<Tensor>& count, const Tensor& mean, const Variance& var, const Tensor& sum_dy,
    const Tensor& sum_dy_xmu, const std::optional<Tensor>& weight, double eps, bool wide);

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& center, const Tensor& a, const Tensor& b,
                      const Tensor& c, const std::optional<Tensor>& group);

using Normalized = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, count, mean, m2

// In three operators, whatever the size of x.
Normalized normalize_step_by_step(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& group,
                                  int64_t num_groups);

Normalized normalize_batch(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                           double eps, const std::optional<Tensor>& group, int64_t num_groups);

void track(const Tensor& count, const Tensor& mean, const Tensor& m2, const Tensor& running_mean,
           const Tensor& running_var, const Tensor& num_batches, std::optional<double> momentum);

#if defined(USE_CUDA)
// normalize_batch, normalize_and_track and backward_batch in one launch, with the same bits; nothing where x is too
// large for that.
std::optional<Normalized> normalize_at_once(const Tensor& x, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, double eps,
                                            const std::optional<Tensor>& group, int64_t num_groups);

std::optional<Normalized> normalize_and_track_at_once(const Tensor& x, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps,
                                                      const Tensor& running_mean, const Tensor& running_var,
                                                      const Tensor& num_batches, double momentum,
                                                      const std::optional<Tensor>& group, int64_t num_groups);

std::optional<std::tuple<Tensor, Tensor, Tensor>> backward_at_once(const Tensor& dy, const Tensor& x,
                                                                   const Tensor& count, const Tensor& mean,
                                                                   const Tensor& m2,
                                                                   const std::optional<Tensor>& weight, double eps,
                                                                   const std::optional<Tensor>& group);
#endif

// Whether coefficients for x are float64; else they are float32.
inline bool computes_wide(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

}  // namespace precisebn::PRECISEBN_DEVICE
