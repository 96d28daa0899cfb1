"""The journals of all ranks, merged: which rank stopped first, and who waits for it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import JournalError
from ..spelling import ranks_text
from . import checked
from .culprit import Failure, Finding, find_alone, find_culprit, stood_still
from .deadlines import Deadlines
from .folder import BEGUN, Origin, is_put_away, older_ranks, rank_that_wrote
from .journal import FORMAT
from .position import REPLAY, CallSpan, Position, sizes_text
from .report import Report, in_brief
from .user_code import CodePlace

log = logging.getLogger(__name__)

#: Of so many steps, the last ones of a file, the pieces are looked at: enough for a picture, and to line up clocks.
_MARKED_STEPS = 8


#: Of a rank whose file says that it began, and no more.
WROTE_NOTHING = "wrote nothing since it began"


@dataclass(frozen=True)
class Mark:
    """One piece of one step as a rank wrote it down. Times are in seconds of the rank's wall clock."""

    step: int
    piece: int
    name: str
    kind: str
    sizes: tuple[int, ...]
    entered: float
    left: float | None
    calls: tuple[CallSpan, ...]


@dataclass(frozen=True)
class RankJournal:
    """The file of one rank. report: of the first that went wrong. later: what it wrote after that, and why.

    marks: of its last steps. code: the line of the user's program in which it stood, or threw.
    """

    rank: int
    reason: str
    written: float
    position: Position
    groups: Mapping[str, tuple[int, ...]]
    steps: tuple[tuple[int, tuple[int, ...], str], ...]  # number; sizes and how, as far as all ranks share them
    marks: tuple[Mark, ...]  # of the last steps
    heard: Mapping[int, Position]
    silent: Mapping[int, str]
    failures: tuple[Failure, ...]
    probes: Mapping[str, Any]
    report: Report | None = None
    later: tuple[str, ...] = ()
    code: CodePlace | None = None
    origin: Origin = field(default_factory=Origin)

    @property
    def saw_it(self) -> bool:
        """Whether it was written because something went wrong, and not because somebody asked for it."""
        return self.report is not None or self.reason.partition(": ")[0] in ("hang", "failure", "alone")

    @property
    def has_begun_only(self) -> bool:
        """Whether nothing was written since the rank began."""
        return self.reason == BEGUN


@dataclass(frozen=True)
class Merged:
    """What the journals say together. sentence: which rank stopped first, where, and who waits for it.

    missing: ranks without a file. could_not_write: those of them that others heard talk until they wrote themselves.
    begun: those whose file says that they began, and no more.
    nothing_from: rank -> the ranks whose memory holds nothing of it, though they wait in a call.
    """

    sentence: str
    finding: Finding | None
    journals: tuple[RankJournal, ...]
    missing: tuple[int, ...]
    divergence: str | None
    nothing_from: Mapping[int, tuple[int, ...]]
    could_not_write: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    brief: str = ""

    @property
    def short(self) -> str:
        """The sentence without the places."""
        return (self.finding.short if self.finding is not None else self.brief) or self.sentence

    def to_dict(self) -> dict[str, Any]:
        """The schema is docs/report.md."""
        return {
            "format": FORMAT,
            "run": next((j.origin.run for j in self.journals if j.origin.run), ""),
            "attempt": next((j.origin.attempt for j in self.journals if j.origin.attempt is not None), None),
            "sentence": self.sentence,
            "short": self.short,
            "code": {str(j.rank): str(j.code) for j in self.journals if j.code is not None},
            "ranks": list(self.finding.ranks) if self.finding is not None else [],
            "waiting": list(self.finding.waiting) if self.finding is not None else [],
            "missing": list(self.missing),
            "could_not_write": list(self.could_not_write),
            "divergence": self.divergence,
            "nothing_from": {str(rank): list(waiting) for rank, waiting in self.nothing_from.items()},
            "positions": {str(j.rank): j.position.to_dict() for j in self.journals},
            "reasons": {str(j.rank): j.reason for j in self.journals},
            "later": {str(j.rank): list(j.later) for j in self.journals if j.later},
        }


def read_folder(folder: Path) -> tuple[RankJournal, ...]:
    """The journals that the last start of a job left in a folder, by rank. Raises :class:`JournalError`."""
    if not folder.is_dir():
        raise JournalError(f"'{folder}' is no folder; journals are written into the option journal_dir")
    paths = sorted(path for path in folder.glob("journal-rank*.json") if not is_put_away(path))
    if not paths:
        raise JournalError(
            f"'{folder}' holds no journal-rank*.json; were any written? They need the option journal_dir"
        )
    written_by = {rank for path in paths if (rank := rank_that_wrote(path)) is not None}
    by_rank: dict[int, tuple[Path, RankJournal]] = {}
    for path in paths:
        try:
            with _without_collector():
                journal = _read(path, written_by)
        except JournalError as error:
            if path == paths[-1] and not by_rank:  # none can be read
                raise
            log.warning("ringfence: %s; the rank counts as one without a journal", error)
            continue
        if journal.rank in by_rank:
            raise JournalError(
                f"'{by_rank[journal.rank][0].name}' and '{path.name}' are both of rank {journal.rank}; "
                "keep the journals of one job in a folder"
            )
        by_rank[journal.rank] = path, journal
    journals = {rank: journal for rank, (_, journal) in sorted(by_rank.items())}
    written = {rank: j.written for rank, j in journals.items()}
    left = older_ranks({rank: j.origin for rank, j in journals.items()}, written)
    return tuple(j for rank, j in journals.items() if rank not in left)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of numbers are made, none of which is garbage; looking for some takes longer than to read them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(path: Path, written_by: Collection[int]) -> RankJournal:
    """written_by: the ranks that have files; where one knows what happened, what it heard of those is not needed."""
    if not path.is_file():  # a FIFO would be waited for
        raise JournalError(f"'{path.name}' is no file")
    if path.stat().st_size == 0:
        raise JournalError(f"'{path.name}' is empty, as where its disk was full")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise JournalError(f"'{path.name}' cannot be read: {error}") from error
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise JournalError(f"'{path.name}' is no journal of format {FORMAT}; read it with the ringfence that wrote it")
    try:
        report = Report.from_dict(value["report"]) if value.get("report") is not None else None
        knows = report is not None and report.conclusive
        return RankJournal(
            checked.integer(value["rank"]),
            checked.text(value["reason"]),
            checked.number(value["time"]),
            Position.from_dict(value["position"]),
            {str(name): checked.integers(ranks) for name, ranks in value["groups"].items()},
            tuple(_compared(value["programs"], step) for step in value["steps"]),
            tuple(_marks(value)),
            {
                int(rank): Position.from_dict(p)
                for rank, p in value.get("heard", {}).items()
                if not knows or int(rank) not in written_by
            },
            {int(rank): str(how) for rank, how in value.get("silent", {}).items()},
            tuple(Failure.from_dict(f) for f in value.get("failures", ())),
            dict(value.get("probes", {})),
            report,
            tuple(str(note["reason"]) for note in value.get("later", ())),
            CodePlace.from_dict(value.get("code")),
            Origin.from_dict(value.get("origin", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise JournalError(f"'{path.name}' is damaged: {type(error).__name__}: {error}") from error


def _compared(programs: Sequence[Any], step: Mapping[str, Any]) -> tuple[int, tuple[int, ...], str]:
    """What of a step must be the same on all ranks: sizes of a rank's own, and what it captures alone, need not."""
    program, sizes = programs[step["program"]], checked.integers(step["sizes"])
    shared = program.get("shared")
    compared = sizes if shared is None else tuple(sizes[i] for i in checked.integers(shared))
    how = checked.text(step["how"])
    return checked.integer(step["step"]), compared, how if program.get("lockstep", True) else ""


def _marks(value: Mapping[str, Any]) -> Iterator[Mark]:
    # Ranks have monotonic clocks of their own; the wall clock is what they share.
    offset = checked.number(value["time"]) - checked.integer(value["clock_ns"]) / 1e9
    pieces = [[_piece(p) for p in program["pieces"]] for program in value["programs"]]
    for step in value["steps"][-_MARKED_STEPS:]:
        number, sizes, how = checked.integer(step["step"]), checked.integers(step["sizes"]), checked.text(step["how"])
        counts = checked.counts(step["calls_before"])
        for i, (entered, left) in enumerate(step["pieces"]):
            name, island, groups = pieces[step["program"]][i]
            calls = []
            for group, more in groups:
                first = counts.get(group, 0)
                counts[group] = first + more
                calls.append(CallSpan(group, first, first + more - 1))
            yield Mark(
                number,
                i,
                name,
                "island" if island else "graph" if how == REPLAY else how,
                sizes,
                offset + checked.integer(entered) / 1e9,
                None if left is None else offset + checked.integer(left) / 1e9,
                tuple(calls),
            )


def _piece(value: Mapping[str, Any]) -> tuple[str, bool, tuple[tuple[str, int], ...]]:
    """Its name, whether it is an island, and how many calls of which group."""
    return checked.text(value["name"]), bool(value["island"]), tuple(Counter(map(checked.text, value["calls"])).items())


def merge(journals: Sequence[RankJournal]) -> Merged:
    """Who stopped first? What the ranks reported when it happened counts; else where they were at one moment.

    A rank without a file counts as silent, unless others heard it talk until they wrote.
    """
    members: dict[str, tuple[int, ...]] = {}
    for j in journals:
        members |= {name: group for name, group in j.groups.items() if group}
    begun = tuple(j.rank for j in journals if j.has_begun_only)
    journals = tuple(j for j in journals if not j.has_begun_only)
    if not journals:
        may = "they run, have ended in order, or were ended before they could write"
        sentence = f"{ranks_text(begun)} began and wrote nothing since: {may}"
        return Merged(sentence, None, (), begun, None, {}, begun=begun)
    ranks = {j.rank for j in journals}
    missing = tuple(sorted({r for group in members.values() for r in group} - ranks))
    heard = {rank for j in journals for rank in j.heard}
    silent = {rank: how for j in journals for rank, how in j.silent.items()}
    could_not_write = tuple(rank for rank in missing if rank in heard and rank not in silent)
    told = _told(journals)
    finding = told.finding if told is not None else _found(journals, members, missing, could_not_write, silent, begun)
    ends = [j.report for j in journals if j.report is not None and j.report.kind == "end"]
    brief = ""
    if told is None and ends and finding is not None:
        standing = stood_still({j.rank: j.position for j in journals}, finding, Deadlines().alone)
        # A rank that was watched would have written itself that others waited for it when it was told to end.
        in_order = all(j.heard for j in journals if j.rank in finding.ranks)
        finding = finding if standing and not in_order else None  # else they were in the middle of a step
    divergence = first_divergence(journals)
    if finding is not None:
        sentence = finding.sentence
    elif ends:
        sentence = f"nobody waited for long: {'; '.join(r.sentence for r in ends)}"
        brief = f"nobody waited for long: {in_brief(ends)}"
    else:
        sentence = divergence or "no rank waits: every step that was begun is complete"
        if divergence is None and len({j.reason for j in journals}) == 1:
            sentence = f"{journals[0].reason}; {sentence}"
    nothing_from = _nothing_from(journals)
    return Merged(sentence, finding, tuple(journals), missing, divergence, nothing_from, could_not_write, begun, brief)


def _told(journals: Sequence[RankJournal]) -> Report | None:
    """What was reported when it happened: by all ranks the same, unless two of them saw it at once.

    Then the rank that is to blame knows best. None where nobody knew the cause.
    """
    reports = [j.report for j in journals if j.report is not None and j.report.conclusive]
    votes = Counter(r.ranks for r in reports)
    return max(reports, key=lambda r: (r.reporter in r.ranks, votes[r.ranks], -r.reporter), default=None)


def _found(
    journals: Sequence[RankJournal],
    members: Mapping[str, Sequence[int]],
    missing: Sequence[int],
    could_not_write: Sequence[int],
    silent: Mapping[int, str],
    begun: Sequence[int],
) -> Finding | None:
    """The same by where the ranks were, as one of them saw it: the others may have gone on before they wrote."""
    failures = tuple(dict.fromkeys(f for j in journals for f in j.failures))
    left = {rank: WROTE_NOTHING if rank in begun else "left no journal that can be read" for rank in missing}
    gone = {rank: how for rank, how in {**left, **silent}.items() if rank in missing and rank not in could_not_write}
    own = {j.rank: j.position for j in journals}
    heard = {rank: p for j in journals for rank, p in j.heard.items() if rank in missing}
    # A rank that others did not hear was stopped; one that waits saw what it waited for.
    saw_it = [j for j in journals if j.saw_it and (j.heard or j.silent)]
    for j in sorted(saw_it, key=lambda j: (j.rank in silent, not j.position.waits, j.rank)):
        positions = {**heard, **own, **j.heard, j.rank: j.position}
        alone = find_alone({**j.heard, j.rank: j.position}, members, 0.0) if j.reason.startswith("alone: ") else None
        unheard = silent if j.rank not in silent else {}
        if found := alone or find_culprit(positions, {**gone, **unheard}, failures, members):
            return found
    return find_culprit({**heard, **own}, gone, failures, members)


def _nothing_from(journals: Sequence[RankJournal]) -> dict[int, tuple[int, ...]]:
    """What the probes of the workspaces say; another probe may say what it likes."""
    found: dict[int, set[int]] = {}
    for j in journals:
        for value in j.probes.values():
            for workspace in value if isinstance(value, list) else ():
                silent = workspace.get("silent") if isinstance(workspace, Mapping) else None
                for rank in silent if isinstance(silent, list) else ():
                    if isinstance(rank, int):
                        found.setdefault(rank, set()).add(j.rank)
    return {rank: tuple(sorted(waiting)) for rank, waiting in sorted(found.items())}


def first_divergence(journals: Sequence[RankJournal]) -> str | None:
    """The first step in which the ranks ran other sizes or another graph, of the steps that all journals hold."""
    steps = [{number: (sizes, how) for number, sizes, how in j.steps} for j in journals]
    if not steps:
        return None
    for number in sorted(set(steps[0]).intersection(*steps[1:])):
        chosen = [s[number] for s in steps]
        if len(set(chosen)) > 1:
            by_rank = {
                j.rank: ", ".join(filter(None, (sizes_text(sizes), how)))
                for j, (sizes, how) in zip(journals, chosen, strict=True)
            }
            holders: dict[str, list[int]] = {}
            for rank, text in by_rank.items():
                holders.setdefault(text, []).append(rank)
            sides = "; ".join(f"{ranks_text(r)}: {text}" for text, r in holders.items())
            return f"the ranks diverge at step {number}: {sides}"
    return None
