"""Timeline: a trace as people read it, with a column per rank, as text or as SVG, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ..drawing import ALARM, ALARM_FILL, FAINT, HAIR, STEP, STEP_FRAME, Drawing, lines_of, wrapped
from ..errors import TraceError
from .explore import Event, ModelFailure, Result

_FORMAT = 1

#: Of the picture. The numbers of the steps stand left of the columns.
_WIDTH, _LEFT, _NARROWEST, _WIDEST, _BETWEEN = 1000.0, 44.0, 190.0, 480.0, 6.0


def headline(result: Result[Any]) -> str:
    """The answer in one sentence."""
    if result.failure is None:
        return f"safe: no order of the steps fails ({result.states} states)"
    length = "a shortest trace" if result.shortest else "a trace"
    steps = f"{len(result.trace)} step{'s' * (len(result.trace) != 1)}"
    return f"{result.failure.replace('_', ' ')}: {length} has {steps} ({result.states} states)"


def before(result: Result[Any]) -> str:
    """What happened before the trace begins."""
    if not result.skipped:
        return ""
    return f"every rank has made {result.skipped} call{'s' * (result.skipped != 1)} without trouble; from there:"


def text(result: Result[Any], width: int = 80) -> str:
    """The timeline: a row for each step, in the column of the rank that makes it; of many ranks, with its number."""
    ranks = _ranks(result)
    if len(ranks) <= 2:
        headers = ["step", *[f"rank {rank}" for rank in ranks]]
        rows = [
            [step, *[_sentence(event) if event.rank == rank else "" for rank in ranks]]
            for step, event in enumerate(result.trace, start=1)
        ]
        widths = [None, *[(width - 4) // max(len(ranks), 1) - 4] * len(ranks)]
    else:
        headers = ["step", "rank", "does"]
        rows = [[step, event.rank, _sentence(event)] for step, event in enumerate(result.trace, start=1)]
        widths = [None, None, width - 18]
    table = tabulate(rows, headers, tablefmt="simple", maxcolwidths=widths) if rows else ""
    waiting = (wrapped(sentence, width) for sentence in result.waiting)
    return "\n".join(filter(None, [headline(result), before(result), table, *waiting]))


def svg(result: Result[Any], notes: Sequence[str] = ()) -> str:
    """The timeline as a picture: time runs down, the step that fails and the ranks that wait are red.

    notes: what stands below: why, and what to do about it.
    """
    ranks = _ranks(result)
    column = min(max(_WIDTH / max(len(ranks), 1), _NARROWEST), _WIDEST)
    drawing = Drawing(max(column * len(ranks), _WIDTH) + _LEFT + 12)
    y = drawing.paragraph(16, 12, drawing.width - 32, headline(result), size=15, bold=True)
    y = drawing.paragraph(16, y, drawing.width - 32, before(result), size=13) + (30 if ranks else 6)
    columns = {rank: _LEFT + column * place for place, rank in enumerate(ranks)}
    steps = [lines_of(_sentence(event), column - 22) for event in result.trace]
    bottom = y + sum(_box_height(lines) + _BETWEEN for lines in steps)
    for rank, x in columns.items():
        drawing.words(x + 8, y - 10, f"rank {rank}", size=13, bold=True)
        drawing.line((x, y - 8), (x, bottom), colour=HAIR)
    for step, (event, lines) in enumerate(zip(result.trace, steps, strict=True), start=1):
        fill, stroke = (ALARM_FILL, ALARM) if event.failure is not None else (STEP, STEP_FRAME)
        x, height = columns[event.rank], _box_height(lines)
        drawing.words(16, y + 18, str(step), size=11, fill=FAINT)
        drawing.box(x, y, column - 12, height, fill, stroke=stroke, round_=4, about=_sentence(event))
        drawing.paragraph(x + 6, y + 5, column - 22, _sentence(event))
        y += height + _BETWEEN
    for sentence in result.waiting:
        y = drawing.paragraph(16, y + 4, drawing.width - 32, sentence, fill=ALARM)
    for note in notes:
        y = drawing.paragraph(16, y + 4, drawing.width - 32, note)
    if ranks:
        failing = [(ALARM_FILL, ALARM, "the step that fails")] if any(e.failure for e in result.trace) else []
        y = drawing.legend(16, y, [(STEP, STEP_FRAME, "a step of a rank; time runs down"), *failing])
    return drawing.svg(y + 12)


def _box_height(lines: Sequence[str]) -> float:
    return 12 + 16.8 * len(lines)


def dump(result: Result[Any]) -> str:
    """The result as JSON, for :func:`load`. The state in which the search ended is left out."""
    value = {
        "format": _FORMAT,
        "failure": result.failure,
        "states": result.states,
        "skipped": result.skipped,
        "shortest": result.shortest,
        "trace": [
            {"rank": e.rank, "call": e.call, "action": e.action, "detail": e.detail, "failure": e.failure}
            for e in result.trace
        ],
        "waiting": list(result.waiting),
    }
    return json.dumps(value, indent=1)


def load(saved: str | bytes) -> Result[Any]:
    """Read what :func:`dump` wrote. Raises :class:`TraceError`."""
    try:
        value = json.loads(saved)
        if not isinstance(value, Mapping) or value.get("format") != _FORMAT:
            raise TraceError(f"not a trace of format {_FORMAT}; write it again with this version of ringfence")
        return Result(
            _failure(value["failure"]),
            _typed(value["states"], int),
            tuple(_event(e) for e in _typed(value["trace"], list)),
            tuple(_typed(sentence, str) for sentence in _typed(value["waiting"], list)),
            skipped=_typed(value["skipped"], int),
            shortest=_typed(value["shortest"], bool),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(
            f"the trace cannot be read ({error}); write it again with this version of ringfence"
        ) from error


def _event(value: Mapping[str, Any]) -> Event:
    call = value["call"]
    return Event(
        _typed(value["rank"], int),
        None if call is None else _typed(call, int),
        _typed(value["action"], str),
        _typed(value["detail"], str),
        _failure(value["failure"]),
    )


def _failure(value: str | None) -> ModelFailure | None:
    return None if value is None else ModelFailure(value)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _ranks(result: Result[Any]) -> list[int]:
    """Those that make a step, or wait in the end."""
    waiting = (re.match(r"rank (\d+)\b", sentence) for sentence in result.waiting)
    return sorted({event.rank for event in result.trace} | {int(found[1]) for found in waiting if found})


def _sentence(event: Event) -> str:
    call = "" if event.call is None else f"call {event.call}: "
    failed = f" -- {event.failure.replace('_', ' ').upper()}" if event.failure is not None else ""
    return f"{call}{event.action} {event.detail}{failed}"
