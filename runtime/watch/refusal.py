"""Refusal: a call that every rank makes was wrong on one of them. The others hear of it, and all give the call up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator

import torch

from ..errors import GroupError, RingfenceError
from ..groups import Group, describe_group, device_of_group, name_of_group, with_peers
from .supervision import Asked
from .supervisor import supervisor_for

log = logging.getLogger(__name__)

#: How long a rank that was called wrongly waits for those that it has not met yet, to tell them.
WAIT_SECONDS = 30.0


@contextlib.contextmanager
def refused_by_all(group: object, call: str, seconds: object = WAIT_SECONDS) -> Iterator[None]:
    """Around what a rank looks at by itself, at the beginning of a call that all ranks of a group make.

    group: as the caller gave it; what is none has no ranks to be told. call: its name. seconds: how long its ranks
    were to wait for each other, as the caller gave it.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(GroupError):
            name = name_of_group(group)  # type: ignore[arg-type]
            device = device_of_group(name)
            wait = seconds if isinstance(seconds, int | float) and 0 < seconds < WAIT_SECONDS else WAIT_SECONDS
            refuse(
                [describe_group(name, device)],
                device,
                f"{call} was called wrongly there: {error}",
                f"call {call}",
                wait,
            )
        raise


def refuse(
    groups: Collection[Group], device: torch.device, why: str, purpose: str, seconds: float = WAIT_SECONDS
) -> None:
    """Tell the ranks of these groups that this one does not come to what they do together; all are in step then.

    Where they never met it waits for them a little, and no longer. purpose: of the channel that the others open.
    """
    asked = Asked(agree_seconds=min(seconds, WAIT_SECONDS))
    if with_peers(groups):
        log.error("ringfence: %s; the other ranks are told", why)
    with contextlib.suppress(RingfenceError, RuntimeError):  # they do not come, or the store is gone
        supervisor = supervisor_for(asked)
        with supervisor.compiling(asked, purpose):
            for channel in supervisor.open(groups, device).values():
                channel.leave(why, in_step=True)
