"""Processes of this host, as the system tells of them: whether a rank that is silent has ended, or is stopped."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: What is said of a silent rank of which no more is known.
UNKNOWN = "its process ended, is stopped, or holds Python's lock"

ENDED = "its process ended"

_SAID = {
    "T": "its process is stopped, as by SIGSTOP",
    "t": "its process is stopped by a debugger",
    "Z": ENDED,
    "X": ENDED,
    "D": "its process waits for a device or a disk",
}


def this_process() -> tuple[str, int]:
    """Where this process is known by its number, and that number. The place is empty where the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid()
    return "", os.getpid()


def why_silent(place: str, pid: int) -> str:
    """What is known of a process that says nothing any more; what cannot be seen from here may be anything."""
    if not place or place != this_process()[0]:
        return UNKNOWN
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ENDED
    except OSError:
        return UNKNOWN
    state = stat.rpartition(")")[2].split()[0]  # a name may hold anything, a bracket too
    return _SAID.get(state, "its process lives, and holds Python's lock")
