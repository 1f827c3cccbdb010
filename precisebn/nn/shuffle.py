"""ShuffleBN: the samples of all ranks shuffled around a head, so that its mini-batches tell nothing of their labels.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722, section 3.3;
"Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 6. The functions have the calling convention of
``lightly.models.utils``.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from precisebn._reports import counted
from precisebn._torch import flatten_tree, in_backward, is_tracing, unflatten_tree
from precisebn.distributed import ProcessGroup, Shuffle, local_shuffle, permutation_of, shuffle_over_ranks
from precisebn.distributed.collectives import ranks_beside
from precisebn.errors import InputError
from precisebn.nn.among_ranks import AmongRanks
from precisebn.nn.population import Recordable

__all__ = ["ShuffleBN", "batch_shuffle", "batch_unshuffle"]

REMEMBERED = 1024
"""So many of the last forwards activation checkpointing can repeat: those whose backward is still to come."""


class ShuffleBN(AmongRanks, Recordable):
    r"""A head on the shuffled samples of all ranks, and its outputs in the order of its inputs again.

    In training every sample goes to a rank and a place by chance, the head runs there, in mini-batches of which the
    composition says nothing, and what comes out of it goes back. Between W ranks

    .. math:: y = P^{-1}(\mathrm{head}_0 \oplus \dots \oplus \mathrm{head}_{W-1})(P(x_0 \oplus \dots \oplus x_{W-1}))

    for a permutation P of all samples, another one each time. (MoCo, arXiv 1911.05722, section 3.3; "Rethinking 'Batch'
    in BatchNorm", arXiv 2105.07576, section 6.) At test time, on one rank, and where torch.distributed is not
    initialized, it is the head and nothing else.

    Use it where the mini-batch of a rank gives labels away, so that a network learns to read BatchNorm's statistics
    instead of its sample: keys and queries of contrastive learning, regions of one image, patients or speakers that
    come in blocks. Where two networks must not share their mini-batches, as in MoCo, shuffle one of them only, or each
    with a seed of its own: a deep copy shuffles like the original. A :class:`SyncBN` is the other way to it, for
    an all-reduce a layer; here every sample travels twice, and its gradient as often.

    Samples are moved by one all-to-all each way, of those alone that change ranks, about (W - 1) / W; in the backward,
    gradients by another. Ranks may have different numbers of samples, or none; the head gets as many on every rank, or
    one less. Gradients, and second ones, are those of one process that shuffles the whole batch. **Every rank must make
    each call, and call backward through it**: a loss that leaves the outputs out, on one rank, stops all.

    Every rank makes the permutation by itself, from the seed and the number of the forward, ``calls``. That keeps ranks
    in step; and by default an all-gather of three integers, which tells the numbers of samples, makes sure of it. The
    number is an attribute, not in the state dict: a resumed run begins again with the first permutation, unless
    ``calls`` is set, on all ranks. A forward that activation checkpointing repeats has the permutation that it had: it
    draws a random number, by which it is known again. (That takes ``preserve_rng_state=True``, the default; and where
    several forwards are given the same seed before one of them is repeated, it is an InputError.)

    ``update_bn_stats`` leaves shuffling off, so that ranks may have different numbers of mini-batches: the population
    of a layer is that of all samples, whatever mini-batches they come in. (Layers behind another one see what its
    mini-batch statistics make of the samples: measure on mini-batches drawn by chance.)

    torch.compile makes graphs of the head and of what is around; the two exchanges stand between them, a graph break
    each. (torch leaves the rest of an nn.Sequential uncompiled that has a break in it: compile its parts, or write the
    forward yourself.) Where nothing is shuffled, it is part of the graph.

    Args:
        head: any module. In training between ranks it must return tensors ``(N, *)`` of as many rows as it was given.
        seed: the same on all ranks.
        sizes: how many samples each rank has. None asks the others at every forward; ``"equal"`` says as many as this
            rank, or a list how many each, which saves the all-gather and what it makes sure of.
        process_group: the ranks: None for all; the group of this one, or a DeviceMesh of one dimension, where groups of
            ranks shuffle among themselves; False for none. A deep copy has the same one; an unpickled module has lost
            it, and says so where it would need it.

    Attributes:
        calls: the number of the next shuffle.

    Shape:
        Any nested lists, tuples, dicts and named tuples of tensors ``(N, *)`` of any dtype, as positional and keyword
        arguments, to any such outputs. All tensors have the same N; integers travel too. What is no tensor, or a tensor
        without dimensions, is given to the head as it is.

    State dict:
        The head's, under ``head.``; a checkpoint of the head alone loads too.

    Raises:
        InputError: ranks would shuffle different things; tensors of different N; an output without N rows.
        RankFailedError: another rank has ended, or did not come.

    Example:
        >>> head = ShuffleBN(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
        >>> head(torch.randn(16, 8)).shape  # on one rank as the head alone
        torch.Size([16, 4])
    """

    def __init__(
        self,
        head: nn.Module,
        seed: int = 0,
        sizes: Literal["equal"] | Sequence[int] | None = None,
        process_group: ProcessGroup | Literal[False] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise InputError(f"ShuffleBN takes a module, its head, not {type(head).__name__}")
        self.head = head
        self.seed = _whole("seed", seed)
        self.sizes = _sizes(sizes)
        self.process_group = process_group
        self.calls = 0
        self._forwards: OrderedDict[int, _Forward] = OrderedDict()  # by the random number that each has drawn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the head, in training on the shuffled samples of all ranks."""
        if not self.training or self.recorder is not None or ranks_beside(self.process_group) is None:
            return self.head(*args, **kwargs)
        args, kwargs, shuffle = self._shuffle(args, kwargs)
        return self._unshuffle(self.head(*args, **kwargs), shuffle)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shuffle(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Shuffle]:
        if is_tracing():
            raise InputError(
                f"{self._shown()}: torch.jit.trace would keep one shuffle for ever; call eval(), or trace the head"
            )
        samples = _Samples(self._shown(), (args, kwargs))
        shuffle = shuffle_over_ranks(
            self._shown(), samples.number, seed=self.seed, number=self._number(), sizes=self.sizes,
            process_group=self.process_group, device=samples.tensors[0].device, alike={"the input": samples},
        )  # fmt: skip
        args, kwargs = samples.with_tensors(shuffle.shuffle(samples.tensors))
        return args, kwargs, shuffle

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _unshuffle(self, outputs: Any, shuffle: Shuffle) -> Any:
        samples = _Samples(f"{self._shown()}: the output", outputs, shuffle.routes.rows_after, scalars=False)
        return samples.with_tensors(shuffle.unshuffle(samples.tensors))

    def _number(self) -> int:
        """Which shuffle this is: the next one, or, where activation checkpointing repeats a forward, that one's.

        Several forwards may be under way, and are repeated in any order. What both runs of one have in common, and no
        other has, is the next number of torch's generator, which checkpointing puts back to where it was.
        """
        drawn = int(torch.randint(2**62, (), device="cpu"))
        before = self._forwards.get(drawn)
        if in_backward():
            if before is None:
                raise InputError(
                    f"{self._shown()} is called inside a backward, where activation checkpointing repeats forwards, "
                    "but with other random numbers than any forward before; checkpoint with preserve_rng_state=True"
                )
            if before.is_one_of_several:
                raise InputError(
                    f"{self._shown()} is to repeat a forward for activation checkpointing, but several had the same "
                    "random numbers, as after torch.manual_seed(the same) before each, so that nobody knows which one; "
                    "seed them differently, or put the checkpoint into the head"
                )
            self._forwards[drawn] = before._replace(was_repeated=True)
            return before.number
        number, self.calls = self.calls, self.calls + 1
        # One that was repeated is done: a script that seeds every step alike comes by here once a step.
        self._forwards[drawn] = _Forward(number, False, before is not None and not before.was_repeated)
        if len(self._forwards) > REMEMBERED:
            self._forwards.popitem(last=False)
        return number

    def extra_repr(self) -> str:
        """The seed, and the sizes where they are given."""
        return f"seed={self.seed}" + ("" if self.sizes is None else f", sizes={self.sizes!r}")

    def _shown(self) -> str:
        return f"ShuffleBN({type(self.head).__name__})"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Let a checkpoint of the head alone load."""
        own = self.head.state_dict().keys()
        there = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if own & there and not {f"head.{key}" for key in own} & there:
            for key in own & there:
                state_dict[f"{prefix}head.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place: the head, which is all that it is at test time."""
        if self.training and ranks_beside(self.process_group) is not None:
            raise InputError(f"{self._shown()}: torch.jit.script cannot shuffle over ranks; call eval() before")
        prepare = getattr(self.head, "__prepare_scriptable__", None)
        head: nn.Module = self.head if prepare is None else prepare()
        return head

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: no forwards that are under way."""
        return {**super().__getstate__(), "_forwards": OrderedDict()}


def batch_shuffle(
    batch: Any,
    distributed: bool = False,
    *,
    seed: int | None = None,
    sizes: Literal["equal"] | Sequence[int] | None = None,
    process_group: ProcessGroup | Literal[False] | None = None,
) -> tuple[Any, Shuffle]:
    """Shuffle the samples of a mini-batch, or those of all ranks.

    ``lightly.models.utils.batch_shuffle`` and MoCo's ``_batch_shuffle_ddp`` (arXiv 1911.05722, algorithm 1), but of any
    nested structure, differentiable (call it under ``torch.no_grad()`` for a key encoder), for ranks with different
    numbers of samples, and without sending every sample to every rank.

    Args:
        batch: nested lists, tuples, dicts and named tuples of tensors ``(N, *)``, all of the same N; what is no tensor,
            or a tensor without dimensions, stays.
        distributed: whether over all ranks, which must all call; each then has as many samples as any other, or one
            less. Where there are no others, the samples of this one are shuffled all the same.
        seed: of the permutation, the same on all ranks; another one each time is yours to give. None draws from torch's
            generator, over ranks from rank 0's.
        sizes: as of :class:`ShuffleBN`; saves an all-gather of three integers and needs a seed.
        process_group: as of :class:`ShuffleBN`.

    Returns:
        The shuffled batch; and what :func:`batch_unshuffle` takes it back by, whose ``permutation`` is the same on all
        ranks, and whose ``num_sent`` tells how many samples this rank has sent.

    Raises:
        InputError: no tensor in the batch, or different N; ranks would shuffle different things.
        RankFailedError: another rank has ended, or did not come.

    Example:
        >>> shuffled, shuffle = batch_shuffle(torch.arange(5), seed=0)
        >>> shuffled.tolist()
        [3, 0, 4, 2, 1]
        >>> batch_unshuffle(shuffled, shuffle).tolist()
        [0, 1, 2, 3, 4]
    """
    samples = _Samples("batch_shuffle", batch)
    if seed is not None:
        _whole("seed", seed)
    if distributed:
        shuffle = shuffle_over_ranks(
            "batch_shuffle", samples.number, seed=seed, number=0, sizes=_sizes(sizes), process_group=process_group,
            device=samples.tensors[0].device, alike={"the batch": samples},
        )  # fmt: skip
    else:
        total = samples.number
        permutation = torch.randperm(total, device="cpu") if seed is None else permutation_of(total, seed)
        shuffle = local_shuffle(total, permutation)
    return samples.with_tensors(shuffle.shuffle(samples.tensors)), shuffle


def batch_unshuffle(batch: Any, shuffle: Shuffle, distributed: bool | None = None) -> Any:
    """Put samples back to where they were before :func:`batch_shuffle`: ``lightly.models.utils.batch_unshuffle``.

    Args:
        batch: what was made of the shuffled batch: any nested structure of tensors with its number of rows.
        shuffle: what batch_shuffle returned.
        distributed: the shuffle knows; must be what was said there, if anything.

    Raises:
        InputError: another number of rows; ``distributed`` is not what was said.
        RankFailedError: another rank has ended, or did not come.
    """
    if not isinstance(shuffle, Shuffle):
        raise InputError(f"batch_unshuffle takes the second that batch_shuffle returned, not {type(shuffle).__name__}")
    if distributed is not None and bool(distributed) != shuffle.over_ranks:
        raise InputError(f"batch_unshuffle: distributed={distributed}, but batch_shuffle was called with the opposite")
    samples = _Samples("batch_unshuffle", batch, shuffle.routes.rows_after)
    return samples.with_tensors(shuffle.unshuffle(samples.tensors))


class _Forward(NamedTuple):
    """A forward that activation checkpointing may repeat."""

    number: int
    """Of its shuffle."""
    was_repeated: bool
    is_one_of_several: bool
    """Whether others, which may still be repeated, have drawn the same random number."""


class _Samples:
    """The tensors of a nested structure that have a row for each sample.

    Args:
        who: for messages.
        tree: the structure.
        number: how many rows they must have; None for as many as the first.
        scalars: whether there may be tensors without dimensions, which are passed by.

    Raises:
        InputError: there is none; or one with another number of rows; or there are containers that cannot be entered.
    """

    def __init__(self, who: str, tree: Any, number: int | None = None, *, scalars: bool = True) -> None:
        self._leaves, self._form = flatten_tree(tree)
        self._is_sample = [isinstance(leaf, Tensor) and not (scalars and leaf.dim() == 0) for leaf in self._leaves]
        self.tensors: list[Tensor] = [
            leaf for leaf, is_one in zip(self._leaves, self._is_sample, strict=True) if is_one
        ]
        for leaf in self._leaves:
            if _hides_tensors(leaf):
                raise InputError(
                    f"{who} holds a {type(leaf).__name__}, whose tensors cannot be reached; make it a dict, a list, a "
                    "tuple or a named tuple"
                )
        if not self.tensors:
            raise InputError(f"{who} holds no tensor (N, *), so there are no samples to move")
        self.number = len(self.tensors[0]) if number is None else number
        for i, x in enumerate(self.tensors):
            if x.dim() == 0 or len(x) != self.number:
                raise InputError(
                    f"{who}: tensor {i} of {len(self.tensors)} is {tuple(x.shape)}, but must have a row for each of "
                    f"{counted(self.number, 'sample')}; leave out what belongs to the whole mini-batch"
                )
            if x.layout != torch.strided or x.is_nested:
                raise InputError(f"{who}: tensor {i} of {len(self.tensors)} is sparse or nested; move dense ones only")

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with other tensors in the places of these."""
        others = iter(tensors)
        leaves = zip(self._leaves, self._is_sample, strict=True)
        return unflatten_tree([next(others) if is_one else leaf for leaf, is_one in leaves], self._form)

    def __str__(self) -> str:
        """What ranks must agree on: all but the number of samples, and values."""
        recorded = torch.is_grad_enabled()
        rows = ", ".join(
            f"{str(x.dtype).removeprefix('torch.')} (N{''.join(f', {size}' for size in x.shape[1:])})"
            f"{' with gradient' if recorded and x.requires_grad else ''}"
            for x in self.tensors
        )
        form = unflatten_tree(["*" if is_one else "-" for is_one in self._is_sample], self._form)
        return f"{rows} in {form}"


def _hides_tensors(leaf: object) -> bool:
    """Whether tensors lie in it, where torch does not look: a subclass of dict, a dataclass, a set."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        items = [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    elif isinstance(leaf, Mapping):
        items = list(leaf.values())
    elif isinstance(leaf, list | tuple | Set):
        items = list(leaf)
    else:
        return False
    return any(isinstance(item, Tensor) or _hides_tensors(item) for item in flatten_tree(items)[0])


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{what}={value!r} must be a whole number")
    return value


def _sizes(sizes: Any) -> Literal["equal"] | list[int] | None:
    if sizes is None or sizes == "equal":
        return sizes  # type: ignore[no-any-return]
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise InputError(f"sizes={sizes!r} must be None, 'equal', or a list with the number of samples of each rank")
    found = [_whole("sizes", size) for size in sizes]
    if min(found) < 0:
        raise InputError(f"sizes={sizes!r} must be numbers of samples, 0 or more")
    return found
