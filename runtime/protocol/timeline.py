"""Timeline: a trace as people read it, with a column per rank, as text or as SVG, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from tabulate import tabulate

from ..errors import TraceError
from .explore import Event, ModelFailure, Result

_FORMAT = 1


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


def text(result: Result[Any], width: int = 32) -> str:
    """The timeline: one row per step, in the column of the rank that makes it."""
    ranks = _ranks(result)
    rows = [
        [step, *[_sentence(event) if event.rank == rank else "" for rank in ranks]]
        for step, event in enumerate(result.trace, start=1)
    ]
    headers = ["step", *[f"rank {rank}" for rank in ranks]]
    table = tabulate(rows, headers, tablefmt="simple", maxcolwidths=[None, *[width] * len(ranks)]) if rows else ""
    return "\n".join(filter(None, [headline(result), before(result), table, *result.waiting]))


def svg(result: Result[Any], column: int = 300, row: int = 34) -> str:
    """The timeline as a picture: time runs down, the step that fails and the ranks that wait are red."""
    ranks = _ranks(result)
    top = 80
    height = top + row * len(result.trace) + 22 * len(result.waiting) + 24
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {max(column * len(ranks), 700) + 20} {height}",
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="white")
    _write(root, 10, 20, headline(result), weight="bold")
    _write(root, 10, 38, before(result))
    for place, rank in enumerate(ranks):
        x = 10 + column * place
        _write(root, x + 8, top - 14, f"rank {rank}", weight="bold")
        end = str(top + row * len(result.trace))
        ElementTree.SubElement(root, "line", x1=str(x), x2=str(x), y1=str(top - 8), y2=end, stroke="#bbb")
    for step, event in enumerate(result.trace):
        _box(root, 10 + column * ranks.index(event.rank), top + row * step, column - 10, row - 6, event)
    for i, sentence in enumerate(result.waiting):
        _write(root, 10, top + row * len(result.trace) + 22 * (i + 1), sentence, fill="#b00020")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


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
    return sorted({event.rank for event in result.trace})


def _sentence(event: Event) -> str:
    call = "" if event.call is None else f"call {event.call}: "
    failed = f" -- {event.failure.replace('_', ' ').upper()}" if event.failure is not None else ""
    return f"{call}{event.action} {event.detail}{failed}"


def _box(root: ElementTree.Element, x: int, y: int, width: int, height: int, event: Event) -> None:
    fill = "#ffd9de" if event.failure is not None else "#eef3fb"
    ElementTree.SubElement(
        root, "rect", x=str(x), y=str(y), width=str(width), height=str(height), rx="4", fill=fill, stroke="#8aa"
    )
    sentence = _sentence(event)
    shown = sentence if len(sentence) <= width // 6 else sentence[: width // 6 - 1] + "…"
    text = _write(root, x + 8, y + height // 2 + 4, shown)
    ElementTree.SubElement(text, "title").text = sentence


def _write(root: ElementTree.Element, x: int, y: int, words: str, fill: str = "#222", weight: str = "normal") -> Any:
    text = ElementTree.SubElement(root, "text", {"x": str(x), "y": str(y), "fill": fill, "font-weight": weight})
    text.text = words
    return text
