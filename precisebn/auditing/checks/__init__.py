"""The checks, one file a subject, one function a check. A new one is a function there and a name in ``CHECKS``."""

from precisebn.auditing.check import Check
from precisebn.auditing.checks import layers, modes, optimizer, ranks, sharing, statistics

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (
    modes.frozen_parameters_with_live_statistics,
    modes.batch_norm_that_train_will_flip,
    modes.batch_norm_in_training_mode,
    modes.dropout_in_training_mode,
    modes.dropout_in_eval_mode,
    modes.tracking_switched_off,
    modes.no_running_statistics,
    modes.paused_layers,
    modes.unfinished_cycles,
    statistics.not_finite,
    statistics.negative_variances,
    statistics.layers_never_measured,
    statistics.domains_never_measured,
    statistics.cumulative_average_that_starts_over,
    statistics.useless_momentum,
    statistics.momentum_for_this_many_steps,
    optimizer.optimizer_of_another_model,
    optimizer.parameters_that_no_optimizer_holds,
    optimizer.frozen_parameters_in_the_optimizer,
    optimizer.parameters_held_twice,
    optimizer.memory_of_the_model_that_is_no_parameter,
    sharing.shared_parameters,
    sharing.shared_buffers,
    sharing.shared_modules,
    sharing.shared_hooks,
    sharing.bound_to_the_other,
    sharing.shared_generators,
    sharing.shared_attributes,
    ranks.plain_batch_norm_on_several_ranks,
    ranks.synchronized_batch_norm_on_one_rank,
    layers.wasted_bias,
    layers.half_precision,
    layers.eps_too_small,
)
"""All checks, in the order of their codes."""
