"""What a recalibration on the first mini-batches of the loader would find; it is undone at once."""

import warnings

from precisebn._reports import counted
from precisebn.auditing.observations.loader import LoaderLook
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.recalibration.report import UpdateReport
from precisebn.recalibration.update import update_bn_stats
from precisebn.statistics.estimator import MIN_BLOCKS

__all__ = ["recalibration"]


def recalibration(subject: Subject) -> UpdateReport:
    """How far the running statistics of all layers are from those of the loader's data under the present weights.

    Raises:
        Unobservable: the loader has too few mini-batches for standard errors, or the model does not run on them.
    """
    subject.check_can_run()
    look = subject.observe(LoaderLook)
    if len(look.batches) < MIN_BLOCKS:
        raise Unobservable(
            f"the loader has {counted(len(look.batches), 'mini-batch')}; standard errors take {MIN_BLOCKS} and more"
        )
    with subject.undisturbed() as interrupts, interrupts.let_through(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are left alone: of those nothing is said
        subject.set_training_modes()
        try:
            return update_bn_stats(
                subject.model, look.batches, None, modules="all", forward=subject.forward_on_copy, process_group=False
            )
        except Exception as error:
            raise Unobservable(
                f"a recalibration on the loader raised {type(error).__name__}: {error}; pass forward= if the model is "
                "to be called in another way"
            ) from error
