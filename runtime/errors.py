"""Every error a user can meet, one class per kind of mistake.

Each message names the offending thing and the remedy. All derive from
:class:`RingfenceError`, so one ``except`` clause catches the product's own
errors and nothing else.
"""

from __future__ import annotations


class RingfenceError(Exception):
    """Base of all errors that ringfence raises on purpose."""


class OptionsError(RingfenceError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class ArgumentError(RingfenceError, TypeError):
    """A function was given another kind of thing than it takes."""


class CollectiveUnavailableError(RingfenceError):
    """The collective that was asked for has no runtime in this process."""


class GroupError(RingfenceError):
    """What is given as a process group is none of this process, or has no backend for the device."""


class LinksUnknownError(RingfenceError):
    """How the GPUs are linked cannot be read."""


class RankMismatch(RingfenceError):
    """The ranks of a group are about to do different things.

    in_step: all of them gave up what they had begun, and nothing else was done, so they may call again.
    """

    def __init__(self, message: str, *, in_step: bool = False) -> None:
        super().__init__(message)
        self.in_step = in_step


class RankLeftError(RankMismatch):
    """A rank will not come to what the others wait for: it gave up, was called wrongly, or does something else."""


class RecompiledAloneError(RankMismatch):
    """A rank compiles a graph that the others do not, and each waits for the other where it does not come.

    ranks: those that compile.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class GroupFailureError(RingfenceError):
    """Another rank failed, so this one cannot go on.

    ranks: which.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class HangError(GroupFailureError):
    """Nothing moved until the deadline; ``ranks`` are those that the others wait for.

    told: this rank has not waited so long itself, and was told by another that has.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), *, told: bool = False) -> None:
        super().__init__(message, ranks)
        self.told = told


class PoisonedError(GroupFailureError):
    """A step failed half-way on some rank, so the ranks are out of step and nothing may be called any more."""


class JournalError(RingfenceError, ValueError):
    """A folder of journals that cannot be written, read or merged."""


class ChannelTimeoutError(RingfenceError):
    """Ranks did not come to an exchange in time.

    ranks: which.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerFailedError(RingfenceError):
    """A rank failed at something that all ranks do together.

    failures: which, and why.
    """

    def __init__(self, message: str, failures: tuple[tuple[int, str], ...]) -> None:
        super().__init__(message)
        self.failures = failures


class SizeTableError(RingfenceError, ValueError):
    """A file of sizes that cannot be read."""


class NotSavableError(RingfenceError):
    """A compiled graph was to be saved, and it belongs to this process."""


class WorkspaceError(RingfenceError):
    """A workspace cannot be created, used or replaced here and now."""


class SelfTestHungError(RingfenceError):
    """A kernel of the start-up self-test spins and will not come back."""


class WorkspaceReplacedError(RingfenceError):
    """A captured graph holds addresses of a workspace that was closed."""


class InputError(RingfenceError, ValueError):
    """The graph's inputs cannot be served: no tokens, or several devices."""


class ModelError(RingfenceError, ValueError):
    """:func:`ringfence.compile` was given something that it cannot compile in place."""


class GraphMetadataError(RingfenceError):
    """A pass was given a graph without the ``val`` metadata it reads, or nodes of another graph."""


class RefusedError(RingfenceError):
    """An op of the graph may run neither captured nor eagerly."""


class HazardError(RingfenceError):
    """A known mechanism applies to a fused site, and ``on_hazard="raise"`` was asked for."""


class NotFusedError(RingfenceError, AssertionError):
    """:func:`ringfence.assert_fused` found another number of fused sites."""


class TargetError(RingfenceError):
    """The target of ``ringfence explain`` cannot be loaded or compiled."""


class CaptureError(RingfenceError):
    """A capture or a replay is refused, or a capture failed and was undone."""


class CaptureFailedWarning(UserWarning):
    """A capture failed; the call that it was part of was finished uncaptured, and later ones of its size will be."""


class MovedInputWarning(UserWarning):
    """A parameter or a cache is at another address in every call, so that what was captured is of no use; or inputs
    that share memory begin elsewhere in it than when they were traced, so that what was compiled is of none."""


class NotFusedWarning(UserWarning):
    """Nothing in a model is fused, or a group that :func:`ringfence.fuse` was told of has nothing to fuse."""


class CapturesWastedWarning(UserWarning):
    """Calls of one token count have too many other sizes: captures of them are not replayed, and no more are made."""


class ChangingFloatWarning(UserWarning):
    """A float that a fused site takes in has had several values, and each is a graph of its own."""


class NestedCaptureError(CaptureError):
    """A capture was started while another one runs on this thread."""


class ConcurrentCallError(RingfenceError):
    """Two threads call models over one group at once, while a watch judges by the order of its calls."""


class GradModeError(CaptureError):
    """The runner was called with grad mode on and an input that needs grad."""


class AddressChangedError(CaptureError):
    """A parameter of one rank moved, and its captured collectives need the graphs of all ranks."""


class DataDependentValueError(CaptureError):
    """An eager island returned another number than when the graph was captured."""


class PartSpecError(RingfenceError):
    """A part of a cut graph breaks a rule that every part keeps: a fault of ringfence, found before it can do harm."""


class VersionError(RingfenceError, ValueError):
    """A version cannot be read, or its protocols are not known."""


class UnknownHazardError(RingfenceError, LookupError):
    """No row of the hazard table has this id."""


class PlanError(RingfenceError, ValueError):
    """A plan that no protocol can be asked about: no collective, or a world size that does not exist."""


class TraceError(RingfenceError, ValueError):
    """A saved trace that cannot be read."""


class NotDecidedError(RingfenceError):
    """A search was ended at its bound; nothing is known about the plan.

    states: how many were visited until then.
    """

    def __init__(self, states: int, bound: str) -> None:
        super().__init__(
            f"the search ended at its bound of {bound}; give it more time, or ask about fewer ranks, sizes or layers"
        )
        self.states = states


class TooManyStatesError(NotDecidedError):
    """A protocol model has more states than the limit; nothing is known about it.

    states: how many were visited.
    """

    def __init__(self, states: int, limit: int) -> None:
        RingfenceError.__init__(self, f"the model has more than {limit} states; ask about fewer calls or ranks")
        self.states = states


def text_of(error: BaseException) -> str:
    """What an error says, without line breaks and not too long."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]


def on_one_line(error: BaseException) -> str:
    """The same after its type."""
    return f"{type(error).__name__}: {text_of(error)}"
