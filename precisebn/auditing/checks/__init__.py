"""The checks, one file a subject, one function a check. A new one is a function there and a name in ``CHECKS``."""

from precisebn.auditing.check import Check
from precisebn.auditing.checks import averaging, batches, calls, data, disagreement, drift, gradients, leaks, modes

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (
    modes.frozen_parameters_with_live_statistics,
    drift.far_from_the_data,
    disagreement.train_and_eval_disagree,
    gradients.gradients_cut,
    gradients.values_taken_out_of_torch,
    gradients.parameters_beside_the_loss,
    gradients.parameters_not_used,
    calls.shared_population,
    batches.too_few_samples,
    batches.one_sample,
    batches.one_value,
    data.last_of_one_sample,
    data.not_shuffled,
    leaks.one_label,
    leaks.correlated_samples,
    leaks.one_source,
    averaging.statistics_left_behind,
    averaging.statistics_of_other_weights,
)
"""All checks, in the order of their codes."""
