"""``ringfence journal``: which rank stopped first, from the files that all ranks wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .arguments import Commands, output
from .terminal import OK, write


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "journal",
        help="say which rank stopped first, and which ranks wait for it",
        description="Merge the journals that the ranks of a job wrote into one folder (option journal_dir).",
    )
    parser.add_argument("folder", type=Path, help="the folder with journal-rank0.json, journal-rank1.json, ...")
    parser.add_argument("--json", action="store_true", help="print JSON (described by: ringfence docs report)")
    parser.add_argument("--svg", type=output, metavar="FILE", help="draw the last steps of the ranks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    from ..runtime.watch import journals, picture, summary

    merged = journals.merge(journals.read_folder(arguments.folder))
    if arguments.svg is not None:
        write(arguments.svg, picture.svg(merged))
    return json.dumps(merged.to_dict(), indent=2) if arguments.json else summary.text(merged), OK
