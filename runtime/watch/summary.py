"""Summary: the merged journals for a terminal: who, in which line of code, and where every rank is; nothing twice."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from ..drawing import wrapped
from ..spelling import group_word, ranks_text
from .culprit import came_with
from .journals import WROTE_NOTHING, Merged, RankJournal
from .position import COMPILES, Position, sizes_text

WIDTH = 80


def text(merged: Merged, width: int = WIDTH) -> str:
    """At most ``width`` columns wide, but for a word that is longer."""
    ranks = ranks_of(merged) if merged.journals else []  # of none more is known than the answer says
    lines = [*answer(merged), *[""] * bool(ranks), *(rank_line(merged, rank) for rank in ranks), *_more(merged)]
    return "\n".join(wrapped(line, width) for line in lines)


def ranks_of(merged: Merged) -> list[int]:
    """All of the job, with a file or without."""
    return sorted({*(j.rank for j in merged.journals), *merged.missing})


def code_lines(merged: Merged) -> Iterator[str]:
    """``rank 1 is at job.py:30 in serve: time.sleep(3600)``: of each rank to blame that wrote a file."""
    blamed = merged.finding.ranks if merged.finding is not None else ()
    # Where all stand in the same call, each in the same line of code, no line tells anything.
    for j in merged.journals:
        if j.rank in blamed and j.code is not None and len(blamed) < max(len(ranks_of(merged)), 2):
            threw = merged.short.startswith(f"rank {j.rank} failed")
            yield f"rank {j.rank} {'threw' if threw else 'is'} at {j.code}"


def sizes_line(merged: Merged) -> str | None:
    """``rank 1 came with 1 token, the others with 16``: of the first step in which they came with different sizes."""
    steps = [{number: sizes for number, sizes, _ in j.steps} for j in merged.journals]
    for number in sorted(set(steps[0]).intersection(*steps[1:])) if steps else ():
        came = came_with({j.rank: s[number] for j, s in zip(merged.journals, steps, strict=True)})
        if came is not None:
            return f"{came[1]}, in step {number}"
    return None


def answer(merged: Merged) -> Iterator[str]:
    came = sizes_line(merged)
    no_culprit = merged.finding is None and merged.sentence == merged.divergence
    if came is None or not no_culprit:
        yield merged.short
    if came is not None and merged.short not in came:
        yield came
    elif came is None and merged.divergence is not None and not no_culprit:
        yield merged.divergence  # the same sizes, and another graph
    yield from code_lines(merged)


def rank_line(merged: Merged, rank: int) -> str:
    """Where one rank is."""
    journal = next((j for j in merged.journals if j.rank == rank), None)
    if journal is not None:
        return f"rank {rank} {where(journal.position, several_groups(merged.journals))}"
    return f"rank {rank} {no_file(merged, rank)}"


def no_file(merged: Merged, rank: int) -> str:
    """What is known of a rank without one."""
    said = "left no file that can be read"
    if rank in merged.begun:  # its disk may be full; it may have been ended, or have closed its backend
        said = WROTE_NOTHING
    elif rank in merged.could_not_write:
        said = "could not write its file"
    last = last_heard(merged, rank)
    known = f"; when last heard of, it {where(last, several_groups(merged.journals))}" if last is not None else ""
    return said + known


def last_heard(merged: Merged, rank: int) -> Position | None:
    """Where a rank without a file was, as far as that says anything: what was heard many steps ago does not."""
    told = [j.heard[rank] for j in merged.journals if rank in j.heard]
    last = max(told, key=lambda p: p.moved, default=None)
    step = max((j.position.step for j in merged.journals), default=-1)
    return last if last is not None and last.step >= step - 1 else None


def several_groups(journals: tuple[RankJournal, ...]) -> bool:
    """Whether calls have to be told apart by their group."""
    return len({name for j in journals for name in (*j.position.submitted, *j.groups)}) > 1


def where(position: Position, groups: bool) -> str:
    """``waits in call 14: step 7 of sizes (8,), piece 3 'submod_3'``, or what else a rank does."""
    if position.exchange:
        does = f" and {position.compiles}" if position.compiles not in ("", COMPILES) else ""
        return f"waits for the others in the exchange '{position.exchange}'{does}"
    if position.step < 0:
        return "compiles its first graph" if position.phase == "compile" else "has not called the model"
    step = f"step {position.step} of {sizes_text(position.sizes)}" + f" of {position.graph}" * bool(position.graph)
    if position.phase == "compile":
        return f"compiles since {position.still:.1f} s, after {step}"
    if not position.stuck_in_piece:
        return f"is outside of the model since {position.still:.1f} s, after {step}"
    piece = f"{step}, piece {position.piece} '{position.name}'"
    if not position.calls:
        return f"is in {piece} ({position.kind}), in no call"
    return f"waits in {', '.join(call_text(c.first, c.last, c.group, groups) for c in position.calls)}: {piece}"


def call_text(first: int, last: int, group: str, groups: bool) -> str:
    numbers = f"call {first}" if first == last else f"calls {first} to {last}"
    return f"{numbers} of group '{group_word(group)}'" if groups else numbers


def _more(merged: Merged) -> Iterator[str]:
    """What is known beside the positions."""
    notes = [merged.finding.evidence] if merged.finding is not None and merged.finding.evidence else []
    for rank, waiting in merged.nothing_from.items():
        wait = "waits" if len(waiting) == 1 else "wait"
        notes.append(f"nothing of rank {rank} has arrived in the memory of {ranks_text(waiting)}, which {wait} for it")
    by_reason: dict[str, list[int]] = {}
    for j in merged.journals:
        if not _says_the_same(j.reason, merged):
            by_reason.setdefault(_without_seconds(j.reason), []).append(j.rank)
    for reason, ranks in by_reason.items():
        wrote = "every rank" if len(ranks) == len(ranks_of(merged)) else ranks_text(ranks)
        notes.append(f"{wrote} wrote because of: {textwrap.shorten(reason, 2 * WIDTH, placeholder=' ...')}")
    if merged.finding is not None and merged.finding.remedy:
        notes.append(f"remedy: {merged.finding.remedy}")
    if notes:
        yield ""
        yield from notes


def _says_the_same(reason: str, merged: Merged) -> bool:
    """Whether a rank wrote because of what the files together say: of the same ranks."""
    told = reason.partition(": ")[2] if re.match(r"(hang|failure|alone|end): ", reason) else reason
    blamed = ranks_text(merged.finding.ranks) if merged.finding is not None and merged.finding.ranks else None
    if reason.startswith("end: "):
        blamed = None  # that a rank was told to end says nothing of what it did before
    return told in merged.sentence or (blamed is not None and re.match(rf"{blamed}\b(?!,)", told) is not None)


def _without_seconds(text: str) -> str:
    """Ranks that write of one thing at different moments say one thing."""
    return re.sub(r" (since|for) \d+(\.\d+)? s\b", "", text)
