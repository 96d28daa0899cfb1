"""What every command says and returns: exit codes, lines on standard error, files."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..runtime.errors import OptionsError

#: Exit codes: what was asked for was done; the target cannot be loaded or compiled; wrong usage (argparse's own).
OK, FAILED, USAGE = 0, 1, 2

_QUIET_SECONDS = 2.0


def say(text: str) -> None:
    print(f"ringfence: {text}", file=sys.stderr, flush=True)


def say_if_unread(flashinfer: str) -> None:
    """An answer about a release that nobody has read is one about the newest that was."""
    from ..runtime.protocol.rules import NEWEST_READ
    from ..runtime.versions import parse_version

    if parse_version(flashinfer) > parse_version(NEWEST_READ):
        say(f"protocols and hazards were read up to FlashInfer {NEWEST_READ}; {flashinfer} may differ")


def first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OptionsError(f"'{path}' cannot be written: {error}") from error


@contextlib.contextmanager
def stage(label: str) -> Iterator[None]:
    """One line on standard error for a stage that takes more than two seconds."""
    timer = threading.Timer(_QUIET_SECONDS, say, [f"{label} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
