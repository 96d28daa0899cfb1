"""Agree, then act: the ranks of a group compare what they are about to do before they do it.

A rank that captured another graph, found another version of FlashInfer or failed to make its
workspace does not fail: it leaves its peers spinning in a kernel that has no timeout. So
everything that decides which collectives are called is written down (:class:`PlanDigest`)
and compared over the store, and whatever one rank can or cannot do is voted on
(:func:`vote`), so that all ranks go the same way.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..channel import Channel
from ..errors import RankLeftError, RankMismatch, on_one_line
from ..spelling import Failures, by_value, first_difference
from .position import sizes_text

#: Of a step's parts: how it is run.
HOW = "how it runs"


@dataclass(frozen=True)
class PlanDigest:
    """What must be equal on all ranks: named parts, in the order in which a difference is looked for.

    Causes come before consequences (versions before ops), so that the first difference is
    the one to mend. ``sources`` say where in the user's code a part comes from; they may differ. ``lockstep``:
    collectives are captured, so that all ranks must capture in the same steps. ``what`` the ranks agree on, in words.
    ``arguments``: of a call that has done nothing yet, so that ranks that differ may call again.
    """

    parts: tuple[tuple[str, str], ...]
    sources: tuple[tuple[str, str], ...] = ()
    lockstep: bool = True
    what: str = "compiled graph"
    arguments: bool = False

    @property
    def told(self) -> tuple[tuple[str, str], ...]:
        """The parts with their sources."""
        where = dict(self.sources)
        return tuple((name, f"{text} ({where[name]})" if name in where else text) for name, text in self.parts)

    @functools.cached_property
    def short(self) -> str:
        """Equal exactly where the parts are, and small enough to be sent in every exchange."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]


def agree(channel: Channel, digest: PlanDigest) -> None:
    """Return where all ranks hold the same digest; otherwise raise :class:`RankMismatch` on every rank.

    Only hashes are sent unless they differ. Also raises what :meth:`Channel.exchange` raises.
    """
    topic = f"agree on the {digest.what}"
    if len(set(channel.exchange(topic, digest.short))) == 1:
        return
    digests = channel.exchange(f"{topic}: the difference", (digest.parts, digest.told))
    difference = first_difference([parts for parts, _ in digests], channel.ranks, [told for _, told in digests])
    text = f"the ranks do not agree on the {digest.what}: {difference}"
    raise RankMismatch(text, in_step=digest.arguments)


def vote(channel: Channel, topic: str, failure: str | None) -> Failures:
    """Did everybody succeed? ``(rank, reason)`` of each that did not, the same on all ranks; empty where all did.

    Every rank must vote, those that failed most of all: pass what went wrong instead of raising it.
    """
    answers = channel.exchange(f"vote: {topic}", failure)
    return tuple((rank, reason) for rank, reason in zip(channel.ranks, answers, strict=True) if reason is not None)


class GroupAgreement:
    """What the ranks of a graph's groups agree on: its plan once, then each size before it is captured.

    A graph over several groups (tensor and data parallel, say) agrees in each of them.
    """

    def __init__(self, channels: Sequence[Channel], digest: PlanDigest) -> None:
        self._channels, self._digest = tuple(channels), digest
        for channel in self._channels:
            agree(channel, digest)

    def before_capture(self, sizes: tuple[int, ...]) -> None:
        """Raises :class:`RankMismatch` where a rank is about to capture other sizes, or of another graph."""
        for channel in self._channels:
            answers = channel.exchange("capture", (sizes, self._digest.short))
            if len(set(answers)) > 1:
                said = [f"{sizes_text(s)} of graph {short}" for s, short in answers]
                raise RankMismatch(f"the ranks are about to capture different things: {by_value(said, channel.ranks)}")

    def moved(self, sizes: tuple[int, ...], name: str | None) -> tuple[str | None, ...]:
        """What the ranks say of their captured parameters: the name of one that moved, or None; each answer once."""
        heard = {name}
        for channel in self._channels * len(self._channels):
            for answers in channel.exchange(f"parameters of {sizes_text(sizes)}", tuple(sorted(heard, key=str))):
                heard.update(answers)
        return tuple(sorted(heard, key=str))

    def after_capture(self, failure: str | None) -> Failures:
        """Whose capture failed, as ``(rank, reason)``: where one did, no rank may keep its own.

        What a rank hears in one group it tells the next, so that the ranks of a mesh hear of it too.
        """
        failed: Failures = ()
        for channel in self._channels * len(self._channels):  # as many passes as a mesh may have dimensions
            heard = vote(channel, "capture", failure)
            failed = failed or heard
            failure = failure or (failed[0][1] if failed else None)
        return failed

    def leave(self, why: str) -> None:
        """Tell the ranks of all groups that this one comes to no further exchange."""
        for channel in self._channels:
            channel.leave(why)

    def pass_over(self, error: Exception) -> None:
        """A call of this rank begins no step. It waits for nobody; the others read why instead of beginning theirs."""
        for channel in self._channels:
            rank = channel.ranks[channel.rank]
            why = (
                f"rank {rank} was called wrongly, and its step did not begin: {on_one_line(error)}. "
                "No other rank began it; what all ranks are called with must be the same, and they may call again"
            )
            channel.pass_over(str(error) if isinstance(error, RankLeftError) else why)

    def before_step(self, step: int, parts: tuple[tuple[str, str], ...]) -> None:
        """The opt-in check of every step. parts: what it is; :data:`HOW` counts where collectives are captured.

        Raises :class:`RankMismatch` where ranks choose differently, with the first part that differs, and
        :class:`RankLeftError` where a rank begins none.
        """
        mine = (("number", str(step)), *(part for part in parts if self._digest.lockstep or part[0] != HOW))
        for channel in self._channels:
            answers = channel.exchange("step", mine)
            if len(set(answers)) > 1:
                raise RankMismatch(
                    f"the ranks do not take the same step, their step {step}: "
                    f"{first_difference(answers, channel.ranks)}; what chooses a step or a graph (sizes, padding) must "
                    "be equal on all ranks"
                )
