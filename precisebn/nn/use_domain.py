"""use_domain: tell the layers of a network which domain their input is from, past forwards that cannot pass it on.

The domain is a context variable (PEP 567), so that it nests, and threads and asyncio tasks do not see each other's.
Compiled code cannot look at it while it is traced: it asks an operator, each time it runs, and so one graph serves all
domains. A graph that leaves Python for good (torch.jit.trace, torch.onnx) is of the domain of the block it is made in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from precisebn._reports import counted
from precisebn._torch import assert_async, in_backward, is_tracing
from precisebn.errors import InputError
from precisebn.nn.norm import TO_PLAIN

__all__ = ["Domain", "checked_domain", "current_domain", "use_domain"]

Domain = int | Tensor
"""The number of a domain, from 0; or one for each sample, int64 ``(N,)``."""

_current: ContextVar[Domain | None] = ContextVar("precisebn_domain", default=None)


@contextmanager
def use_domain(domain: Domain) -> Iterator[None]:
    """Within this block, domain-specific layers that are not told otherwise take their input to be from this domain.

    Works around any network: ``nn.Sequential``, DistributedDataParallel, a compiled model. Blocks nest, the inner one
    counts; threads and asyncio tasks each have their own. Put it around compiled code, not inside. What runs on other
    threads does not see it and says so: the replicas of DataParallel, and forwards that activation checkpointing
    repeats in the backward of a CUDA model (on the CPU, put ``backward()`` inside the block too). A backward
    that runs inside a block of another domain repeats such forwards with that domain, which nothing can notice: keep to
    the same block, or pass ``domain=``.

    Args:
        domain: its number, from 0; or one for each sample of the mini-batch, int64 ``(N,)``.

    Raises:
        InputError: the domain is neither.

    Example:
        >>> from precisebn.nn import DomainSpecificBN
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), DomainSpecificBN(8, num_domains=2))
        >>> with use_domain(1):
        ...     model(torch.randn(16, 4)).shape
        torch.Size([16, 8])
        >>> model[1].num_batches_tracked
        tensor([0, 1])
    """
    token = _current.set(checked_domain("use_domain", domain))
    try:
        yield
    finally:
        _current.reset(token)


def checked_domain(who: str, domain: Any, num_domains: int | None = None) -> Domain:
    """A domain, also of NumPy's integers, that is in range as far as the device need not be waited for.

    Raises:
        InputError: it is none.
    """
    if not isinstance(domain, int | Tensor | torch.SymInt) and isinstance(domain, Integral):
        domain = int(domain)
    if isinstance(domain, Tensor):
        if domain.dtype != torch.int64 or domain.dim() != 1:
            raise InputError(
                f"{who}: a tensor of domains must be int64 (N,), one number for each sample, but is {domain.dtype} of "
                f"shape {tuple(domain.shape)}; for a single domain pass int(domain)"
            )
        if num_domains is not None and not _is_baked_in() and domain.numel():
            if domain.device.type == "cpu" and not torch.compiler.is_compiling():
                lowest, highest = (int(bound) for bound in domain.aminmax())
                if lowest < 0 or highest >= num_domains:
                    raise InputError(
                        f"{who}: domains must be from 0 to {num_domains - 1}, but go from {lowest} to {highest}"
                    )
            else:
                in_range = ((domain >= 0) & (domain < num_domains)).all()
                assert_async(in_range, f"{who}: domains must be from 0 to {num_domains - 1}")
    elif isinstance(domain, bool) or not isinstance(domain, int | torch.SymInt):
        raise InputError(
            f"{who}: a domain is a whole number, or an int64 tensor (N,) with one for each sample, not "
            f"{type(domain).__name__}: {domain!r}"
        )
    elif domain < 0 or (num_domains is not None and domain >= num_domains):
        allowed = "0 or more" if num_domains is None else f"from 0 to {num_domains - 1}"
        raise InputError(f"{who}: the domain must be {allowed}, but is {domain}")
    checked: Domain = domain
    return checked


def current_domain(who: str, x: Tensor, num_domains: int) -> Domain:
    """The domain that :func:`use_domain` has set; in a graph, as a tensor with one number for each sample of ``x``.

    Raises:
        InputError: none is set, or it is out of range.
    """
    if torch.compiler.is_compiling() and not _is_baked_in(x):
        vector: Tensor = torch.ops.precisebn.current_domain(x, num_domains, who)
        return vector
    domain = _current.get()
    if domain is None:
        repeated = (
            " (This forward runs inside a backward, repeated by activation checkpointing: put backward() inside the "
            "block too, or pass domain=.)"
            if in_backward()
            else ""
        )
        if _is_baked_in(x):
            raise _unasked(who)
        raise InputError(
            f"{who}: of which domain is the input? Call it with domain=, on a list with one tensor for each domain, or "
            f"inside a block `with use_domain(...)`, which for update_bn_stats goes into forward=.{repeated}"
        )
    return checked_domain(who, domain, num_domains)


def _is_baked_in(x: Tensor | None = None) -> bool:
    """Whether a graph is being made that cannot ask for the domain: the one of its making becomes a constant."""
    return is_tracing() or isinstance(x, Proxy) or torch.onnx.is_in_onnx_export()


def _unasked(who: str) -> InputError:
    return InputError(
        f"{who}: of which domain is the input? Export the model itself inside a block `with use_domain(k):`, which "
        f"makes a graph of that domain, or one without domains: {TO_PLAIN}"
    )


def _current_domain_of_samples(x: Tensor, num_domains: int, who: str) -> Tensor:
    domain = current_domain(who, x, num_domains)
    if not isinstance(domain, Tensor):
        return torch.full((x.shape[0],), domain, device=x.device)
    if domain.shape[0] != x.shape[0] or domain.device != x.device:
        raise InputError(
            f"{who}: use_domain has set {counted(domain.shape[0], 'domain')} on {domain.device}, but the input has "
            f"{counted(x.shape[0], 'sample')} on {x.device}"
        )
    return domain.clone()  # an operator must not return what it was not given


def _fake_current_domain(x: Tensor, num_domains: int, who: str) -> Tensor:
    if torch.onnx.is_in_onnx_export():  # of a program of torch.export, or through Dynamo: ONNX has no such operator
        raise _unasked(who)
    return x.new_empty(x.shape[0], dtype=torch.int64)


_library = torch.library.Library("precisebn", "FRAGMENT")
_library.define(
    "current_domain(Tensor x, int num_domains, str who) -> Tensor",
    # A CUDA graph would replay the domain of its recording.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_library.impl("current_domain", _current_domain_of_samples, "CompositeExplicitAutograd")
torch.library.register_fake("precisebn::current_domain", _fake_current_domain)
