"""What :func:`find` returns: Site for the report, Match for the rewrite, Candidate for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch.fx import Node

from ..runtime.collectives.epilogue import Epilogue, RmsNorm
from .all_reduce import AllReduce
from .norms import Norm
from .reasons import Decline, Rounding
from .sums import Sum


@dataclass(frozen=True)
class Site:
    """One all-reduce of the graph and what became of it.

    ``kind`` is the name of the fused op, None when no norm was recognised; ``decline`` is None when the site
    is fused. ``dtype`` is the activation dtype; ``hidden_size`` the length of the
    normalised dimension. ``source`` is ``file:line`` of the user's code, ``module``
    the path of the ``nn.Module``. ``merged_into``: the site whose fused op carries out this one too.
    ``most_tokens``: up to how many tokens kernels serve it; None where nothing sets a limit.
    """

    index: int
    node: str
    kind: str | None
    decline: Decline | None
    group: str | None
    dtype: str
    hidden_size: int | None
    eps: float | None
    has_residual: bool
    source: str | None
    module: str | None
    roundings: tuple[Rounding, ...] = ()
    merged_into: int | None = None
    most_tokens: int | None = None

    @property
    def fused(self) -> bool:
        return self.decline is None

    @property
    def message(self) -> str:
        if self.decline is not None:
            return self.decline.message
        return "; ".join(self.roundings)


@dataclass(frozen=True)
class Match:
    """The nodes that one fused op replaces: a sum, and the norm that reads it."""

    terms: Sum
    norm: Norm

    @property
    def sum(self) -> Node | None:
        """The tensor that the norm reads; None where an engine's op keeps it to itself."""
        return self.terms.value

    @property
    def end(self) -> Node:
        """The node in whose place the fused op stands: the sum, or the call that computes it and its norm."""
        return self.terms.node

    @property
    def all_reduce(self) -> AllReduce:
        """The first, of which the others are merged into one."""
        return self.terms.all_reduces[0]

    @cached_property
    def epilogue(self) -> Epilogue:
        norm = self.norm
        weighted = norm.weight is not None
        return Epilogue(bool(self.terms.residuals), RmsNorm(norm.eps, norm.weight_bias, weighted))

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        return (*self.terms.roundings, *self.norm.roundings)

    @property
    def anchor(self) -> Node:
        """The node behind which the fused op will stand: the residual may be computed after the all-reduce."""
        return self.end.prev if self.terms.steps else self.end

    @property
    def late_weight(self) -> list[Node]:
        """The weight and what it is computed from, as far as they stand behind :attr:`anchor`; in graph order."""
        late: set[Node] = set()
        queue, anchor = [self.norm.weight] if self.norm.weight is not None else [], self.anchor
        while queue:
            node = queue.pop()
            if node not in late and anchor < node:
                late.add(node)
                queue.extend(node.all_input_nodes)
        return sorted(late)


@dataclass(frozen=True)
class Candidate:
    """A site and, where it is fused, its match, which the sites of merged all-reduces share.

    called: the model calls the fused op by itself, so there is nothing to rewrite. weighted: that call has a weight.
    """

    site: Site
    match: Match | None
    called: bool = False
    weighted: bool = True

    @property
    def fuses(self) -> bool:
        return self.match is not None or self.called

    @property
    def operands(self) -> tuple[bool, bool]:
        """Which the fused op has beside its input: a residual, a weight."""
        if self.match is None:
            return self.site.has_residual, self.weighted
        return self.match.epilogue.residual, self.match.norm.weight is not None

    def declined(self, why: Decline) -> Candidate:
        """The same all-reduce, left as it is."""
        site = replace(self.site, kind=None, decline=why, eps=None, has_residual=False, roundings=(), merged_into=None)
        return Candidate(site, None)
