"""Folder: which files the ranks of one start of a job have in the folder of their journals, and which are older.

``journal-rank0.json`` is the last start's. What an earlier one left is put away as ``journal-rank0.1.json``, and that
as ``journal-rank0.2.json``: some of them, and not more than some megabytes.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import JournalError, OptionsError

#: Why a file is written before anything has happened: what another start has left must not be taken for this one's.
BEGUN = "begun"

_OLDER_FILES, _OLDER_BYTES = 4, 64 << 20


@dataclass(frozen=True)
class Origin:
    """Which process wrote a file. token: nobody else's. met: by rank, the tokens of those that it met.

    run, attempt: what a launcher calls the start, if one does. before: tokens of the start whose file was put away.
    """

    token: str = ""
    met: Mapping[int, str] = field(default_factory=dict)
    run: str = ""
    attempt: int | None = None
    before: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        met, before = {str(r): t for r, t in self.met.items()}, sorted(self.before)
        return {"token": self.token, "met": met, "run": self.run, "attempt": self.attempt, "before": before}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Origin:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_dict` did not write; a file may have none."""
        if not value:
            return cls()
        met = {int(rank): str(token) for rank, token in value["met"].items()}
        attempt = int(value["attempt"]) if value["attempt"] is not None else None
        return cls(str(value["token"]), met, str(value["run"]), attempt, frozenset(map(str, value["before"])))

    def denies(self, other: Origin, rank: int) -> bool:
        """Whether this process met another one as that rank."""
        return self.met.get(rank, other.token) != other.token

    def follows(self, other: Origin) -> bool:
        """Whether this process is known to be of a later start, without asking the clocks of two hosts."""
        counted = self.run == other.run and self.attempt is not None and other.attempt is not None
        return other.token in self.before or (counted and self.attempt > other.attempt)  # type: ignore[operator]


def file_of(folder: Path, rank: int, older: int = 0) -> Path:
    """older: 0 for this start's, 1 for the one before."""
    return folder / f"journal-rank{rank}{f'.{older}' * bool(older)}.json"


def check_can_be_written(folder: Path) -> None:
    """A folder that exists, or whose last level can be made, and takes files: a hang is too late to find out.

    Raises :class:`OptionsError`.
    """
    there = folder
    try:
        if (mistyped := _mistyped(folder)) is not None:
            raise OptionsError(f"journal_dir='{folder}': {mistyped}")
        there = folder if folder.exists() else folder.parent
        with tempfile.TemporaryFile(dir=there):  # permissions say nothing to root, nor of file systems such as /proc
            pass
    except OSError as error:
        raise OptionsError(
            f"journal_dir='{folder}' cannot be written: '{there}' takes no files ({error.strerror}); name another one"
        ) from error


def make_last_level(folder: Path) -> bool:
    """Whether the folder was made. Raises :class:`JournalError` where its parent is missing, and OSError."""
    if folder.exists():
        return False
    if (mistyped := _mistyped(folder.absolute())) is not None:
        raise JournalError(f"no journal is written into '{folder.absolute()}': {mistyped}")
    folder.mkdir(exist_ok=True)
    return True


def _mistyped(folder: Path) -> str | None:
    """What of a path is not there, where that is more than its last level."""
    missing = next((level for level in reversed(folder.parents) if not level.exists()), None)
    if missing is None:
        return None
    return f"'{missing}' does not exist, and only the last level of a path is made; make it, or mend the path"


def is_put_away(path: Path) -> bool:
    return re.fullmatch(r"journal-rank\d+\.\d+\.json", path.name) is not None


def rank_that_wrote(path: Path) -> int | None:
    """Whose file it is, if more is in it than that it has begun; found out without reading all of it."""
    found = re.fullmatch(r"journal-rank(\d+)\.json", path.name)
    if found is None or not path.is_file():
        return None
    with contextlib.suppress(OSError), path.open("rb") as file:
        return None if f'"reason": "{BEGUN}"'.encode() in file.read(200) else int(found[1])
    return None


def put_away(folder: Path, rank: int) -> frozenset[str]:
    """Make way for this start's file; the tokens of the start that left the one before. Raises OSError."""
    last = file_of(folder, rank)
    if not last.exists():
        return frozenset()
    before: set[str] = set()
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # whatever lay there
        origin = Origin.from_dict(json.loads(last.read_text())["origin"])
        before = {origin.token, *origin.met.values()}
    for older in range(_OLDER_FILES, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            file_of(folder, rank, older - 1).replace(file_of(folder, rank, older))
    held = 0
    for older in range(1, _OLDER_FILES + 1):
        path = file_of(folder, rank, older)
        held += path.stat().st_size if path.exists() else 0
        if held > _OLDER_BYTES:
            path.unlink(missing_ok=True)
    return frozenset(before - {""})


def older_ranks(origins: Mapping[int, Origin], written: Mapping[int, float]) -> Sequence[int]:
    """The ranks whose file an earlier start has left, because that rank has not come so far in the last one."""
    older = []
    for rank, origin in origins.items():
        others = [r for r in origins if r != rank]
        apart = [r for r in others if origins[r].denies(origin, rank) or origin.denies(origins[r], r)]
        follows = any(origins[r].follows(origin) for r in others)
        precedes = any(origin.follows(origins[r]) for r in others)
        if follows or (not precedes and apart and all(written[r] > written[rank] for r in apart)):
            older.append(rank)
    return older
