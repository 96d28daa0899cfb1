"""``ringfence hazards``: the hazard table, or one row of it in full."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from .arguments import Commands
from .terminal import FAILED, OK, say

if TYPE_CHECKING:
    from ..runtime.hazards.hazard import Hazard


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "hazards",
        help="list the known ways in which a fused collective hangs or corrupts",
        description="Print the hazard table, one row of it in full, or the rows that say what you see.",
    )
    parser.add_argument("id", nargs="?", help="an id, such as M1")
    parser.add_argument(
        "--symptom",
        metavar="WORDS",
        help="the rows that fit what you see best, or that name a thread: --symptom 'two nodes, replays hang at "
        "100 %%, no error', --symptom nccl#2389",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (described by: ringfence docs report)")
    form.add_argument(
        "--markdown", action="store_true", help="print the whole table in Markdown, as `ringfence docs hazards` has it"
    )
    parser.set_defaults(run=run, wrong_usage=parser.error)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    from ..runtime.hazards.catalogue import HAZARDS, as_dict, as_markdown, as_text, find_hazard, summary_table
    from ..runtime.hazards.search import count_fitting, search

    if arguments.id is not None and arguments.markdown:
        arguments.wrong_usage("--markdown prints the whole table; leave the id out")
    if arguments.symptom is not None and (arguments.id is not None or arguments.markdown):
        arguments.wrong_usage("--symptom looks for rows; leave the id and --markdown out")
    rows = (find_hazard(arguments.id),) if arguments.id is not None else HAZARDS
    if arguments.symptom is not None:
        if not any(map(str.isalnum, arguments.symptom)):
            arguments.wrong_usage(
                f"--symptom '{arguments.symptom}' has no word; say what you see: --symptom 'replays hang, no error'"
            )
        found, fitting = search(arguments.symptom), count_fitting(arguments.symptom)
        rows = tuple(match.hazard for match in found)
        if 0 < len(rows) < fitting:
            say(
                f"these are the {len(rows)} of {fitting} rows with a word of '{arguments.symptom}' that fit best; "
                "`ringfence hazards` lists all"
            )
        if not rows:
            say(
                f"no row says '{arguments.symptom}'; `ringfence hazards` lists them all, and `ringfence docs hangs` "
                "goes by questions"
            )
            return ("[]" if arguments.json else ""), FAILED
    if arguments.json:
        return json.dumps(as_dict(rows), indent=2), OK
    if arguments.markdown:
        return as_markdown().rstrip("\n"), OK
    if arguments.symptom is not None:
        return "\n\n".join(_answer(row) for row in rows), OK
    return as_text(rows[0]) if arguments.id else summary_table(rows), OK


def _answer(row: Hazard) -> str:
    """A row as an answer to a symptom: what it is, and what to do."""
    lines = [f"{row.id}  {row.title}"]
    for label, text in (("symptom", row.symptom), ("remedy", row.remedy), ("source", row.source)):
        lines += textwrap.wrap(text, 78, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11)
    return "\n".join(lines)
