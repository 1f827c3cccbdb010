"""shard_batchnorm: BatchNorm layers as units of FSDP of their own, in float32.

``fully_shard`` with a MixedPrecisionPolicy computes a whole unit in one dtype: its parameters are cast, its buffers are
not. So a BatchNorm in a unit of bfloat16 gets weights in bfloat16 beside running statistics in float32, and raises
"expected scalar type BFloat16 but found Float" (torchtitan issue 674). FSDP's first version set BatchNorm apart by
itself; the second leaves it to the user: each layer is to be sharded before what contains it, with a policy of float32
whose output is cast back, or the next layer, still in bfloat16, raises in its turn.
"""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from precisebn.distributed import ProcessGroup, dtype_of_policy, is_sharded, shard_unit
from precisebn.errors import InputError
from precisebn.models.families import OURS, is_batch_norm
from precisebn.models.selection import ModuleSelection, select
from precisebn.nn.frozen import FrozenNorm

__all__ = ["shard_batchnorm"]


def shard_batchnorm(
    model: nn.Module,
    *,
    mp_policy: Any = None,
    mesh: ProcessGroup | None = None,
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
    reshard_after_forward: bool = False,
    **options: Any,
) -> nn.Module:
    """Make every BatchNorm layer a unit of FSDP2 (``fully_shard``) that computes in float32; before the rest is.

    Inputs are cast to float32, parameters are gathered and their gradients reduced in float32, running statistics stay
    as they are; the output gets the dtype that the rest of the model computes in. Afterwards call ``fully_shard`` on
    blocks and on the model, with the same policy. Layers without parameters that keep their statistics fixed
    (FrozenBatchNorm) take every dtype, and stay as they are.

    Args:
        model: not sharded yet; converted, if it is to be.
        mp_policy: the ``torch.distributed.fsdp.MixedPrecisionPolicy`` that the rest of the model will have; None, if it
            will have none.
        mesh: the DeviceMesh that the rest will be sharded over; None: all ranks.
        include: which layers: modules, names and patterns; None: all.
        exclude: which of them not.
        reshard_after_forward: whether parameters are freed after the forward and gathered again for the backward. They
            are small: what another gathering costs is its latency.
        options: other arguments of ``fully_shard``, such as ``offload_policy``.

    Returns:
        The model.

    Raises:
        InputError: something that matches no layer; layers that are sharded already, or lazy; a ``mesh`` or an
            ``mp_policy`` that is none; torch.distributed is not initialized, and no mesh was given. Nothing is sharded
            then.

    Example:
        .. code-block:: python

            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            shard_batchnorm(model, mp_policy=policy)
            for block in model.blocks:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
    chosen = select(model, include, exclude, is_layer=_is_layer, outermost=True).chosen
    for name, layer in chosen.items():
        if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) is lazy and has no values yet: run the model once before"
            )
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) is sharded already; call shard_batchnorm before fully_shard"
            )
    output_dtype = dtype_of_policy(mp_policy)
    for layer in chosen.values():
        if not isinstance(layer, FrozenNorm) or any(True for _ in layer.parameters()):
            shard_unit(
                layer, mesh=mesh, output_dtype=output_dtype, reshard_after_forward=reshard_after_forward, **options
            )
    return model


def _is_layer(module: nn.Module) -> bool:
    return is_batch_norm(module) or isinstance(module, OURS)
