"""``ringfence hazards``: the hazard table, or one row of it in full."""

from __future__ import annotations

import argparse
import json

from .arguments import Commands
from .terminal import OK


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "hazards",
        help="list the known ways in which a fused collective hangs or corrupts",
        description="Print the hazard table, or one row of it in full.",
    )
    parser.add_argument("id", nargs="?", help="an id, such as M1")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    form.add_argument("--markdown", action="store_true", help="print docs/hazards.md")
    parser.set_defaults(run=run, wrong_usage=parser.error)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    from ..runtime.hazards.catalogue import HAZARDS, as_dict, as_markdown, as_text, find_hazard, summary_table

    if arguments.id and arguments.markdown:
        arguments.wrong_usage("--markdown prints the whole table; leave the id out")
    rows = (find_hazard(arguments.id),) if arguments.id else HAZARDS
    if arguments.json:
        return json.dumps(as_dict(rows), indent=2), OK
    if arguments.markdown:
        return as_markdown().rstrip("\n"), OK
    return as_text(rows[0]) if arguments.id else summary_table(rows), OK
