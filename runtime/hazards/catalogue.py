"""The hazard table, and what it says about a situation.

applicable(Situation(Collective.MNNVL, "0.6.10", capture=True))  # M1, M2, M3
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from ..errors import UnknownHazardError
from .reached import REACHED
from .situation import Collective, Fact, Payload, Situation, Strategy, When
from .table import HAZARDS, REPOSITORIES, Action, Certainty, Hazard, Invariant

__all__ = [
    "HAZARDS",
    "SCHEMA",
    "Action",
    "Certainty",
    "Collective",
    "Fact",
    "Hazard",
    "Invariant",
    "Payload",
    "Situation",
    "Strategy",
    "When",
    "applicable",
    "as_dict",
    "as_markdown",
    "as_text",
    "find_hazard",
    "summary_table",
]

#: Version of the JSON that ``ringfence hazards --json`` prints; docs/report.md describes it.
SCHEMA = 1


def applicable(situation: Situation) -> tuple[Hazard, ...]:
    """The rows that apply, in the order of the table."""
    return tuple(hazard for hazard in HAZARDS if any(when.holds(situation) for when in hazard.when))


def find_hazard(id: str) -> Hazard:
    """The row with this id, in either case. Raises :class:`UnknownHazardError`."""
    for hazard in HAZARDS:
        if hazard.id == id.upper():
            return hazard
    raise UnknownHazardError(f"there is no hazard '{id}'; the ids are {HAZARDS[0].id} to {HAZARDS[-1].id}")


def as_dict(hazards: tuple[Hazard, ...] = HAZARDS) -> dict[str, Any]:
    """JSON-ready: the rows, and the meaning of every code in them."""
    return {
        "schema": SCHEMA,
        "hazards": [
            dataclasses.asdict(hazard)
            | {"when": [when.to_dict() for when in hazard.when], "reached": REACHED.get(hazard.id, {})}
            for hazard in hazards
        ],
        "meanings": {
            kind.__name__.lower(): {code: code.meaning for code in kind}
            for kind in (Action, Certainty, Collective, Fact, Invariant, Payload)
        },
    }


def summary_table(hazards: tuple[Hazard, ...] = HAZARDS) -> str:
    """One short line per row, for a terminal."""
    from tabulate import tabulate

    rows = [(h.id, h.title, _applies(h), h.decides, _in_a_run(h), h.source) for h in hazards]
    widths = [None, 36, 44, None, None, 30]
    headers = ("id", "title", "applies", "decides", "in a run", "source")
    return tabulate(rows, headers, maxcolwidths=widths, disable_numparse=True)


def as_text(hazard: Hazard) -> str:
    """One row in full, for a terminal."""
    lines = [f"{hazard.id}  {hazard.title}", ""]
    for label, text in _details(hazard):
        lines += textwrap.wrap(text, 110, initial_indent=f"{label:<11}", subsequent_indent=" " * 11)
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/hazards.md."""
    lines = [
        "# Hazards",
        "",
        "Generated from `runtime/hazards/rows/`: `ringfence hazards --markdown > docs/hazards.md`.",
        "For a job that is frozen right now: [hangs.md](hangs.md).",
        "",
        "A row applies where any of its conditions holds in full. What is not known of the plan (FlashInfer's version,",
        "strategy, dtype, payload) may be the worst; what is not known of the machine is taken to be nothing special.",
        "",
        *_markdown_table(
            ("id", "title", "applies", "decides", "in a run"),
            [(_link(h.id), h.title, _applies(h), h.decides, _in_a_run(h)) for h in HAZARDS],
        ),
        "",
        *_what_a_run_reaches(),
        "## Rows",
    ]
    for hazard in HAZARDS:
        lines += ["", f"### {hazard.id}", "", f"**{hazard.title}**", ""]
        lines += [f"- *{label}*: {_linked(text)}" for label, text in _details(hazard)]
    for title, kind in (("Invariants", Invariant), ("Facts", Fact), ("Decisions", Action), ("Certainty", Certainty)):
        lines += ["", f"## {title}", "", *_markdown_table(("code", "meaning"), [(c, c.meaning) for c in kind])]
    links = [(short, f"[{name}](https://github.com/{name})") for short, name in REPOSITORIES.items()]
    lines += ["", "## Sources", "", *_markdown_table(("abbreviation", "repository"), links), ""]
    return "\n".join(lines)


def _what_a_run_reaches() -> list[str]:
    """Computed from the product's code by tests/hangs/reach.py, but for the reasons."""
    options = ("choice", "split", "refuse", "raise", "clean")
    outcomes = [
        (_link(id), collective, *(what.get(option, "") for option in options))
        for id, by in REACHED.items()
        for collective, what in by.items()
    ]
    prevented: dict[str, list[str]] = {}
    for hazard in HAZARDS:
        if hazard.prevented_by is not None:
            prevented.setdefault(str(hazard.prevented_by), []).append(_link(hazard.id))
    return [
        "## What a run can reach",
        "",
        "Computed from the code: every situation that the choice of a collective and the compile passes can build,",
        "and what the judge makes of it under each value of the option `on_hazard`. *choice*: the collective is passed",
        "over, before anything is made.",
        "",
        *_markdown_table(("row", "collective", *options), outcomes),
        "",
        "The other rows decide nothing in a run. They are for jobs that hang ([hangs.md](hangs.md)), for `check`,",
        "`explain --collective` and `doctor`, and for other code that runs these collectives. Prevented:",
        "",
        *_markdown_table(("by", "rows"), [(check, ", ".join(ids)) for check, ids in prevented.items()]),
        "",
        "Not to be seen in a plan, so nothing is decided:",
        "",
        *_markdown_table(("row", "why"), [(_link(h.id), h.not_seen) for h in HAZARDS if h.not_seen]),
        "",
    ]


def _link(id: str) -> str:
    return f"[{id}](#{id.lower()})"


def _in_a_run(hazard: Hazard) -> str:
    if hazard.id in REACHED:
        return "reached"
    return "prevented" if hazard.prevented_by is not None else "not seen"


def _outcomes(hazard: Hazard) -> str:
    """What comes of the row in a run, by collective, or why nothing does."""
    if hazard.id not in REACHED:
        return (
            f"prevented: {hazard.prevented_by}" if hazard.prevented_by is not None else f"not seen: {hazard.not_seen}"
        )
    texts = []
    for collective, outcomes in REACHED[hazard.id].items():
        options: dict[str, list[str]] = {}
        for option, what in outcomes.items():
            options.setdefault(what, []).append(option)
        parts = [what if len(options) == 1 else f"{what} ({', '.join(names)})" for what, names in options.items()]
        texts.append(f"{collective}: {', '.join(parts)}")
    return "reached: " + "; ".join(texts)


def _applies(hazard: Hazard) -> str:
    return ", or ".join(map(str, hazard.when))


def _details(hazard: Hazard) -> list[tuple[str, str]]:
    instead = f"; {' or '.join(hazard.instead)} avoids it too" if hazard.instead else ""
    return [
        ("symptom", hazard.symptom),
        ("mechanism", hazard.mechanism),
        ("applies", _applies(hazard)),
        ("decides", f"{hazard.decides}: {hazard.decides.meaning}{instead}"),
        ("in a run", _outcomes(hazard)),
        *((("guard", str(hazard.guard)),) if hazard.guard is not None else ()),
        *(("invariant", f"{invariant}: {invariant.meaning}") for invariant in hazard.invariants),
        ("remedy", hazard.remedy),
        ("certainty", f"{hazard.certainty}: {hazard.certainty.meaning}"),
        ("source", hazard.source),
        ("shown by", hazard.shown_by) if hazard.shown_by else ("not shown", str(hazard.not_shown)),
    ]


def _linked(text: str) -> str:
    """With a link for each thread; GitHub redirects from issues to pull requests."""

    def link(match: re.Match[str]) -> str:
        repository = REPOSITORIES.get(match["where"], match["where"])
        return f"[{match[0]}](https://github.com/{repository}/issues/{match['number']})"

    names = "|".join(REPOSITORIES)
    return re.sub(rf"\b(?P<where>[\w.-]+/[\w.-]+|{names})#(?P<number>\d+)", link, text)


def _markdown_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headers, ("---",) * len(headers), *rows)]
