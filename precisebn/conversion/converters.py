"""Conversion of models: from nn.BatchNorm to each module of precisebn.nn and to SyncBatchNorm, and back.

Each is :func:`precisebn.replace_batchnorm` with a factory: the model is changed in place and returned, layers keep
their parameters, modes, hooks and names, and :func:`convert_to_batchnorm` restores the model, bit for bit if nothing
has been trained in between. ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, says when to use which.)

Convert first; then make what holds on to parameters, buffers or the order of the state dict: averages of weights (EMA,
SWA), optimizers, DistributedDataParallel, FSDP, compiled models. An optimizer made before goes on training the
parameters that are still there; wrappers that would not see the new layers are refused.
"""

from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from precisebn.conversion.engine import Conversion, replace_layers
from precisebn.conversion.layers import describe, frozen_class, origin_of, parts_of, placement, plain_class, recognized
from precisebn.distributed import ProcessGroup
from precisebn.errors import InputError
from precisebn.models.selection import ModuleSelection
from precisebn.nn import BatchStatBN, ConcatSharedBN, CycleBatchNormList, DomainSpecificBN, GhostBN, SyncBN
from precisebn.nn.frozen import FrozenNorm

__all__ = [
    "convert_batch_stat",
    "convert_concat_shared",
    "convert_cycle",
    "convert_domain_specific",
    "convert_frozen_batchnorm",
    "convert_ghost",
    "convert_sync_batchnorm",
    "convert_to_batchnorm",
]


def convert_frozen_batchnorm(
    model: nn.Module,
    *,
    trainable_affine: bool = False,
    bn_class: type[_BatchNorm] = nn.BatchNorm2d,
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """Freeze the BatchNorm layers of a model: FrozenBatchNorm1d, 2d and 3d in their places.

    Follows detectron2's ``FrozenBatchNorm2d.convert_frozen_batchnorm`` and timm's ``freeze_batch_norm_2d``. The model's
    output in eval mode stays the same. The frozen layers of torchvision, detectron2, timm and transformers become those
    of precisebn too, and those of precisebn with another ``trainable_affine`` are made anew.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        trainable_affine: whether weight and bias remain parameters, the very ones; otherwise they become buffers, of
            the same values, and come back as the parameters that they were with :func:`convert_to_batchnorm`.
        bn_class: which number of dimensions layers are for that take any (SyncBatchNorm, GhostBN and so on), unless
            they were converted from one that says.
        include: see :func:`replace_batchnorm`, but here frozen layers are included by default.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; a layer without running statistics (``track_running_stats=False``); a
            layer whose forward is not known; one of several domains, which differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(convert_frozen_batchnorm(model)[1]).__name__
        'FrozenBatchNorm2d'
        >>> [name for name, parameter in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    if not isinstance(bn_class, type) or not issubclass(bn_class, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        raise InputError(f"bn_class={bn_class!r} must be nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d")

    def build(name: str, bn: _BatchNorm) -> nn.Module:
        if bn.running_mean is None:
            raise InputError(
                f"{describe(name, bn)} has no running statistics to freeze (track_running_stats=False), and no "
                "recalibration gives it any; leave it out: exclude="
            )
        return _like(bn, frozen_class(bn, bn_class), trainable_affine=trainable_affine)

    def is_done(layer: nn.Module) -> bool:
        return isinstance(layer, FrozenNorm) and layer.trainable_affine == trainable_affine

    return replace_layers(model, Conversion(build, is_done, takes_frozen=True, bn_class=bn_class), include, exclude)


def convert_domain_specific(
    model: nn.Module,
    num_domains: int,
    *,
    normalize: Literal["domain", "shared"] = "domain",
    population: Literal["domain", "shared"] = "domain",
    affine: Literal["domain", "shared"] = "shared",
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """Give the BatchNorm layers of a model statistics for each of several domains: DomainSpecificBN in their places.

    Every domain starts with the statistics, weight and bias that the layer has, so that the output in eval mode stays
    the same for every domain, which :func:`precisebn.nn.use_domain` says.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        num_domains: K.
        normalize: see :class:`precisebn.nn.DomainSpecificBN`, as are the next two.
        population: whose running statistics.
        affine: ``"shared"`` keeps weight and bias, which an optimizer may know; ``"domain"`` makes them new parameters
            ``(K, C)``, which an optimizer has to be given. Layers without affine stay without.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; wrong settings; a layer whose forward is not known; one that has
            several domains already, which differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> model = convert_domain_specific(nn.Sequential(nn.BatchNorm2d(8)), 2, affine="shared")
        >>> model[0].running_mean.shape, model[0].weight.shape
        (torch.Size([2, 8]), torch.Size([8]))
    """
    conversion = to_domains(num_domains, normalize=normalize, population=population, affine=affine)
    return replace_layers(model, conversion, include, exclude)


def convert_cycle(
    model: nn.Module, length: int, *, include: ModuleSelection | None = None, exclude: ModuleSelection | None = None
) -> nn.Module:
    """Give the BatchNorm layers of a model statistics for each call of a cycle: CycleBatchNormList in their places.

    For a head that is called on ``length`` feature levels in turn (detectron2's project "Rethinking-BatchNorm"). Every
    member starts with the statistics that the layer has; weight and bias, the very same, are shared. Where another
    layer that is called with it needs telling domains apart otherwise, use :func:`convert_domain_specific`.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        length: BatchNorms in a cycle.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; a layer whose forward is not known; one that has several domains
            already, which differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> head = convert_cycle(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), 3)
        >>> len(head[1]), [name for name, _ in head.named_parameters()]
        (3, ['0.weight', '0.bias', '1.weight', '1.bias'])
    """
    return replace_layers(model, to_cycle(length), include, exclude)


def convert_concat_shared(
    model: nn.Module, *, include: ModuleSelection | None = None, exclude: ModuleSelection | None = None
) -> nn.Module:
    """Let the BatchNorm layers of a model take several tensors together: ConcatSharedBN in their places.

    For a head that feature levels share, whose containers then pass lists on
    (:class:`precisebn.nn.MultiInputSequential`); :func:`precisebn.convert_shared_head` sees to that as well. For a
    single tensor the layers are what they were.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; a layer whose forward is not known; one of several domains, which
            differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> import torch
        >>> convert_concat_shared(nn.Sequential(nn.BatchNorm2d(8)))[0]([torch.randn(2, 8, 4, 4)])[0].shape
        torch.Size([2, 8, 4, 4])
    """
    return replace_layers(model, to_class(ConcatSharedBN), include, exclude)


def convert_batch_stat(
    model: nn.Module, *, include: ModuleSelection | None = None, exclude: ModuleSelection | None = None
) -> nn.Module:
    """Let the BatchNorm layers of a model use mini-batch statistics at test time too: BatchStatBN in their places.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; a layer whose forward is not known; one of several domains, which
            differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> import torch
        >>> model = convert_batch_stat(nn.Sequential(nn.BatchNorm1d(1, eps=0.0))).eval()
        >>> model(torch.tensor([[2.0], [6.0]])).flatten().tolist()
        [-1.0, 1.0]
    """
    return replace_layers(model, to_class(BatchStatBN), include, exclude)


def convert_ghost(
    model: nn.Module, ghost_size: int, *, include: ModuleSelection | None = None, exclude: ModuleSelection | None = None
) -> nn.Module:
    """Let the BatchNorm layers of a model normalize by parts of the mini-batch: GhostBN in their places.

    The output in eval mode stays the same.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        ghost_size: samples in a ghost batch.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; a wrong ``ghost_size``; a layer whose forward is not known; one of
            several domains, which differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> convert_ghost(nn.Sequential(nn.BatchNorm2d(8)), 32)[0].ghost_size
        32
    """
    GhostBN(1, ghost_size)  # raises what is wrong before the model is looked at
    return replace_layers(model, to_class(GhostBN, ghost_size=ghost_size), include, exclude)


def convert_sync_batchnorm(
    model: nn.Module,
    process_group: ProcessGroup | None = None,
    *,
    implementation: Literal["torch", "precisebn"] = "torch",
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """Let the BatchNorm layers of a model use the statistics of all ranks: SyncBatchNorm or SyncBN in their places.

    What ``nn.SyncBatchNorm.convert_sync_batchnorm`` does, and besides keeps layers shared that are used in several
    places, hooks, and the activation of timm's BatchNormAct2d; and it can be undone.

    ``"torch"`` stays what it has always been, torch's layer, which other libraries know by its class. ``"precisebn"``
    runs on the CPU as well, makes no graph break in torch.compile, and can be differentiated twice.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        process_group: the ranks, as a process group (``precisebn.nn.sync_group(8)``: groups of eight) or, for
            ``"precisebn"``, a DeviceMesh of one dimension. None: those of the layer, where it was a SyncBatchNorm with
            ranks of its own and becomes a SyncBN, and otherwise all.
        implementation: ``"torch"``, :class:`torch.nn.SyncBatchNorm`; or ``"precisebn"``,
            :class:`precisebn.nn.SyncBN`. Layers of the other one are converted too.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: as :func:`replace_batchnorm`; another ``implementation``; a layer whose forward is not known; one of
            several domains, which differ.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> type(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))[0])
        <class 'torch.nn.modules.batchnorm.SyncBatchNorm'>
        >>> type(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8)), implementation="precisebn")[0])
        <class 'precisebn.nn.sync.SyncBN'>
    """
    if implementation not in ("torch", "precisebn"):
        raise InputError(f"implementation={implementation!r} must be 'torch' or 'precisebn'")
    if implementation == "torch":
        return replace_layers(model, to_class(nn.SyncBatchNorm, process_group=process_group), include, exclude)
    return replace_layers(model, to_sync(process_group), include, exclude)


def convert_to_batchnorm(
    model: nn.Module,
    *,
    domain: int | None = None,
    bn_class: type[_BatchNorm] = nn.BatchNorm2d,
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """The way back of every conversion: put the layers that there were in their places again.

    They are the very layers, with the parameters, statistics, hooks and mode that the ones in their places have by now,
    on the device and of the dtype of these. With nothing trained in between, the model is what it was, bit for bit.

    Layers of precisebn.nn that were no others before become plain BatchNorm too, and so do the frozen ones of
    torchvision, detectron2, timm and transformers (which unfreezes them), and SyncBatchNorm.

    Args:
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
        domain: the domain to keep, of layers that have several; None requires that they are all equal.
        bn_class: what layers become that take any number of dimensions and were no others before.
        include: see :func:`replace_batchnorm`, but here frozen and replaced layers are included by default.
        exclude: which not.

    Returns:
        The model; or the layer, where the model is itself one.

    Raises:
        InputError: as :func:`replace_batchnorm`; a layer of several domains, which differ.

    Warns:
        UserWarning: there is nothing to convert; ``domain`` is given, and no layer has any.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(8))
        >>> before = model[0]
        >>> convert_to_batchnorm(convert_ghost(model, 32))[0] is before
        True
    """
    if domain is not None and (isinstance(domain, bool) or not isinstance(domain, int) or domain < 0):
        raise InputError(f"domain={domain!r} must be the number of a domain, counted from 0, or None")
    if not isinstance(bn_class, type) or not issubclass(bn_class, _BatchNorm):
        raise InputError(f"bn_class={bn_class!r} must be a BatchNorm class, such as nn.BatchNorm2d")

    def build(name: str, bn: _BatchNorm) -> nn.Module:
        return _like(bn, plain_class(bn, bn_class)) if recognized(bn).synchronized else bn

    def is_done(layer: nn.Module) -> bool:
        return isinstance(layer, _BatchNorm) and origin_of(layer) is None and not recognized(layer).synchronized

    conversion = Conversion(
        build, is_done, takes_frozen=True, takes_others=True, is_way_back=True, bn_class=bn_class, domain=domain
    )
    return replace_layers(model, conversion, include, exclude)


def to_class(new_class: type[_NormBase], **settings: Any) -> Conversion:
    """The conversion to a class that takes the same as nn.BatchNorm and keeps these settings as attributes."""

    def is_done(layer: nn.Module) -> bool:
        return isinstance(layer, new_class) and all(vars(layer)[key] == value for key, value in settings.items())

    return Conversion(lambda name, bn: _like(bn, new_class, **settings), is_done)


def to_sync(process_group: ProcessGroup | None) -> Conversion:
    """The conversion to SyncBN, over the given ranks, or over those of a layer that has some."""

    def build(name: str, bn: _BatchNorm) -> nn.Module:
        group = vars(bn).get("process_group") if process_group is None else process_group
        return _like(bn, SyncBN, process_group=group)

    def is_done(layer: nn.Module) -> bool:
        return isinstance(layer, SyncBN) and (process_group is None or layer.process_group is process_group)

    return Conversion(build, is_done)


def to_domains(
    num_domains: int,
    *,
    normalize: Literal["domain", "shared"] = "domain",
    population: Literal["domain", "shared"] = "domain",
    affine: Literal["domain", "shared"] = "shared",
) -> Conversion:
    """The conversion to DomainSpecificBN."""
    if affine not in ("domain", "shared"):
        raise InputError(f"affine={affine!r} must be 'domain' or 'shared'; layers without affine stay without")
    settings: dict[str, Any] = {"normalize": normalize, "population": population}
    DomainSpecificBN(1, num_domains, affine=affine, **settings)  # raises what is wrong before the model is looked at

    def build(name: str, bn: _BatchNorm) -> nn.Module:
        own = affine if bn.weight is not None else None
        return _like(bn, DomainSpecificBN, num_domains=num_domains, **settings, affine=own)

    def is_done(layer: nn.Module) -> bool:
        return (
            isinstance(layer, DomainSpecificBN)
            and (layer.num_domains, layer.normalize, layer.population) == (num_domains, normalize, population)
            and (layer.weight is None or (layer.weight.dim() == 2) == (affine == "domain"))
        )

    return Conversion(build, is_done)


def to_cycle(length: int) -> Conversion:
    """The conversion to CycleBatchNormList."""
    CycleBatchNormList(length, num_features=1)  # raises what is wrong before the model is looked at

    def build(name: str, bn: _BatchNorm) -> nn.Module:
        member_class, settings = plain_class(bn, nn.BatchNorm2d), dict[str, Any]()
        if recognized(bn).synchronized:
            member_class, settings = nn.SyncBatchNorm, {"process_group": vars(bn).get("process_group")}
        return _like(bn, CycleBatchNormList, length=length, bn_class=member_class, **settings)

    def is_done(layer: nn.Module) -> bool:
        return isinstance(layer, CycleBatchNormList) and layer.length == length

    return Conversion(build, is_done)


def _like(bn: _BatchNorm, new_class: type[nn.Module], **settings: Any) -> nn.Module:
    """A new layer with the settings of an nn.BatchNorm, whatever they say of parameters and buffers being there."""
    new = new_class(
        **{
            "num_features": bn.num_features,
            "eps": float(bn.eps),  # a buffer, in some subclasses
            "momentum": None if bn.momentum is None else float(bn.momentum),
            "affine": bn.weight is not None,
            "track_running_stats": bn.running_mean is not None,
            **placement(bn.weight if bn.running_mean is None else bn.running_mean),
            **settings,
        }
    )
    if bn.bias is None:
        new.bias = None
    # It may have been switched later than the layer was made, with the buffers there.
    for layer in parts_of(new):
        vars(layer)["track_running_stats"] = bn.track_running_stats
    return new
