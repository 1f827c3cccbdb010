"""DomainSpecificBN: a layer that sees several domains, each with statistics of its own."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from precisebn._torch import is_tracing
from precisebn.errors import InputError
from precisebn.functional import batch_norm, portable
from precisebn.nn.multi_input import TakesLists
from precisebn.nn.population import PopulationNorm
from precisebn.nn.use_domain import Domain, checked_domain, current_domain
from precisebn.statistics.moments import Moments

__all__ = ["DomainSpecificBN"]

Sharing = Literal["domain", "shared"]


class DomainSpecificBN(TakesLists, PopulationNorm):
    r"""Batch normalization of inputs from K domains, each normalized by the statistics of its own, or of all.

    A sample i of domain :math:`d_i` becomes

    .. math:: y_i = \frac{x_i - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    where three settings say whether the mini-batch's statistics, the population's and the affine are those of the
    domain :math:`d_i` or shared by all ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 5.2). Table 5
    there compares six combinations for a detection head that feature levels share (rows as numbered in detectron2's
    projects/Rethinking-BatchNorm):

    ===========  ==============  ==========  ====================================================================
    normalize    population      affine      which is
    ===========  ==============  ==========  ====================================================================
    ``shared``   ``shared``      shared      row 1: :class:`ConcatSharedBN`; training and test agree
    ``shared``   ``domain``      shared      row 2: they disagree
    ``domain``   ``shared``      shared      row 3: a plain BatchNorm called level by level; they disagree
    ``domain``   ``domain``      shared      row 4: :class:`CycleBatchNormList`; they agree
    ``shared``   ``shared``      domain      as row 1, with separate affines
    ``domain``   ``domain``      domain      as row 4, with separate affines: K layers in one
    ===========  ==============  ==========  ====================================================================

    The domain is given by argument, ``bn(x, domain=k)``; for each sample, ``bn(x, domain=vector)``; by position,
    ``bn([x0, x1, ...])``; or by :func:`use_domain` around a network that cannot pass it on. Statistics of the
    mini-batch are those of one call: with ``normalize="shared"`` all samples of a vector, or all tensors of a list, are
    normalized together. A mini-batch of mixed domains is read as often as one of a single domain.

    Use it where one network serves inputs whose statistics differ by more than noise: feature levels, source and target
    domain, synthetic and real, clean and adversarial images (one population for both is wrong for each). Not where the
    domain is unknown at test time.

    Args:
        num_features: C.
        num_domains: K.
        eps: as in :class:`torch.nn.BatchNorm2d`, as is momentum.
        momentum: of the running statistics.
        affine: ``"domain"``: weight and bias are ``(K, C)``; ``"shared"``: ``(C,)``; None: there are none. As rows of
            one parameter, those of a domain that a step does not see have gradient 0, not None: momentum and weight
            decay move them all the same. And rules that exclude parameters of one dimension from weight decay (timm's)
            miss them. Let every optimizer step see every domain, or share the affine.
        track_running_stats: whether there are running statistics; without, batch statistics serve at test time too.
        device: where parameters and buffers live.
        dtype: theirs.
        normalize: whose mini-batch statistics normalize in training: each domain's own, or those of all.
        population: ``"domain"``: running statistics for each domain, ``(K, C)``, each updated by calls that hold
            samples of it, and used for it at test time; ``"shared"``: one set, ``(C,)``, of all samples of a call
            together.
        bias: whether an affine has a bias; it is a weight alone otherwise.

    Shape:
        ``(N, C, *)`` to the same; or a list of K of them (a domain without samples has N = 0), whose other dimensions
        may differ, to a list. float32, float64, float16 or bfloat16.

    State dict:
        The keys of nn.BatchNorm, whose checkpoints fill every domain.

    Raises:
        InputError: wrong input, no domain or one out of range, or a single value per channel (in a vector, a domain
            with one value is normalized to its bias instead). Of a tensor of domains on a GPU the range is checked
            there, by a device-side assertion.

    Example:
        >>> bn = DomainSpecificBN(1, num_domains=2, eps=0.0)
        >>> bn(torch.tensor([[0.0], [2.0], [10.0], [30.0]]), domain=torch.tensor([0, 0, 1, 1])).flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]
        >>> bn.eval()(torch.tensor([[5.0]]), domain=2)
        Traceback (most recent call last):
        precisebn.errors.InputError: DomainSpecificBN(1): the domain must be from 0 to 1, but is 2
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: Sharing | None = "domain",
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalize: Sharing = "domain",
        population: Sharing = "domain",
        bias: bool = True,
    ) -> None:
        if isinstance(num_domains, bool) or not isinstance(num_domains, int) or num_domains < 1:
            raise InputError(f"num_domains={num_domains!r} must be a whole number, 1 or more")
        for name, value in (("normalize", normalize), ("population", population), ("affine", affine)):
            if value not in ("domain", "shared") and not (name == "affine" and value is None):
                also = ", or None" if name == "affine" else ""
                raise InputError(f"DomainSpecificBN: {name}={value!r} must be 'domain' or 'shared'{also}")
        super().__init__(num_features, eps, momentum, affine is not None, track_running_stats, device, dtype, bias=bias)
        self._repeat(
            populations=num_domains if population == "domain" else None,
            affines=num_domains if affine == "domain" else None,
        )
        self.num_domains = num_domains
        self.normalize = normalize
        self.population = population
        self._own_affine = affine == "domain"

    @overload
    def forward(self, x: Tensor, domain: Domain | None = None) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor], domain: None = None) -> list[Tensor]: ...
    def forward(self, x: Tensor | Sequence[Tensor], domain: Domain | None = None) -> Tensor | list[Tensor]:
        """Normalize a tensor of one domain or of mixed ones, or a list with a tensor for each domain."""
        if isinstance(x, list | tuple):
            return self._list([self.check(tensor) for tensor in x], domain)
        x = self.check(x)
        if domain is None:
            domain = current_domain(self._shown(), x, self.num_domains)
        else:
            domain = checked_domain(self._shown(), domain, self.num_domains)
        if not isinstance(domain, Tensor):
            return self._one(x, domain)
        if not is_tracing() and (domain.shape[0] != x.shape[0] or domain.device != x.device):
            raise InputError(
                f"{self._shown()}: there are {domain.shape[0]} domains on {domain.device} for {x.shape[0]} samples on "
                f"{x.device}; pass one for each sample, on their device"
            )
        return self._mixed(x, domain)

    def _one(self, x: Tensor, domain: int) -> Tensor:
        weight, bias = self._affine_of(x, domain)
        if not self.uses_batch_statistics:
            return self.frozen(x, weight, bias, population=self._population_of(domain))
        return self.normalize_and_track(x, weight, bias, self._population_of(domain))

    def _mixed(self, x: Tensor, domain: Tensor) -> Tensor:
        group = domain if self._own_affine or self.population == "domain" else None
        if not self.uses_batch_statistics:
            return self.frozen(x, self.weight, self.bias, group)
        y, moments = self._normalize_together(x, domain)
        self.track(moments)
        return y

    def _list(self, xs: list[Tensor], domain: Domain | None) -> list[Tensor]:
        if len(xs) != self.num_domains or domain is not None:
            raise InputError(
                f"{self._shown()}: a list holds one tensor for each of the {self.num_domains} domains, in order (an "
                f"empty one where there is none), and takes no domain=; it holds {len(xs)}"
            )
        if self.normalize == "shared" and self.uses_batch_statistics:
            device = xs[0].device
            domains = [torch.full((x.shape[0],), k, device=device) for k, x in enumerate(xs)]
            together, moments = self._normalize_together(xs, domains)
            self.track(moments)
            return together
        if not self.uses_batch_statistics:
            return [self._one(x, k) for k, x in enumerate(xs)]
        ys, each = zip(*(batch_norm(x, *self._affine_of(x, k), eps=self.eps) for k, x in enumerate(xs)), strict=True)
        if self.population == "shared":
            self.track(sum(each[1:], each[0]))
        else:
            for k, moments in enumerate(each):
                self.track(moments, k)
        return list(ys)

    def _affine_of(self, x: Tensor, domain: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a single domain."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if self._own_affine:
            weight, bias = (None if own is None else portable.row(x, own, domain) for own in (weight, bias))
        return weight, bias

    @overload
    def _normalize_together(self, xs: Tensor, domain: Tensor) -> tuple[Tensor, Moments]: ...
    @overload
    def _normalize_together(self, xs: list[Tensor], domain: list[Tensor]) -> tuple[list[Tensor], Moments]: ...
    def _normalize_together(
        self, xs: Tensor | list[Tensor], domain: Tensor | list[Tensor]
    ) -> tuple[Tensor | list[Tensor], Moments]:
        """Normalize samples of mixed domains by batch statistics; their Moments in the shape of the population's."""
        if not self._own_affine and "domain" not in (self.normalize, self.population):
            return batch_norm(xs, self.weight, self.bias, eps=self.eps)
        y, moments = batch_norm(
            xs,
            self.weight,
            self.bias,
            eps=self.eps,
            group=domain,
            num_groups=self.num_domains,
            shared_statistics=self.normalize == "shared",
        )
        return y, moments if self.population == "domain" else moments.sum()

    def _population_of(self, domain: int) -> int | None:
        """Its index; None where there is one for all."""
        return domain if self.population == "domain" else None

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        affine = None if not self.affine else "domain" if self._own_affine else "shared"
        return (
            f"{self.num_features}, num_domains={self.num_domains}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={affine!r}, bias={self.bias is not None}, track_running_stats={self.track_running_stats}, "
            f"normalize={self.normalize!r}, population={self.population!r}"
        )
