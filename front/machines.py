"""Machines that a plan may be for: GPUs by name, and what ``collective="auto"`` would choose on N of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from .compile_passes.assignment import Limit
from .compile_passes.match import Site
from .compile_passes.op_options import one_of
from .compile_passes.report import CompileReport, GroupCollective
from .keywords import CollectiveName
from .runtime.collectives import table
from .runtime.collectives.choice import choose
from .runtime.collectives.flashinfer import SUPPORTED
from .runtime.collectives.kernels import Implementation, KernelCall
from .runtime.collectives.links import Links
from .runtime.collectives.rank_facts import RankFacts
from .runtime.collectives.ready import situation_of
from .runtime.collectives.size_table import SizeRow
from .runtime.errors import CollectiveUnavailableError, OptionsError
from .runtime.hazards.situation import Collective, Situation, Strategy
from .runtime.protocol.plan import OWN
from .runtime.protocol.rules import NEWEST_READ
from .runtime.spelling import meant
from .runtime.versions import in_range


@dataclass(frozen=True)
class GpuKind:
    """GPUs of one kind in one node. switch: they are linked by an NVSwitch; without, by PCIe."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    switch: bool
    multicast: bool

    def ranks(self, count: int, flashinfer: str) -> list[RankFacts]:
        """What each of ``count`` ranks would know of itself there. Nothing is turned off."""
        facts = RankFacts(
            host="there",
            device=self.name,
            capability=self.capability,
            multiprocessors=self.multiprocessors,
            flashinfer=flashinfer,
            flashinfer_missing=_unsupported(flashinfer),
            opt_outs=(),
            multicast=self.multicast,
            peers=True,
        )
        return [replace(facts, links=Links(f"GPU {i}", switch=18 if self.switch else 0)) for i in range(count)]

    @property
    def linked(self) -> str:
        return "an NVSwitch" if self.switch else "PCIe"


#: By name. NVIDIA's data sheets: compute capability, multiprocessors, and how their servers (HGX, DGX) link them.
GPUS = {
    machine.name.lower(): machine
    for machine in (
        GpuKind("A100", (8, 0), 108, switch=True, multicast=False),
        GpuKind("H100", (9, 0), 132, switch=True, multicast=True),
        GpuKind("H200", (9, 0), 132, switch=True, multicast=True),
        GpuKind("H20", (9, 0), 78, switch=True, multicast=True),
        GpuKind("B200", (10, 0), 148, switch=True, multicast=True),
        GpuKind("GB200", (10, 0), 148, switch=True, multicast=True),
        GpuKind("B300", (10, 3), 148, switch=True, multicast=True),
        GpuKind("GB300", (10, 3), 148, switch=True, multicast=True),
        GpuKind("L40S", (8, 9), 142, switch=False, multicast=False),
    )
}


@dataclass(frozen=True)
class Planned:
    """What sites are judged as.

    where: the machine that was named. candidates, row, chosen: what was considered on it, and what was chosen with its
    sizes. why_not: why what was asked for cannot be had there; it is judged all the same. left: why no site is fused.
    """

    situation: Situation
    where: str | None = None
    candidates: tuple[str, ...] = ()
    row: SizeRow | None = None
    chosen: Implementation | None = None
    why_not: str | None = None
    left: str | None = None

    @property
    def largest(self) -> int | None:
        """Bytes of the largest fused call there, by the strategies that the release carries out right; None: any."""
        if self.row is None or self.chosen is None:
            return None
        ways = {*self.chosen.strategies} & {*self.chosen.safe(self.situation.flashinfer)}
        return self.row.fused if Strategy.TWO_SHOT in ways else self.row.one_shot

    def limit(self, site: Site) -> Limit | None:
        """Up to how many tokens a site would be fused there."""
        if self.left is not None:
            return Limit((), self.left)
        if self.largest is None or not site.hidden_size:
            return None
        most = self.largest // (site.hidden_size * getattr(torch, site.dtype).itemsize)
        return Limit.of([range(1, most + 1)], str(self.situation.collective), f"{site.hidden_size} {site.dtype}")

    def unmet(self, hidden: int, dtype: str) -> dict[tuple[str, str | None], str]:
        """Why the kernels that were chosen do not take rows of this size, by collective and transport."""
        if self.chosen is None or self.chosen.make is None or not hidden:
            return {}
        call = KernelCall(1, hidden, getattr(torch, dtype), self.situation.world_size, Strategy.ONE_SHOT)
        needs = self.chosen.unmet(call)
        if needs is None:
            return {}
        why = f"hidden size {hidden} of {dtype}: {needs.message} ({needs.source})"
        return {(self.chosen.name, self.chosen.transport): why}

    @property
    def named(self) -> str | None:
        """``trtllm of FlashInfer 0.7.2 on 8 H200``; None where nothing was asked about."""
        if self.where is None and self.situation.collective == Collective.REFERENCE:
            return None
        return f"{self.situation}{f' on {self.where}' if self.where is not None else ''}"

    def told(self, report: CompileReport) -> CompileReport:
        """A report of what was judged so, which nothing of this machine is part of."""
        carriers = tuple(
            GroupCollective(carrier.group, str(self.situation.collective), self.candidates, self.largest)
            for carrier in report.collectives
        )
        notes = (*report.notes, self.why_not) if self.why_not is not None else report.notes
        return replace(report, judged_as=self.named, collectives=carriers, notes=notes)


def find_gpu(name: str) -> GpuKind:
    """Raises :class:`OptionsError` for a GPU that is not known."""
    found = GPUS.get(str(name).lower())
    if found is None:
        raise OptionsError(f"'{name}' is no GPU that is known{meant(str(name).lower(), GPUS, 'known are')}")
    return found


def planned(
    world_size: int,
    collective: str | None,
    flashinfer: str | None,
    gpu: str | None,
    dtype: str,
    unfit: Mapping[tuple[str, str | None], str] | None = None,
    by: Mapping[str, Any] | None = None,
) -> Planned:
    """What a plan is judged as. Without a collective, the one that "auto" would choose on the GPUs that are named.

    unfit: what is passed over for a reason of the model, by collective and transport. by: what else :func:`choose`
    takes, as ``transport``. flashinfer: where it is None, the newest release that was read, if a GPU is named;
    otherwise any release. Raises :class:`OptionsError`, and
    :class:`CollectiveUnavailableError` for a collective that is not to be had there.
    """
    one_of("collective", collective, (None, *(word for word in get_args(CollectiveName) if word != "auto")))
    if flashinfer is not None and not isinstance(flashinfer, str):
        raise OptionsError(f"flashinfer={flashinfer!r} is no version; write it as pip prints it: '{NEWEST_READ}'")
    if flashinfer is not None and collective is None and gpu is None:
        raise OptionsError("--flashinfer says nothing without --collective or --gpu")
    if collective is not None and flashinfer is not None and not uses_flashinfer(collective):
        raise OptionsError(f"--collective {collective} uses no FlashInfer; leave --flashinfer out")
    if gpu is None:
        return Planned(Situation(collective or Collective.REFERENCE, flashinfer, world_size=world_size))
    machine = find_gpu(gpu)
    ranks = machine.ranks(world_size, flashinfer or NEWEST_READ)
    where = f"{world_size} {machine.name} over {machine.linked}"
    try:
        choice = choose(ranks, wanted=collective or "auto", dtype=dtype, failed=unfit, **(by or {}))
    except CollectiveUnavailableError as error:
        if collective is None or not _has_kernels(collective):
            raise
        # it is judged all the same: why it cannot be had is what was asked
        situation = Situation(collective, ranks[0].flashinfer, world_size, capability=machine.capability, dtype=dtype)
        return Planned(situation, where, why_not=str(error))
    situation = situation_of(choice, ranks, dtype=dtype)
    nothing = collective is None and choice.row is None
    left = f"no kernels are to be had on {where}" if nothing else None
    return Planned(situation, where, choice.reasons, choice.row, choice.implementation, left=left)


def _unsupported(flashinfer: str) -> str | None:
    low, high = SUPPORTED
    return None if in_range(flashinfer, low, high) else f"FlashInfer {flashinfer} is not supported ({low} to {high} is)"


def uses_flashinfer(collective: str) -> bool:
    """Whether its kernels are a release of FlashInfer's."""
    return collective not in (*OWN, Collective.NCCL, Collective.REFERENCE)


def _has_kernels(collective: str) -> bool:
    return any(one.name == collective and one.make is not None for one in table.ALL)
