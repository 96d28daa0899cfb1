"""What every command says and returns: exit codes, lines on standard error, files."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from ..runtime.errors import OptionsError

#: Exit codes: what was asked for was done; the target cannot be loaded or compiled; wrong usage (argparse's own); not
#: decided in the time given. Broken off from the keyboard is 130 (:mod:`ringfence.cli`).
OK, FAILED, USAGE, UNDECIDED = 0, 1, 2, 3

_QUIET_SECONDS = 2.0

#: How long the other end of a FIFO may take to open it.
_FIFO_SECONDS = 2.0


def say(text: str) -> None:
    """A line on standard error. Who does not read it misses it; nothing fails for that."""
    with contextlib.suppress(OSError):
        _print(f"ringfence: {text}", sys.stderr)


def answer(text: str) -> bool:
    """What a command found out, on standard output. False where it cannot be written, which is said then."""
    try:
        _print(text, sys.stdout)
    except BrokenPipeError:  # the reader has enough, as in `ringfence hazards | head`
        _give_up(sys.stdout)
    except OSError as error:
        _give_up(sys.stdout)
        say(f"the answer cannot be written: {error}")
        return False
    return True


def _print(text: str, stream: TextIO | None) -> None:
    """Characters that the stream's encoding lacks are escaped. None is a stream that was closed before we began."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def _give_up(stream: TextIO) -> None:
    """Otherwise what is still in the buffer is an error once more when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_if_unread(flashinfer: str) -> None:
    """An answer about a release that nobody has read is one about the newest that was."""
    from ..runtime.protocol.rules import NEWEST_READ
    from ..runtime.versions import parse_version

    if parse_version(flashinfer) > parse_version(NEWEST_READ):
        say(f"protocols and hazards were read up to FlashInfer {NEWEST_READ}; {flashinfer} may differ")


def write(path: Path, text: str) -> None:
    """In UTF-8. Raises :class:`OptionsError`, also for a FIFO that nobody reads."""
    try:
        with _fifo_that_is_read(path) if _is_fifo(path) else path.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        raise OptionsError(f"'{path}' cannot be written: {error}") from error


def why_not_written(path: Path) -> str | None:
    """What can be known before; nothing is made. A FIFO may be read later."""
    if path.is_dir():
        return "it is a folder"
    there = path
    try:
        path.stat()
    except FileNotFoundError:
        there = path.parent
        if not there.is_dir():
            return f"there is no folder '{there}'"
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        return str(error)
    return None if os.access(there, os.W_OK) else f"'{there}' takes none"


def read(path: Path) -> bytes:
    """Raises OSError, also for a FIFO into which nobody writes, and ValueError for what is no path."""
    return _read_fifo(path) if _is_fifo(path) else path.read_bytes()


def _is_fifo(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISFIFO(path.stat().st_mode)
    return False


def _fifo_that_is_read(path: Path) -> BinaryIO:
    """Opened as a file is, it would wait for a reader for ever."""
    until = time.monotonic() + _FIFO_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            _still(until)
        else:
            os.set_blocking(descriptor, True)
            return open(descriptor, "wb")


def _read_fifo(path: Path) -> bytes:
    """The same of a writer. One that is there may take its time."""
    until = time.monotonic() + _FIFO_SECONDS
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        while (first := file.read(1)) == b"":  # None where somebody has it open and has not written yet
            _still(until)
        os.set_blocking(file.fileno(), True)
        return (first or b"") + file.readall()


def _still(until: float) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"it is a FIFO, and for {_FIFO_SECONDS:g} s nobody came to its other end")
    time.sleep(0.02)


@contextlib.contextmanager
def stage(label: str) -> Iterator[None]:
    """One line on standard error for a stage that takes more than two seconds."""
    timer = threading.Timer(_QUIET_SECONDS, say, [f"{label} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int], None]]:
    """As :func:`stage`; on a terminal the line counts the states that are told to what this yields."""
    if not sys.stderr.isatty():
        with stage(label):
            yield lambda states: None
        return
    began = last = time.monotonic()

    def told(states: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _QUIET_SECONDS / 4 and now - began > _QUIET_SECONDS:
            last = now
            with contextlib.suppress(OSError):
                sys.stderr.write(f"\rringfence: {label}: {states} states, {now - began:.0f} s")
                sys.stderr.flush()

    try:
        yield told
    finally:
        if last != began:
            with contextlib.suppress(OSError):
                sys.stderr.write("\n")
