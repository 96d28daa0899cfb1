"""The report: the values of the passes, as a table and as JSON.

``ringfence docs report`` documents the JSON; ``SCHEMA`` grows when a field changes its meaning
or goes away.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import torch

from ..runtime.collectives import table
from ..runtime.errors import ArgumentError, NotFusedError, OptionsError
from ..runtime.hazards.situation import Collective
from ..runtime.spelling import group_word
from .judge import Decision, Verdict
from .match import Site
from .moe_sites import MoeSite
from .prove import PlanVerdict
from .report_text import lines, moe_sites_table, parts_table, ranges, sites_table, terminal_width
from .rules import NO_CAPTURE
from .split import Piece

SCHEMA = 1

#: Captured token counts that the summary lists one by one.
_MOST_COUNTS = 8


@dataclass(frozen=True)
class GroupCollective:
    """Who carries out the fused sites of a process group, and why.

    ``candidates`` say of each collective that was considered why it was not taken. ``fused_bytes``: the largest
    input, in bytes on one rank, that its kernels serve; what is larger is left to the piece compiler. None: it serves
    every size.
    """

    group: str
    collective: str
    candidates: tuple[str, ...] = ()
    fused_bytes: int | None = None


@dataclass(frozen=True)
class CompileReport:
    """What happened to one compiled graph, and why.

    ``collectives`` carry out the fused sites, by group; ``notes`` are sentences about the graph as a whole (grad mode,
    padding refused); ``graphs`` names what captures, or None; ``versions`` maps package to version.

    ``judged_as``: what the plan was judged as, where that is not what carries it out (``ringfence explain
    --collective``). ``captured``: the token counts that are captured when they are met. ``moe_sites``: where tokens
    are sent to the ranks of their experts. ``passed_over``: why nothing of the graph was looked at, so that its
    all-reduces are not known.
    """

    sites: tuple[Site, ...]
    pieces: tuple[Piece, ...]
    verdicts: tuple[Verdict, ...]
    options: dict[str, Any]
    versions: dict[str, str | None]
    graphs: str | None
    collectives: tuple[GroupCollective, ...] = ()
    notes: tuple[str, ...] = ()
    plan: PlanVerdict | None = None
    judged_as: str | None = None
    captured: tuple[int, ...] = ()
    serves: str = ""
    name: str = ""
    wasted: str | None = None
    moe_sites: tuple[MoeSite, ...] = ()
    passed_over: str | None = None

    @property
    def collective(self) -> str:
        """Who carries out most of the fused sites; the reference where there are none."""
        return self._main.collective

    @property
    def candidates(self) -> tuple[str, ...]:
        return self._main.candidates

    @property
    def fused_bytes(self) -> int | None:
        return self._main.fused_bytes

    @property
    def _main(self) -> GroupCollective:
        counts = Counter(site.group for site in self.fused)
        return max(self.collectives, key=lambda c: counts[c.group], default=GroupCollective("", "reference"))

    def carrier(self, site: Site) -> str:
        """Who carries out a fused site."""
        refused = any(verdict.site == site.index for verdict in self.refused)
        found = next((c.collective for c in self.collectives if c.group == site.group), None)
        return found if found is not None and not refused else str(Collective.REFERENCE)

    @property
    def fused(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.fused)

    @property
    def declined(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if not s.fused)

    @property
    def summary(self) -> str:
        """One line: how many all-reduces were fused, how the graph was cut."""
        if self.passed_over is not None:
            return f"not looked at, because {self.passed_over}"
        islands = sum(p.island for p in self.pieces)
        pieces = len(self.pieces) - islands
        cut = f"{pieces} piece{'s' * (pieces != 1)} and {islands} island{'s' * (islands != 1)}"
        cut = cut if islands else "one piece"
        captured = f"{self.graphs}, {_counts(self.captured)}" if self.captured else "off"
        replays = f"capture: {captured}" if self.wasted is None else "no replays: sizes change in every call"
        fused = f"{len(self.fused)} of {len(self.sites)} all-reduces fused"
        if self.judged_as is None:
            return f"{fused} (collective: {self._collectives}); {cut}; {replays}"
        return f"{self._alarm}{fused}, {self._by_whom}; {cut}; {replays}"

    @property
    def refused(self) -> tuple[Verdict, ...]:
        """The verdicts that keep the collective from sites; the reference carries them out."""
        return tuple(v for v in self.verdicts if v.site is not None and v.decision is Decision.REFUSE)

    @property
    def _alarm(self) -> str:
        """What a plan for another machine has to say first."""
        failing = [f"UNSAFE ({self.plan.kind})"] if self.plan is not None and self.plan.failed else []
        alarms = failing + (["REFUSED"] if self.refused else [])
        return f"{' and '.join(alarms)}: " if alarms else ""

    @property
    def _by_whom(self) -> str:
        """``158 of them by mnnvl of FlashInfer 0.6.10; 2 by the reference (M1 refuses them)``."""
        if not self.refused:
            return f"judged as {self.judged_as}"
        rules = ", ".join(dict.fromkeys(v.rule for v in self.refused))
        left = len(self.fused) - len(self.refused)
        return f"{left} by {self.judged_as}, {len(self.refused)} by the reference ({rules} refuses)"

    @property
    def _nothing_to_prove(self) -> bool:
        """Nothing is carried out by a collective that has a protocol of its own: the reference has none."""
        if not self.fused and not any(site.rewritten for site in self.moe_sites):
            return True
        only = {str(c.collective) for c in self.collectives} <= {str(Collective.REFERENCE)}
        return self.plan is not None and self.plan.kind == "not_modelled" and only

    @property
    def _collectives(self) -> str:
        """The collective, or those of several groups: ``mnnvl, reference over group '1'``."""
        others = [
            f"{c.collective} over group '{group_word(c.group)}'"
            for c in self.collectives
            if c.collective != self.collective
        ]
        return ", ".join([self.collective, *others])

    @property
    def limits(self) -> tuple[str, ...]:
        """Up to which size a collective serves fused sites, in one sentence for each that has a limit."""
        return tuple(self._limit(c, c.fused_bytes) for c in self.collectives if c.fused_bytes is not None)

    def _limit(self, carrier: GroupCollective, most: int) -> str:
        mine = [s for s in self.sites if s.group == carrier.group and (s.fused or s.most_tokens)]
        shapes = {(s.hidden_size or 1, s.dtype): s.most_tokens for s in mine}
        counts = {(h, d): n or most // (h * getattr(torch, d).itemsize) for (h, d), n in shapes.items()}
        tokens = [f"{n} tokens of {h} {d}" for (h, d), n in counts.items()]
        size = f"{most / 2**20:g} MiB" if most >= 2**20 else f"{most / 2**10:g} KiB"
        of = f" ({', '.join(tokens)})" if tokens else ""
        over = f" over group '{group_word(carrier.group)}'" if len(self.collectives) > 1 else ""
        larger = "are left to the piece compiler, in a graph of their own"
        if self.options.get("deterministic"):
            larger = "are refused"
        return f"{carrier.collective} serves fused sites of up to {size} on a rank{of}{over}, and larger ones {larger}"

    def __str__(self) -> str:
        return self.text(terminal_width())

    def text(self, width: int | None = None) -> str:
        """For a person, in lines of at most ``width`` characters where that can be; None breaks none."""
        parts = [f"ringfence: {self.summary}"]
        if self.serves:
            parts.append(f"graph{' ' + self.name if self.name else ''}: serves {self.serves}")
        parts += self.limits
        tables = lines(parts, width)
        if self.sites:
            tables.append(sites_table(self.sites, width))
            said = _grouped((s.index, s.message) for s in self.sites)
            tables += lines((f"site {i}: {text}" for i, text in said), width)
        if self.moe_sites:
            tables.append(moe_sites_table(self.moe_sites, width))
            said = _grouped((s.index, s.message) for s in self.moe_sites)
            tables += lines((f"MoE site {i}: {text}" for i, text in said), width)
        if len(self.pieces) > 1:
            tables.append(parts_table(self.pieces, width))
        return "\n".join([*tables, *lines(self._why(), width)])

    def _why(self) -> Iterator[str]:
        telling = (v for v in self.verdicts if v.rule != NO_CAPTURE)  # "capture: off" says it of the whole
        for ops, text in _grouped((v.op, f"{v.decision}: {v.message}") for v in telling):
            yield f"{ops}: {text}"
        for names, why in _grouped((p.name, p.op_by_op or "") for p in self.pieces):
            yield f"{names} runs op by op: {why}"
        if self.plan is not None and not self._nothing_to_prove:
            yield f"plan: {self.plan.kind}: {self.plan.message}"
        for carrier in self.collectives:
            over = f" (group '{group_word(carrier.group)}')" if len(self.collectives) > 1 else ""
            yield from (f"collective {candidate}{over}" for candidate in carrier.candidates)
        yield from (f"note: {note}" for note in self.notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; the schema: ``ringfence docs report``."""
        return {
            "schema": SCHEMA,
            "summary": self.summary,
            "collective": self.collective,
            "judged_as": self.judged_as,
            "fused_bytes": self.fused_bytes,
            "candidates": list(self.candidates),
            "collectives": [_plain(c) for c in self.collectives],
            "graphs": self.graphs,
            "captured": list(self.captured),
            "name": self.name,
            "serves": self.serves,
            "wasted": self.wasted,
            "passed_over": self.passed_over,
            "sites": [_site(s) for s in self.sites],
            "moe_sites": [_moe_site(s) for s in self.moe_sites],
            "pieces": [_plain(p) for p in self.pieces],
            "verdicts": [_plain(v) for v in self.verdicts],
            "plan": _plain(self.plan) if self.plan is not None else None,
            "options": self.options,
            "versions": self.versions,
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)


class Reports(list[CompileReport]):
    """The reports of a backend, in the order of its graphs. To ask an empty one for a report says why there is none."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> CompileReport: ...

    @overload
    def __getitem__(self, index: slice) -> list[CompileReport]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> CompileReport | list[CompileReport]:
        if not self and not isinstance(index, slice):
            raise IndexError(
                "no graph has reached this backend. Call the compiled model first; if it was called, Dynamo compiled "
                "nothing of it: torch.compile(..., fullgraph=True) names the line that it cannot trace, as a call of "
                "torch.distributed.nn.functional.all_reduce (call torch.distributed.all_reduce)"
            )
        return super().__getitem__(index)


#: What :func:`assert_fused` may ask for: any collective but the reference, or one.
_KERNELS = "kernels"
_CARRIERS = (_KERNELS, *sorted({str(one.name) for one in table.ALL} | {str(Collective.REFERENCE)}))


def assert_fused(report: CompileReport, count: int | None = None, *, collective: str | None = None) -> None:
    """Check how many all-reduces of a compiled graph were fused, and by whom they are carried out.

    ``count`` is the exact number expected; None expects all of them, and at least one. A fused site may run on the
    reference (an all-reduce of NCCL or gloo, then add and norm), where no kernels are or where they are refused;
    ``collective`` says what counts: None anything, ``"kernels"`` what is not the reference, a name that one, such as
    ``"ringfence"`` or ``"reference"``.
    Raises :class:`NotFusedError` (an ``AssertionError``) with the reason of every site
    that was not fused, or is carried out by another collective.
    """
    if not isinstance(report, CompileReport):
        raise ArgumentError(f"assert_fused takes a CompileReport (one of Backend.reports), not {type(report).__name__}")
    if collective not in (None, *_CARRIERS):
        raise OptionsError(f"collective={collective!r} is none of {', '.join(_CARRIERS)}")
    expected = count if count is not None else max(len(report.sites), 1)
    elsewhere = [(s, c) for s in report.fused if not _counts_as(collective, c := report.carrier(s))]
    counted = len(report.fused) - len(elsewhere)
    if counted == expected:
        return
    by = f" by {collective}" if collective is not None else ""
    lines = [f"{counted} all-reduces were fused{by}, {expected} were expected ({len(report.sites)} in the graph)"]
    lines += [f"  site {s.index} ({s.module or s.node}): carried out by {carrier}" for s, carrier in elsewhere]
    lines += [f"  {text}" for text in report.candidates if elsewhere]
    lines += [
        f"  site {s.index} ({s.module or s.node}, {s.source or 'source unknown'}): "
        f"{s.decline.reason}: {s.decline.message}"
        for s in report.declined
        if s.decline
    ]
    lines += [f"  {note}" for note in report.notes]
    raise NotFusedError("\n".join(lines))


def _counts_as(wanted: str | None, carrier: str) -> bool:
    return carrier != Collective.REFERENCE if wanted == _KERNELS else wanted in (None, carrier)


def _site(site: Site) -> dict[str, Any]:
    return {
        "index": site.index,
        "kind": site.kind,
        "fused": site.fused,
        "reason": str(site.decline.reason) if site.decline else None,
        "message": site.message,
        "group": site.group,
        "dtype": site.dtype,
        "hidden_size": site.hidden_size,
        "eps": site.eps,
        "has_residual": site.has_residual,
        "source": site.source,
        "module": site.module,
        "roundings": [r.name.lower() for r in site.roundings],
        "merged_into": site.merged_into,
        "most_tokens": site.most_tokens,
    }


def _moe_site(site: MoeSite) -> dict[str, Any]:
    return {
        **{f.name: getattr(site, f.name) for f in dataclasses.fields(site) if f.name not in ("decline", "roundings")},
        "rewritten": site.rewritten,
        "reason": str(site.decline.reason) if site.decline else None,
        "message": site.message,
        "roundings": [r.name.lower() for r in site.roundings],
    }


def _plain(value: Piece | Verdict | PlanVerdict | GroupCollective) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them."""
    fields = dataclasses.asdict(value)
    return {k: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, str) else v for k, v in fields.items()}


def _counts(tokens: tuple[int, ...]) -> str:
    """Token counts: all of a few, the ends of many."""
    if len(tokens) <= _MOST_COUNTS:
        return f"{', '.join(map(str, tokens))} token{'s' if tokens != (1,) else ''}"
    return f"{len(tokens)} sizes from {tokens[0]} to {tokens[-1]} tokens"


def _grouped(pairs: Iterable[tuple[int | str, str]]) -> list[tuple[str, str]]:
    """``[("0-1, 4", text), ...]``: the same sentence once, for all that it is about."""
    texts: dict[str, list[int | str]] = {}
    for key, text in pairs:
        if text and key not in texts.setdefault(text, []):
            texts[text].append(key)
    return [(_listed(keys), text) for text, keys in texts.items()]


def _listed(keys: Sequence[int | str]) -> str:
    numbers = [key for key in keys if isinstance(key, int)]
    return ranges(numbers) if len(numbers) == len(keys) else ", ".join(map(str, keys))
