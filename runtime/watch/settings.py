"""Settings: the options that are the process's and not one graph's, and what of them the ranks must have alike.

error     on_hang, step_seconds, warm_up_seconds: a rank that watches alone hears nothing of the others, and takes them
          for dead; with other deadlines, ranks come to other verdicts of one wait
warning   agree_seconds: the shortest counts. journal_dir on some ranks only: the files of the others are missing, and
          whoever reads the rest takes those ranks for dead
legal     journal_dir: hosts mount differently. kernel_wait_seconds: each rank's kernels give up by themselves, and
          tell. on_report
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..channel import Channel
from ..spelling import by_value
from .deadlines import Deadlines

log = logging.getLogger(__name__)

#: The options that are the process's, not one graph's.
OF_PROCESS = ("on_hang", "step_seconds", "warm_up_seconds", "journal_dir")


def deadlines_of(settings: Mapping[str, Any]) -> Deadlines:
    default = Deadlines()
    return Deadlines(settings.get("step_seconds", default.steady), settings.get("warm_up_seconds", default.warm_up))


def differs_here(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """What a backend asks of the process that another one has otherwise."""
    for name, value in asked.items():
        if name in settings and settings[name] != value:
            return (
                f"{name}={value!r}, and another backend of this process has {name}={settings[name]!r}; journal and "
                f"watchdog are the process's, so give both the same, leave {name} out in one of them, or close() "
                "the other backend first"
            )
    return None


def alike(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What must be the same on all ranks, as parts of a digest."""
    deadlines = deadlines_of(settings)
    return (
        ("on_hang", str(settings.get("on_hang"))),
        ("step_seconds", f"{deadlines.steady:g}"),
        ("warm_up_seconds", f"{deadlines.warm_up:g}"),
    )


@dataclass(frozen=True)
class Own:
    """What a rank tells the others of its own, and they are told of where it differs. journals: it writes some."""

    agree_seconds: float
    journals: bool


def tell_differences(owns: Sequence[Own], channel: Channel, told: set[str]) -> None:
    """One rank of the channel logs how they differ, once. told: what was said before; it is added to."""
    for differs in differences(owns, channel.ranks):
        if differs not in told and channel.rank == 0:
            log.warning("ringfence: %s", differs)
        told.add(differs)


def tell_unwatched(folder: str, rank: int, told: set[str]) -> None:
    """One rank logs, once, that nobody watches though somebody wants journals. told: as above."""
    says = (
        f"journal_dir={folder!r} is given and on_hang is not: a rank writes its journal where a call of the model "
        "fails on it, and none where the ranks hang, because nobody watches; give on_hang on all ranks"
    )
    if says not in told and rank == 0:
        log.warning("ringfence: %s", says)
    told.add(says)


def differences(owns: Sequence[Own], ranks: Sequence[int]) -> Iterator[str]:
    """ranks: what each is called."""
    if len({own.agree_seconds for own in owns}) > 1:
        said = by_value([f"{own.agree_seconds:g}" for own in owns], ranks)
        yield f"agree_seconds differs ({said}): where ranks wait for each other, the shortest counts"
    if len({own.journals for own in owns}) > 1:
        said = by_value(["given" if own.journals else "None" for own in owns], ranks)
        yield (
            f"journal_dir differs ({said}): a rank without one leaves no file, and `ringfence journal` takes it for "
            "dead; give one on all ranks (it may be another path on each host)"
        )
