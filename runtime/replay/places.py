"""Where kept arguments are, and what follows when they are elsewhere.

A capture knows addresses. So an argument that stays with the caller (a parameter, a cache that the program writes
into) is part of what a capture is found by, and one that is elsewhere is captured anew, a bounded number of times:

- a cache at a new address is another capture, as other sizes are. The last :data:`CACHES` of them are kept for each set
  of sizes, and as many may go by that were never replayed; then such calls run uncaptured;
- a parameter that moved (FSDP gathers it anew for each call, offloading, ``p.data = ...``) takes its captures with it,
  and from the third move on its calls run uncaptured: it moves by design.

**Ranks.** Addresses are luck: one rank's allocator gives the old one out again, another's does not. A rank that
captured by itself must not wait for the others then. Where all collectives are islands it need not: what a rank
records beside them is its own affair, so ranks agree only when they first meet sizes that all of them have. A
*captured* collective needs the graphs of all ranks: NCCL asks that a call is captured by all ranks or by none, and
replayed by all. In this lockstep

- a cache is told by its memory and not by its address, so that all ranks see another one in the same call;
- the calls after a capture compare whether parameters moved, which shows what moves by design: if all did, all capture
  anew; if some did, nobody captures any more;
- a parameter that moves later is an :class:`AddressChangedError` on its rank, which the others hear of.
"""

from __future__ import annotations

import bisect
import enum
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import AddressChangedError, CapturesWastedWarning, MovedInputWarning
from ..watch.journal import sizes_text
from ..watch.supervision import Supervision
from .addresses import Addresses, layouts
from .buffers import merged, mib, overlap, span
from .entry import Entry, Kept, Key, SizedModule
from .program import Program, SizeRule, taker
from .remarks import Remarks
from .stats import Counts, Uncaptured

#: Captures of one set of sizes that differ in where caches are: how many are kept, and how many may be of no use.
CACHES = 8
#: Captures of one token count that differ in another size (a batch of sequences, the length of a cache).
#: A size that grows in every step would otherwise fill the memory with graphs that are used once.
SIZES = 8
#: Calls of one token count after which a size that grows by as much each time is taken to go on so.
_GROWTH = 3
#: How often parameters may move before they are taken to do it by design.
MOVES = 2
#: Bytes of an input whose copies in every step are worth a note.
_LARGE = 16 << 20
#: Calls after a capture in which ranks that capture collectives compare whether parameters moved.
_COMPARED = 2


class How(enum.Enum):
    """How a call of captured sizes is served. ALONE captures without asking the other ranks."""

    REPLAY = enum.auto()
    CAPTURE = enum.auto()
    ALONE = enum.auto()
    UNCAPTURED = enum.auto()


def nothing() -> None: ...


class Places:
    """The entries of a runner.

    rule: of the sizes. remarks: who hears what the user should read. counts: where captures are counted.
    """

    def __init__(
        self,
        program: Program,
        rule: SizeRule,
        supervision: Supervision,
        remarks: Remarks | None = None,
        counts: Counts | None = None,
    ) -> None:
        self._counts = counts if counts is not None else Counts()
        #: Of the last call that was to run uncaptured.
        self.why = Uncaptured.SIZES
        self.entries: dict[Key, Entry] = {}
        self._names = program.inputs
        self._marked = program.marked
        self.static = sorted(program.static_inputs)
        self.written = sorted(program.written - program.static_inputs)
        #: The arguments that captures hold by address: parameters, then written inputs.
        self.kept = [*self.static, *self.written]
        self._addresses, self._take_written = Addresses(self.kept), taker(self.written)
        #: Where the program may write, and the addresses that this was made of.
        self._writes: tuple[tuple[Any, ...], list[tuple[int, int]]] = (), []
        self._written = sorted(program.written)
        self._rule, self._supervision = rule, supervision
        self._remarks = remarks if remarks is not None else Remarks()
        #: Whether captures hold collectives, which every rank must capture then.
        self.lockstep = supervision.peers and any(s.calls for s in program.steps if not s.island)
        #: Sizes of all ranks that were captured, or tried -> their token count.
        self._met: dict[tuple[int, ...], int] = {}
        self._modules: list[SizedModule] = []
        self._said: set[str] = set()
        #: Takes back what this call has counted, where it is given up before its step.
        self.take_back: Callable[[], object] = nothing

    def key(self, sizes: tuple[int, ...], args: list[Any]) -> Key:
        """By what an entry is found."""
        addresses: tuple[Any, ...] = self._addresses.of(args)
        if self.written:  # the layout of a parameter is guarded
            addresses += self._layouts(self._take_written(args))
        return sizes, addresses

    def share_memory(self, key: Key, args: Sequence[Any], copied: Sequence[int]) -> bool:
        """Whether an input that is copied lies where the program writes: the copy would show the old value."""
        if not self._written:
            return False
        if self._writes[0] != key[1]:
            self._writes = key[1], merged([span(args[i]) for i in self._written])
        spans = self._writes[1]
        for i in copied:
            if not isinstance(args[i], Tensor):
                continue
            begin, end = span(args[i])
            near = bisect.bisect_left(spans, (end,)) - 1
            if near < 0 or spans[near][1] <= begin:
                continue
            for written in self._written:
                if overlap(args[written], args[i]):
                    self._say(
                        f"shared {i}",
                        f"input '{self._names[i]}' may lie in memory that the model writes through "
                        f"'{self._names[written]}': such calls run uncaptured",
                        warns=False,
                    )
                    return True
        return False

    def _layouts(self, caches: Sequence[Tensor]) -> tuple[Any, ...]:
        identities = tuple([cache.untyped_storage()._cdata for cache in caches]) if self.lockstep else ()
        return *layouts(caches), identities

    def how(self, key: Key, args: Sequence[Any]) -> How:
        """How a call is served. Captures that cannot be used any more are released.

        Raises :class:`AddressChangedError`.
        """
        entry = self.entries.get(key)
        if entry is not None and not (self.lockstep and entry.module.calls < _COMPARED):
            return How.REPLAY
        module = self._module(key, args)
        if module is None:
            return self._new(key, args)
        moved = self._moved(module, args)
        self.take_back = functools.partial(vars(module).update, vars(module).copy())
        if self.lockstep and not module.off:
            self._compare(module, moved)
        if module.off:
            return self._uncaptured(Uncaptured.PARAMETERS if module.moves else Uncaptured.FAILED)
        if key in self.entries:
            return How.REPLAY
        self._release_unusable(module, moved is not None)
        if moved is not None:
            module.moves += 1
            module.places = key[1][: len(self.static)]
        if module.moves > MOVES:
            self._give_up(module, moved or "a parameter")
            return self._uncaptured(Uncaptured.PARAMETERS)
        if module.captures - module.replayed >= CACHES + module.moves:
            self._warn_of_caches()
            return self._uncaptured(Uncaptured.CACHES)
        return How.CAPTURE if self.lockstep else How.ALONE

    def recorded(self, entry: Entry, args: Sequence[Any], failed: bool) -> None:
        """A call has recorded ``entry``; where that failed its sizes stay uncaptured."""
        module = self._module(entry.key, args)
        if module is None:
            parameters = [weakref.ref(args[i]) for i in self.static]
            module = SizedModule(entry.sizes, parameters, tuple(args[i].data_ptr() for i in self.static))
            self._modules = [m for m in self._modules if all(p() is not None for p in m.parameters)]
            self._modules.append(module)
        module.captures, module.calls, module.off = module.captures + 1, 0, failed
        entry.module = module
        if not failed:
            self._counts.captures += 1
            self.entries[entry.key] = entry
            entry.number = module.captures
            module.recent.append(entry.number)
            if len(module.recent) > CACHES:
                oldest = module.recent.pop(0)
                for old in [e for e in self.entries.values() if e.module is module and e.number == oldest]:
                    self.drop(old)

    def replays(self, entry: Entry) -> None:
        """A call is served by ``entry``."""
        module: SizedModule = entry.module
        self._counts.replays += 1
        if entry.replays == 0:
            module.replayed += 1
            self._counts.replayed += 1
            if "sizes" in self._said:
                self._remarks.wasted(None)
        entry.replays += 1
        if module.recent[-1] != entry.number:
            module.recent.remove(entry.number)
            module.recent.append(entry.number)

    def kept_of(self, args: Sequence[Any]) -> list[Kept]:
        return [Kept(args[i]) for i in self.kept]

    # -- decisions -----------------------------------------------------------------------

    def _new(self, key: Key, args: Sequence[Any]) -> How:
        """Sizes or parameters that were never captured."""
        for entry in [e for e in self.entries.values() if e.sizes == key[0] and e.gone]:
            self.drop(entry)
        tokens, shared = self._tokens(key[0]), self.compared(key[0])
        first = not self.lockstep and shared not in self._met
        if shared not in self._met:
            self._met[shared] = tokens
            self.take_back = lambda: self._met.pop(shared)
        if first:  # counted alike by all ranks; these sizes are among them already
            met = [sizes for sizes, n in self._met.items() if n == tokens]
            if len(met) > SIZES:
                return self._too_many(met)
            self._look_for_growth(met, tokens)
            return How.CAPTURE
        alike = [m.sizes for m in self._modules if self._tokens(m.sizes) == tokens and self._same(m, key, args)]
        if len(alike) >= SIZES:
            return self._too_many([*alike, key[0]])
        self._look_for_growth([*alike, key[0]], tokens)
        return How.CAPTURE if self.lockstep else How.ALONE

    def _uncaptured(self, why: Uncaptured) -> How:
        self.why = why
        return How.UNCAPTURED

    def _look_for_growth(self, met: Sequence[tuple[int, ...]], tokens: int) -> None:
        """A cache that grows shows in the third call: by as much as in the second, and by no more than its tokens."""
        if len(met) != _GROWTH or self._counts.replayed:
            return
        first, second = ([b - a for a, b in zip(*pair, strict=True)] for pair in (met[:2], met[1:]))
        if first == second and any(first) and all(0 <= by <= tokens for by in first):
            self._say_sizes(met)

    def _too_many(self, met: Sequence[tuple[int, ...]]) -> How:
        """met: sizes of one token count, of which no more are captured."""
        self._say_sizes(met)
        return self._uncaptured(Uncaptured.SIZES)

    def _say_sizes(self, met: Sequence[tuple[int, ...]]) -> None:
        grow = [b for i, b in enumerate(self._rule.bindings) if len({s[i] for s in met if len(s) > i}) > 1]
        named = [f"'{self._names[i]}{'' if d is None else f'.shape[{d}]'}'" for i, d in grow]
        tokens = self._tokens(met[0]) if len(met[0]) == len(self._rule.bindings) else None
        at = f" of {tokens} tokens" if tokens is not None else ""
        never = not self._counts.replayed
        self._say(
            "sizes",
            f"{'no capture' if never else 'not every capture'}{at} was replayed: {' and '.join(named[:2]) or 'a size'} "
            f"{'is another one in every call' if never else 'has more values than are kept'}, and from the "
            f"{SIZES + 1}th on such calls run uncaptured; give the model inputs of fixed sizes (generate(): "
            "cache_implementation='static'), or leave capture_sizes out",
            wasted=never,
        )

    def _tokens(self, sizes: tuple[int, ...]) -> int:
        assert self._rule.tokens is not None
        return self._rule.tokens(sizes)

    def compared(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """What of a step's sizes must be the same on all ranks."""
        return sizes if self.lockstep else self._rule.of_all_ranks(sizes)

    def _module(self, key: Key, args: Sequence[Any]) -> SizedModule | None:
        return next((m for m in self._modules if m.sizes == key[0] and self._same(m, key, args)), None)

    def _same(self, module: SizedModule, key: Key, args: Sequence[Any]) -> bool:
        """Whether a call's parameters are those of ``module``."""
        if module.places == key[1][: len(self.static)]:
            return True
        return all(ref() is args[i] for ref, i in zip(module.parameters, self.static, strict=True))

    def _moved(self, module: SizedModule, args: Sequence[Any]) -> str | None:
        """The first parameter that is not where it was at the last capture."""
        for i, place in zip(self.static, module.places, strict=True):
            if args[i].data_ptr() != place:
                return self._names[i]
        return None

    def _compare(self, module: SizedModule, moved: str | None) -> None:
        if module.calls < _COMPARED:
            module.calls += 1
            said = self._supervision.moved(module.sizes, moved)
            names = [name for name in said if name is not None]
            if names and len(names) < len(said):  # the graphs of some ranks would be left alone
                self._give_up(module, names[0])
        elif moved is not None:
            raise AddressChangedError(
                f"parameter '{moved}' moved since it was captured at {sizes_text(module.sizes)}, and the captured "
                "collectives need the graphs of all ranks; update parameters in place (p.copy_(new)), or start over "
                "on all ranks with torch._dynamo.reset()"
            )

    def _release_unusable(self, module: SizedModule, moved: bool) -> None:
        for entry in [e for e in self.entries.values() if e.sizes == module.sizes]:
            places = entry.addresses[: len(self.static)]
            if entry.gone or (moved and places == module.places):
                self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """Release an entry. What fails at that is said and stops nothing."""
        if self.entries.get(entry.key) is entry:
            del self.entries[entry.key]
        try:
            entry.release()
        except Exception as error:
            warnings.warn(
                f"ringfence: captures of {sizes_text(entry.sizes)} were not released ({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=2,
            )

    def note(self, args: Sequence[Any], copied: Sequence[int]) -> None:
        """What the report says of the inputs of captured calls, once each."""
        if caches := [i for i in self.written if i not in self._marked]:
            more = f" and {len(caches) - 1} more" if len(caches) > 1 else ""
            self._say(
                "written",
                f"input '{self._names[caches[0]]}'{more} ({mib(*[args[i] for i in caches])}) is written, or read by "
                "its place in memory (as_strided), and stays where the caller has it: at another address it is "
                "captured anew; a cache that stays is best marked with torch._dynamo.mark_static_address",
                warns=False,
            )
        for i in copied:
            if isinstance(args[i], Tensor) and args[i].numel() * args[i].element_size() >= _LARGE:
                self._say(
                    f"copied {i}",
                    f"input '{self._names[i]}' ({mib(args[i])}) is copied in every captured step; if it stays where "
                    "it is, as a cache does, mark it with torch._dynamo.mark_static_address",
                    warns=False,
                )

    def _give_up(self, module: SizedModule, name: str) -> None:
        module.off = True
        self._say(
            "parameter",
            f"parameter '{name}' is at another address in every call, so calls of {sizes_text(module.sizes)} run "
            "uncaptured; keep parameters in place: with FSDP2 fully_shard(..., reshard_after_forward=False), without "
            "offloading, and by p.copy_(new) instead of p.data = new",
        )

    def _warn_of_caches(self) -> None:
        names = ", ".join(f"'{self._names[i]}'" for i in self.written)
        self._say(
            "cache",
            f"inputs that the model writes into ({names}) keep arriving at new addresses, and calls with new ones run "
            f"uncaptured after {CACHES} captures that were never replayed; allocate them once, and mark them with "
            "torch._dynamo.mark_static_address",
        )

    def _say(self, about: str, text: str, *, warns: bool = True, wasted: bool = False) -> None:
        """Say something once, in the report and, if it ``warns``, to the user."""
        if about in self._said:
            return
        self._said.add(about)
        self._remarks.note(text)
        if wasted:
            self._remarks.wasted(text)
            warns = not self._remarks.told_of_waste()
        if warns:
            kind = CapturesWastedWarning if about == "sizes" else MovedInputWarning
            warnings.warn(f"ringfence: {text}", kind, stacklevel=2)
