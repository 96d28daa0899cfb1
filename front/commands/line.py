"""The command line: ``ringfence explain``, ``check``, ``hazards``, ``journal``, ``doctor``, ``bench`` and ``docs``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

from ..runtime.errors import (
    GroupError,
    InputError,
    JournalError,
    OptionsError,
    PlanError,
    RingfenceError,
    SizeTableError,
    TargetError,
    TraceError,
    UnknownHazardError,
    VersionError,
)
from . import bench, check, docs, doctor, explain, hazards, journal
from .arguments import Parser
from .terminal import FAILED, USAGE, answer, say

#: None of these imports torch when it is imported: usage, --help and what needs no torch answer at once.
COMMANDS = (explain, check, hazards, journal, doctor, bench, docs)

_BAD_USAGE = (
    OptionsError,
    UnknownHazardError,
    VersionError,
    PlanError,
    TraceError,
    JournalError,
    TargetError,
    InputError,
    GroupError,
    SizeTableError,
)


def run(argv: Sequence[str] | None) -> int:
    """Run a command. Returns the exit code (:mod:`.terminal`)."""
    parser = Parser(prog="ringfence", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ringfence {importlib.metadata.version('ringfence')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices.get(arguments.command, parser).refuse(unknown)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    command_of: Callable[[argparse.Namespace], tuple[str, int]] = arguments.run
    try:
        text, code = command_of(arguments)
    except RingfenceError as error:
        if _first_of_the_ranks():
            say(str(error))
        return USAGE if isinstance(error, _BAD_USAGE) else FAILED
    written = answer(text) if text else True  # of the ranks of a bench, one has something to say
    return code if written else FAILED


def _first_of_the_ranks() -> bool:
    """Whether no other rank of a torchrun job has failed before this one. The first speaks for all.

    It need not be rank 0: torchrun ends the others as soon as one has ended, perhaps before they could speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
        return int(store.add(f"ringfence/failed/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # better twice than never
        return True
