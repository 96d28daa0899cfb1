"""Start-up self-test of a MoE workspace: what arrives where, and what comes back, run eagerly and replayed.

Rows, routing and what the experts make of a row are drawn from seeds, so each rank knows what it has to find without
any communication. What is tried: the smallest and the largest capacity, full ranks, ranks without tokens, rows that
nobody sent poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..channel import Channel
from ..spelling import failures_text
from .moe_reference import owner_of
from .self_test import wait_for_device
from .workspace import MoeWorkspace

_EXPERTS = 3  # of each rank
_EMPTY = -1
_DTYPE = torch.bfloat16
#: Bytes of what a trial draws for the rows of all ranks.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class MoeTested:
    """What was found to fail, on any rank: ``eager`` and ``captured`` are None where nothing did."""

    eager: str | None
    captured: str | None


class _PairTrial:
    """Dispatch, experts and combine of one capacity, with inputs that are filled anew for each run."""

    def __init__(self, workspace: MoeWorkspace, capacity: int, tokens: tuple[int, ...]) -> None:
        kernels, self._device = workspace.kernels, workspace.device
        self._kernels, self.capacity, self.tokens = kernels, capacity, tokens
        ranks, sizes, self._k = kernels.ranks, kernels.sizes, min(kernels.sizes.top_k, _EXPERTS)
        self._experts = _EXPERTS * ranks
        width = max(4, sizes.row_bytes - 4 * self._k)
        self._sent = self._bytes(ranks, capacity, width)
        self._ids = torch.zeros(ranks, capacity, self._k, dtype=torch.int32, device=self._device)
        hidden = max(1, sizes.combine_bytes // _DTYPE.itemsize)
        self._values = torch.zeros(ranks * capacity, hidden, dtype=_DTYPE, device=self._device)
        mine = tokens[kernels.rank]
        self._x = self._bytes(mine, width)
        self._mine = torch.zeros(mine, self._k, dtype=torch.int32, device=self._device)
        self.out = torch.zeros(2, mine, hidden, dtype=_DTYPE, device=self._device)
        self.counts = torch.zeros(ranks, dtype=torch.int32, device=self._device)
        self.rows, self.got = self._bytes(ranks * capacity, width), self._ids.new_zeros(ranks * capacity, self._k)

    def _bytes(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def fill(self, seed: int) -> None:
        """New rows and routing of all ranks; the results are poisoned."""
        g = torch.Generator(self._device).manual_seed(seed)
        self._sent.random_(0, 256, generator=g)
        numbers = torch.arange(self.capacity, dtype=torch.int32, device=self._device)
        self._sent[:, :, :4] = numbers[:, None].view(torch.uint8)  # a row says which token it is
        scores = torch.rand(*self._ids.shape[:2], self._experts, generator=g, device=self._device)
        self._ids.copy_(scores.topk(self._k, dim=-1).indices)
        self._values.normal_(generator=g)
        rank, mine = self._kernels.rank, self.tokens[self._kernels.rank]
        self._x.copy_(self._sent[rank, :mine])
        self._mine.copy_(self._ids[rank, :mine])
        self.out.fill_(float("nan"))
        self.counts.fill_(-1)

    def run(self) -> None:
        """Two pairs, with nothing that asks the host: one by the ids of empty rows, and one by counts, in place."""
        kernels = self._kernels
        (rows,), ids, _ = kernels.dispatch([self._x], self._mine, self.capacity, self._experts, _EMPTY)
        self.rows.copy_(rows)
        self.got.copy_(ids)
        kernels.combine(self._made(rows, (ids != _EMPTY).any(1, keepdim=True)), self.out[0])
        (rows,), _, counts = kernels.dispatch([self._x], self._mine, self.capacity, self._experts, None, known=True)
        self.counts.copy_(counts)
        filled = torch.arange(self.capacity, device=self._device) < counts[:, None]
        made = self._made(rows, filled.view(-1, 1))
        kernels.combine(kernels.combine_rows(made.shape[0], made.shape[1], made.dtype).copy_(made), self.out[1])

    def _made(self, rows: Tensor, filled: Tensor) -> Tensor:
        """What this rank's experts make of rows, and nothing that may be combined of the others."""
        made = self._values.index_select(0, self._places(rows)) * self._scale(self._kernels.rank)
        return torch.where(filled, made, torch.full_like(made, float("nan")))

    def _places(self, rows: Tensor) -> Tensor:
        """Of each received row, the place of its token among those of all ranks; somewhere, for rows of nobody."""
        tokens = rows[:, :4].contiguous().view(torch.int32)[:, 0].long().clamp(0, self.capacity - 1)
        source = torch.arange(rows.shape[0], device=self._device) // self.capacity
        return source * self.capacity + tokens

    @staticmethod
    def _scale(rank: int) -> float:
        return 1.0 + rank / 8

    def failure(self) -> str | None:
        """What is wrong with the rows that arrived, or with the sum. Waits for the device."""
        kernels, what = self._kernels, f"of {self.tokens[self._kernels.rank]} tokens, capacity {self.capacity},"
        asked = owner_of(self._ids.long(), self._experts, kernels.ranks)  # [ranks, capacity, k]
        for source, count in enumerate(self.tokens):
            block = slice(source * self.capacity, (source + 1) * self.capacity)
            sent = (asked[source] == kernels.rank).any(1)
            sent[count:] = False
            ids, rows = self.got[block], self.rows[block]
            filled = (ids != _EMPTY).any(1)
            places = self._places(self.rows)[block] - source * self.capacity
            found = places[filled].sort().values
            if not torch.equal(found, sent.nonzero().flatten()):
                return f"dispatch {what} brought {int(filled.sum())} of {int(sent.sum())} rows of rank {source}"
            if int(self.counts[source]) != int(sent.sum()):
                return f"dispatch {what} counts {int(self.counts[source])} of {int(sent.sum())} rows of rank {source}"
            wrong = (rows != self._sent[source][places]).any(1) | (ids != self._ids[source][places]).any(1)
            if bool((wrong & filled).any()):
                return f"dispatch {what} brought a row of rank {source} that is not what was sent"
        return self._wrong_sum(asked[kernels.rank], what)

    def _wrong_sum(self, asked: Tensor, what: str) -> str | None:
        rank, mine = self._kernels.rank, self.out.shape[1]
        values = self._values.view(-1, self.capacity, self._values.shape[1])[rank, :mine]
        total = torch.zeros_like(values, dtype=torch.float32)
        for other in range(self._kernels.ranks):
            goes = (asked[:mine] == other).any(1, keepdim=True)
            total += torch.where(goes, (values * self._scale(other)).float(), 0.0)
        # Of two ranks the sum is one; of more it is taken in another order, which may round the other way.
        for out, how in zip(self.out, ("", " in place"), strict=True):
            if not torch.allclose(out.float(), total.to(_DTYPE).float(), rtol=2.0**-7, atol=1e-4):
                return f"combine{how} {what} is off by {float((out.float() - total).abs().max()):.2g}"
        return None


def self_test(workspace: MoeWorkspace, channel: Channel, *, capture: bool) -> MoeTested:
    """Test a workspace. Every rank must call.

    Raises :class:`SelfTestHungError` where a kernel does not come back: it spins on the device until the process ends.
    """
    made, failures = channel.attempt("self-test: memory", lambda: _trials(workspace))
    if made is None or failures:
        return MoeTested(failures_text(failures), None)
    eager = _voted(channel, "self-test, eager", _run(made, workspace, channel, 1, [trial.run for trial in made]))
    if eager is not None or not capture or workspace.device.type != "cuda":
        return MoeTested(eager, None)
    return MoeTested(None, _voted(channel, "self-test, captured", _captured(made, workspace, channel)))


def _trials(workspace: MoeWorkspace) -> list[_PairTrial]:
    ranks, sizes = workspace.kernels.ranks, workspace.sizes
    most = max(1, _MOST_BYTES // (ranks * max(sizes.row_bytes, sizes.combine_bytes)))
    capacities = sorted({1, min(5, sizes.capacity), min(sizes.capacity, most)})
    counts = [(n, tuple(n for _ in range(ranks))) for n in capacities]
    largest = capacities[-1]
    counts.append((largest, (0, *(largest for _ in range(ranks - 1)))))
    counts.append((largest, (largest, *(max(largest // 3, 1) if r % 2 else 0 for r in range(ranks - 1)))))
    return [_PairTrial(workspace, capacity, tokens) for capacity, tokens in counts]


def _run(
    trials: list[_PairTrial], workspace: MoeWorkspace, channel: Channel, seed: int, calls: list[Callable[[], object]]
) -> str | None:
    """The first failure. The rest is run all the same: the other ranks wait for this one's part."""

    def fill() -> None:
        for i, trial in enumerate(trials):
            trial.fill(1000 * seed + i)

    if unfilled := failures_text(channel.attempt("self-test: inputs", fill)[1]):
        return unfilled
    failures = []
    for call in calls:
        try:
            call()
        except Exception as error:
            failures.append(f"a call raised {type(error).__name__}: {error}")
    wait_for_device(workspace.device, channel)
    for trial in trials:
        try:
            failures += [why for why in [trial.failure()] if why]
        except Exception as error:  # the vote follows, and every rank must come to it
            failures.append(f"{type(error).__name__}: {error}")
    return next(iter(failures), None)


def _captured(trials: list[_PairTrial], workspace: MoeWorkspace, channel: Channel) -> str | None:
    """The same of a graph of all pairs, and of its replays with other routing."""
    channel.barrier("self-test: before the capture")
    graph, failure = torch.cuda.CUDAGraph(), None
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for trial in trials:
                trial.run()
    except Exception as error:
        failure = f"capture raised {type(error).__name__}: {error}"
    if any(channel.exchange("self-test: captured", failure)):
        return failure  # no rank replays what another could not capture
    for turn in (2, 3):
        if wrong := _run(trials, workspace, channel, turn, [graph.replay]):
            failure = failure or f"replay {turn - 1}: {wrong}"
    graph.reset()
    return failure


def _voted(channel: Channel, topic: str, failure: str | None) -> str | None:
    answers = channel.exchange(topic, failure)
    return failures_text(tuple((r, why) for r, why in zip(channel.ranks, answers, strict=True) if why)) or None
