"""The console script. A command is imported within reach of Ctrl-C: that takes longer than most of them run."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code (:mod:`.commands.terminal`)."""
    try:
        from .commands.line import run

        return run(argv)
    except KeyboardInterrupt:
        print("ringfence: interrupted", file=sys.stderr, flush=True)
        return 130  # as shells have it
