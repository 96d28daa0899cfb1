"""Rows by the words of a symptom: which of the table's rows say what somebody sees.

Plain word counts: a word that few rows have tells more than one that many have, and one in a title or symptom more
than one in a mechanism. It needs no torch and answers at once.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .hazard import REPOSITORIES, Hazard
from .table import HAZARDS

#: What a word counts for where it stands.
_WEIGHTS = {"title": 3.0, "symptom": 3.0, "mechanism": 1.0, "remedy": 1.0}
#: A row that says less than this share of what the best one says is not among the answers.
_SHARE = 0.5
_MOST = 5

_COMMON = frozenset(
    re.findall(
        r"\w+",
        """
        a after all also an and any are as at be been before but by can do does for from had has have he i if in into
        is it its more my no not of on one only or our rank ranks same say she so some still than that the their them
        then there these they this to two until up was we were what when where which while who will with without you
        """,
    )
)
#: Words of the field that mean the same here.
_ALIKE = {
    "allreduce": "all-reduce",
    "backend": "backend",
    "corrupt": "wrong",
    "cuda": "gpu",
    "deadlock": "hang",
    "device": "gpu",
    "eperm": "eperm",
    "freeze": "hang",
    "frozen": "hang",
    "garbage": "garbage",
    "graphs": "graph",
    "hung": "hang",
    "nan": "wrong",
    "resume": "wake",
    "replaying": "replay",
    "sleeping": "sleep",
    "slower": "slow",
    "spin": "hang",
    "stall": "hang",
    "stuck": "hang",
    "wakeup": "wake",
}


#: A thread of somebody's tracker, as ``nccl#2389``, and its address.
_THREAD = re.compile(r"[\w./-]*#\d+")
_ADDRESS = re.compile(r"(?:https?://)?github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)[\w#/-]*")
#: How sources write a repository, by its name and by its owner and name.
_SHORT = {name: short for short, full in REPOSITORIES.items() for name in (full.lower(), full.lower().split("/")[1])}


@dataclass(frozen=True)
class Fit:
    """A row, and how much of what was asked it says: 1 for the best."""

    hazard: Hazard
    share: float


def search(text: str, hazards: Sequence[Hazard] = HAZARDS) -> tuple[Fit, ...]:
    """The rows that fit best, best first; none where no word is known.

    A thread (``V#51513``, ``vllm#51513``, ``nccl#2389``, or its address on GitHub) is looked up among the sources
    instead; one that no row has says nothing.
    """
    text = _ADDRESS.sub(r"\1#\2", text)
    if named := _that_name_a_thread(text, hazards):
        return tuple(Fit(hazard, 1.0) for hazard in named)
    documents = {h.id: _words_of(h) for h in hazards}
    rare = Counter(word for words in documents.values() for word in words)
    asked = Counter(words(_THREAD.sub(" ", text)))
    scores = {
        h.id: sum(
            documents[h.id].get(word, 0.0) * math.log(1 + len(hazards) / rare[word]) for word in asked if word in rare
        )
        for h in hazards
    }
    best = max(scores.values(), default=0.0)
    if best <= 0:
        return ()
    ranked = sorted(hazards, key=lambda h: -scores[h.id])
    found = [Fit(h, scores[h.id] / best) for h in ranked[:_MOST]]
    return tuple(match for match in found if match.share >= _SHARE)


def count_fitting(text: str, hazards: Sequence[Hazard] = HAZARDS) -> int:
    """How many rows have a word of the text, or its thread; :func:`search` gives the best of them."""
    text = _ADDRESS.sub(r"\1#\2", text)
    if named := _that_name_a_thread(text, hazards):
        return len(named)
    asked = set(words(_THREAD.sub(" ", text)))
    return sum(not asked.isdisjoint(_words_of(h)) for h in hazards)


def words(text: str) -> list[str]:
    """The words that count, in one form."""
    found = []
    for word in re.findall(r"[a-z][a-z0-9_]*(?:-[a-z0-9]+)*|\d+(?:\.\d+)+|0x[0-9a-f]+|\d{3,}", text.lower()):
        for part in (word, *word.split("-")) if "-" in word else (word,):
            form = _ALIKE.get(part) or _ALIKE.get(_stem(part)) or _stem(part)
            if form not in _COMMON and len(form) > 1:
                found.append(form)
    return found


def _stem(word: str) -> str:
    for ending in ("ings", "ing", "ies", "ed", "es", "s", "ly", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@functools.lru_cache(maxsize=1024)
def _words_of(hazard: Hazard) -> Mapping[str, float]:
    """What each word counts for in a row: where it stands best, a little more where it stands often."""
    found: dict[str, float] = {}
    for field, weight in _WEIGHTS.items():
        for word, count in Counter(words(getattr(hazard, field))).items():
            found[word] = max(found.get(word, 0.0), weight * (1 + 0.1 * min(count - 1, 3)))
    for when in hazard.when:
        for name in (*when.collectives, *when.facts):
            for word in words(str(name).replace("_", " ")):
                found.setdefault(word, 1.0)
    return found


def _that_name_a_thread(text: str, hazards: Sequence[Hazard]) -> list[Hazard]:
    threads = _THREAD.findall(text)
    return [h for h in hazards if any(_names(h, thread) for thread in threads)]


def _names(hazard: Hazard, thread: str) -> bool:
    """Whether a row has this thread among its sources; ``nccl#2389`` is ``NVIDIA/nccl#2389``."""
    repository, _, number = thread.partition("#")
    ways = {thread, f"{_SHORT.get(repository.lower(), repository)}#{number}"}
    return any(re.search(rf"(?<![\w.-]){re.escape(way)}(?!\d)", hazard.source, re.IGNORECASE) for way in ways)
