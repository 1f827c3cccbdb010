// Operators as functions, for those that are made of them. From one to the next through torch's dispatcher would take
// as long as the work on a small x.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "../torch.h"

namespace precisebn::cuda {

using torch::stable::Tensor;

// `dim` is that of mean and m2: 2, or, where there is one group, also 1.
std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const std::optional<Tensor>& group, int64_t num_groups,
                                           int64_t dim);

std::tuple<Tensor, Tensor> fold(const std::optional<Tensor>& count, const Tensor& mean, const Tensor& spread,
                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                bool wide);

Tensor normalize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift,
                 const std::optional<Tensor>& group);

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                           const std::optional<Tensor>& group, int64_t num_groups);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_fold(const std::optional<Tensor>& count, const Tensor& mean,
                                                                 const Tensor& spread, const Tensor& sum_dy,
                                                                 const Tensor& sum_dy_xmu,
                                                                 const std::optional<Tensor>& weight, double eps,
                                                                 bool wide);

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& c,
                      const std::optional<Tensor>& group);

}  // namespace precisebn::cuda
