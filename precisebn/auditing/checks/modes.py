"""Modes and freezing: layers that are not in the mode that they are thought to be in, or do not stay in it."""

from collections.abc import Iterator

from torch import nn

from precisebn.auditing.check import Problem, check
from precisebn.auditing.norms import batch_norms, is_live, is_training, keeps_moving, kept
from precisebn.auditing.remedies import MEASURE
from precisebn.auditing.subject import Subject, Unobservable
from precisebn.models.families import PAUSED, is_frozen
from precisebn.nn.batch_stat import BatchStatBN
from precisebn.nn.cycle import CycleBatchNormList
from precisebn.tracking.pause import is_in_block

__all__ = [
    "batch_norm_that_train_will_flip",
    "batch_norm_in_training_mode",
    "dropout_in_eval_mode",
    "dropout_in_training_mode",
    "frozen_parameters_with_live_statistics",
    "no_running_statistics",
    "paused_layers",
    "tracking_switched_off",
    "unfinished_cycles",
]


@check(
    "PBN101", "error", "frozen parameters, live running statistics",
    source="https://github.com/pytorch/pytorch/issues/86590",
)  # fmt: skip
def frozen_parameters_with_live_statistics(subject: Subject) -> Iterator[Problem]:
    """``requires_grad = False`` stops weight and bias; running statistics are buffers, and move with every forward.

    A layer without weight and bias is as frozen as the smallest part of the model around it that has parameters. Where
    nothing at all is trained, it may be a teacher that takes its weights from another model (MoCo's, BYOL's), whose
    statistics are to move.
    """
    live = [name for name, layer in subject.norms.items() if is_live(layer) and _has_frozen_parameters(subject, name)]
    if not live:
        return
    if any(p.requires_grad for p in subject.model.parameters()):
        yield Problem(
            "Their parameters are frozen, their running statistics move with every forward in training mode.",
            "freeze(model, ...) of that part holds both still, whoever calls train().",
            live,
        )
    else:
        yield Problem(
            "All parameters of the model are frozen, its running statistics move with every forward in training mode.",
            "freeze(model) holds them still; leave it so for a teacher that takes its weights from another model.",
            live,
            "note",
        )


def _has_frozen_parameters(subject: Subject, name: str) -> bool:
    """Whether the parameters of a layer, or else of the smallest module around it that has any, are all frozen."""
    module: nn.Module | None = subject.modules[name]
    while module is None or next(module.parameters(), None) is None:
        if not name:
            return False
        name = name.rpartition(".")[0]
        module = subject.modules.get(name)
    return not any(p.requires_grad for p in module.parameters())


@check(
    "PBN102", "warning", "BatchNorm in eval mode, which train() will undo",
    source="https://github.com/pgniewko/gt-pyg/issues/112",
)  # fmt: skip
def batch_norm_that_train_will_flip(subject: Subject) -> Iterator[Problem]:
    """``layer.eval()`` lasts until the next ``model.train()``, with which most training loops begin an epoch.

    Whether it flips them is tried out: many detectors override ``train`` so that it does not.
    """
    held = {
        name: layer
        for name, layer in subject.norms.items()
        if not layer.training and keeps_moving(layer)  # which leaves out what freeze() holds
    }
    if not held or not is_training(subject):
        return
    with subject.undisturbed():
        try:
            subject.model.train()
        except Exception as error:
            raise Unobservable(f"model.train() raises {type(error).__name__}: {error}") from error
        flipped = [name for name, layer in held.items() if layer.training]
    if flipped:
        yield Problem(
            "They are in eval mode in a model in training mode, and the next model.train() puts them back into it.",
            "freeze(model, ..., affine=True) keeps their statistics as they are, whoever calls train().",
            flipped,
        )


@check(
    "PBN103", "warning", "BatchNorm in training mode in a model in eval mode",
    source="https://github.com/pytorch/pytorch/issues/5406",
)  # fmt: skip
def batch_norm_in_training_mode(subject: Subject) -> Iterator[Problem]:
    """Every forward, though it be of the test set, moves the statistics, and an output depends on its neighbours."""
    live = [name for name, layer in subject.norms.items() if is_live(layer)]
    if live and not is_training(subject):
        yield Problem(
            "The model is in eval mode, but they normalize by the mini-batch and write their running statistics.",
            "model.eval() puts all parts of it into eval mode.",
            live,
        )


@check(
    "PBN104", "warning", "dropout at work in a model in eval mode",
    source="https://github.com/ipolharvard/ethos-ares/issues/20",
)  # fmt: skip
def dropout_in_training_mode(subject: Subject) -> Iterator[Problem]:
    """A part that was put back into training mode alone, or never put into eval mode."""
    if not is_training(subject) and (at_work := _dropouts(subject, training=True)):
        yield Problem(
            "The model is in eval mode, but they drop values, so that its outputs are random.",
            "model.eval() puts all parts of it into eval mode.",
            at_work,
        )


@check(
    "PBN105", "note", "dropout switched off in a model in training mode",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.eval",
)  # fmt: skip
def dropout_in_eval_mode(subject: Subject) -> Iterator[Problem]:
    """As it should be in a frozen part, until the next ``model.train()`` switches it on again."""
    if is_training(subject) and (idle := _dropouts(subject, training=False)):
        yield Problem(
            "The model is in training mode, but they drop nothing until the next model.train().",
            "model.train() switches them on again; nothing, if their part is frozen and meant to be in eval mode.",
            idle,
        )


_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_THEIR_DROPOUTS = ("DropPath", "StochasticDepth", "DropBlock", "PatchDropout")  # of timm, torchvision and transformers


def _dropouts(subject: Subject, training: bool) -> list[str]:
    """Modules in this mode that drop something in training mode."""
    return [name for name, m in subject.modules.items() if m.training is training and _drop_rate(m) > 0]


def _drop_rate(module: nn.Module) -> float:
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    if isinstance(module, _DROPOUTS) or any(name in type(module).__name__ for name in _THEIR_DROPOUTS):
        rate = next((r for name in ("p", "drop_prob", "prob") if (r := vars(module).get(name)) is not None), 0.0)
        return float(rate) if isinstance(rate, int | float) else 0.0
    return 0.0


@check(
    "PBN106", "warning", "track_running_stats=False where there are running statistics",
    source="https://github.com/Lightning-AI/pytorch-lightning/pull/15063",
)  # fmt: skip
def tracking_switched_off(subject: Subject) -> Iterator[Problem]:
    """The buffers stay, so that eval mode normalizes by what was tracked before, and training by the mini-batch."""
    off = [
        name
        for name, layer in batch_norms(subject).items()
        if not getattr(layer, "track_running_stats", True)
        and kept(layer) and not is_frozen(layer) and PAUSED not in vars(layer)
    ]  # fmt: skip
    if off:
        yield Problem(
            "In training they normalize by the mini-batch and leave their running statistics as they were, and in eval "
            "mode they normalize by these, which belong to earlier weights.",
            "freeze(model, ..., affine=True) normalizes by them in training too; or set track_running_stats=True again "
            f"and call {MEASURE}.",
            off,
        )


@check(
    "PBN107", "note", "BatchNorm without running statistics",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)  # fmt: skip
def no_running_statistics(subject: Subject) -> Iterator[Problem]:
    """Built with ``track_running_stats=False``: mini-batch statistics at test time too."""
    without = [
        name
        for name, layer in batch_norms(subject).items()
        if "running_mean" in layer._buffers
        and layer._buffers["running_mean"] is None
        and not isinstance(layer, BatchStatBN)
    ]
    if without:
        yield Problem(
            "They have no running statistics: at test time, too, an output depends on the other samples of its "
            "mini-batch.",
            "convert_batch_stat(model) says that this is meant; else build them with track_running_stats=True.",
            without,
        )


@check(
    "PBN108", "error", "layers left paused",
    source="https://github.com/lyakaap/VAT-pytorch/issues/8",
)  # fmt: skip
def paused_layers(subject: Subject) -> Iterator[Problem]:
    """``pause_tracking`` resumes at the end of its block; a copy that was made inside of it is resumed by nobody."""
    paused = {name: layer for name, layer in subject.norms.items() if PAUSED in vars(layer)}
    for inside in (True, False):
        names = [name for name, layer in paused.items() if is_in_block(layer) is inside]
        if names and inside:
            yield Problem(
                "They do not write their running statistics as long as this block of pause_tracking lasts.",
                "Leave the block of pause_tracking(model) before training goes on.",
                names,
                "note",
            )
        elif names:
            yield Problem(
                "They were copied inside a block of pause_tracking, and will never write their running statistics.",
                "copy.deepcopy(model) after the block of pause_tracking, not inside of it.",
                names,
            )


@check(
    "PBN109", "warning", "a CycleBatchNormList left in the middle of its cycle",
    source="Rethinking 'Batch' in BatchNorm, arXiv 2105.07576, section 5.2",
)  # fmt: skip
def unfinished_cycles(subject: Subject) -> Iterator[Problem]:
    """The next forward would begin with the statistics of another feature level."""
    left = [name for name, m in subject.modules.items() if isinstance(m, CycleBatchNormList) and m.unfinished]
    if left:
        yield Problem(
            "Their last cycle was not finished, so that the next call normalizes by the statistics of another domain.",
            "layer.reset() begins a new cycle, and `with one_cycle(model):` around the loop notices such a thing.",
            left,
        )
