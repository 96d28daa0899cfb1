"""A case: programs of two ranks, run by the real kernels, and what became of each call.

:func:`run` is called in a child (:mod:`.children`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu import emulate
from gpu.children import progress

#: Seconds until a call that has not returned never will. The slowest case takes milliseconds.
DEADLINE = 4.0

#: Largest |ours - reference| / (rms of the row + |reference|): sum, addition, square and norm each round once.
#: Data of another call misses it by an order of magnitude.
BOUND = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-14}

RETURNED, NEVER, WRONG = "returned", "never returned", "wrong"


@dataclass(frozen=True)
class Case:
    """``programs``: by rank, its calls, each (id, two-shot, tokens).

    rounds: how often the programs run, each time with other numbers.
    payload: "ordinary", or what the input has in it from round ``payload_from`` on: "subnormal word",
    "small activations", "negative zeros".
    cleaned: the input went through what ringfence puts in front of the op.
    captured: the programs are captured once and replayed in every round.
    """

    name: str
    collective: str
    release: str
    programs: tuple[tuple[tuple[int, bool, int], ...], ...]
    aliased: bool = False
    dtype: str = "bfloat16"
    hidden: int = 1024
    rounds: int = 1
    payload: str = "ordinary"
    payload_from: int = 0
    cleaned: bool = False
    captured: bool = False

    @property
    def calls(self) -> Iterator[tuple[int, bool, int]]:
        return (call for calls in self.programs for call in calls)


def run(fields: dict[str, Any]) -> dict[str, Any]:
    """What the kernels did: ``kind``, and of the last round which ranks returned and what each call left.

    ``words`` are the control words of each rank after each of its calls, of all rounds.
    """
    case = Case(**fields)
    bench = _Bench(case)
    outcome: dict[str, Any] = {"name": case.name, "words": [[], []], "worst": 0.0}
    for number in range(case.rounds):
        bench.fill(number)
        progress(name=case.name, round=number)
        bench.launch()
        returned = emulate.returned(DEADLINE)
        outcome |= {"round": number, "returned": returned}
        if not bench.read_back():
            return outcome | {"kind": NEVER, "note": "nor does a copy to the host", "stuck": True}
        calls = bench.judge()
        errors = [error for by_rank in calls for _, state, error in by_rank if state == "right"]
        outcome |= {"calls": calls, "worst": max([outcome["worst"], *errors])}
        for rank, words in enumerate(bench.words()):
            outcome["words"][rank] += words
        wrong = any(state == "wrong" for by_rank in calls for _, state, _ in by_rank)
        unfinished = any(state == "missing" for by_rank in calls for _, state, _ in by_rank)
        if not all(returned):
            return outcome | {"kind": WRONG if wrong else NEVER, "stuck": True}
        if wrong or unfinished:
            return outcome | {"kind": WRONG}
    return outcome | {"kind": RETURNED}


class _Bench:
    """The tensors of a case. All are made before the first launch: see :mod:`.emulate`."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._dtype = getattr(torch, case.dtype)
        self._tokens = max(tokens for _, _, tokens in case.calls)
        generator = torch.Generator().manual_seed(7)
        self._weight = (1 + emulate.ordinary(generator, case.hidden) / 4).to(self._dtype)
        self._clean = flush(self._dtype) if case.cleaned else None
        self._inputs: dict[int, Tensor] = {}
        self._residuals: dict[int, Tensor] = {}
        # By rank, one tensor for all outputs and one for all words, so that each is read back at once.
        counts = [sum(tokens for _, _, tokens in calls) for calls in case.programs]
        self._outputs = [self._empty(2, count) for count in counts]
        self._hosts = [torch.empty(output.shape, dtype=self._dtype, pin_memory=True) for output in self._outputs]
        self._workspace = self._make()
        width = self._workspace.control[0].numel()
        self._words = [torch.zeros(len(c), width, dtype=torch.int32, device="cuda") for c in case.programs]
        self._host_words = [torch.zeros(words.shape, dtype=torch.int32, pin_memory=True) for words in self._words]
        self._side = torch.cuda.Stream()
        self._steps = [self._steps_of(rank) for rank in range(emulate.RANKS)]
        self._warm_up()
        self.launch: Callable[[], None] = (
            emulate.capture(self._workspace, self._steps)
            if case.captured
            else functools.partial(emulate.eager, self._workspace, self._steps)
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self._case.hidden, dtype=self._dtype, device="cuda")

    def _make(self) -> emulate.Mnnvl | emulate.Trtllm:
        case = self._case
        return emulate.make(case.collective, case.release, self._weight.cuda(), self._tokens, case.aliased)

    def _steps_of(self, rank: int) -> list[emulate.Step]:
        steps, start = [], 0
        for i, (_, two_shot, tokens) in enumerate(self._case.programs[rank]):
            norm_out, residual_out = self._outputs[rank][:, start : start + tokens]
            tensors = (self._empty(tokens), self._empty(tokens), norm_out, residual_out)
            steps.append(emulate.Step(two_shot, *tensors, words=self._words[rank][i]))
            start += tokens
        return steps

    def _warm_up(self) -> None:
        """Run each kernel once elsewhere: the first launch loads it, which waits for the device."""
        workspace = self._make()
        generator = torch.Generator().manual_seed(8)
        for two_shot in sorted({two_shot for _, two_shot, _ in self._case.calls}):
            tensors = [emulate.ordinary(generator, self._tokens, self._case.hidden) for _ in range(4)]
            words = torch.zeros_like(workspace.control[0])
            steps = [
                [emulate.Step(two_shot, *(t.to("cuda", self._dtype) for t in tensors), words=words.clone())]
                for _ in range(emulate.RANKS)
            ]
            torch.cuda.synchronize()
            emulate.eager(workspace, steps)
            if not all(emulate.returned(DEADLINE)):
                raise RuntimeError("the warm-up call never returned: two ranks do not run at once on this device")
        self.read_back()

    def fill(self, number: int) -> None:
        """Other numbers in every round, and NaN in every output."""
        case = self._case
        generator = torch.Generator().manual_seed(100 + number)
        payload = case.payload if number >= case.payload_from else "ordinary"
        ids = sorted({id for id, _, _ in case.calls})
        shape = (self._tokens, case.hidden)
        self._inputs = {id: emulate.ordinary(generator, emulate.RANKS, *shape).to(self._dtype) for id in ids}
        self._residuals = {id: emulate.ordinary(generator, *shape).to(self._dtype) for id in ids}
        for id in ids:
            self._inputs[id] = with_payload(self._inputs[id], payload, only_word=id == ids[-1])
        for rank, calls in enumerate(case.programs):
            for (id, _, tokens), step in zip(calls, self._steps[rank], strict=True):
                sent = self._inputs[id][rank, :tokens].cuda()
                step.input.copy_(self._clean(sent) if self._clean else sent)
                step.residual.copy_(self._residuals[id][:tokens])
            self._outputs[rank].fill_(torch.nan)
        torch.cuda.synchronize()

    def read_back(self) -> bool:
        """Copy outputs and words to the host, beside kernels that may be spinning."""
        with torch.cuda.stream(self._side):
            for host, device in zip(self._hosts + self._host_words, self._outputs + self._words, strict=True):
                host.copy_(device, non_blocking=True)
            event = self._side.record_event()
        return all(emulate.poll([event], DEADLINE))

    def judge(self) -> list[list[tuple[int, str, float]]]:
        """By rank, each call: its id, "right", "wrong" or "missing", and its error."""
        result: list[list[tuple[int, str, float]]] = []
        for rank, calls in enumerate(self._case.programs):
            result.append([])
            start = 0
            for id, _, tokens in calls:
                ours = self._hosts[rank][:, start : start + tokens].float()
                start += tokens
                total = self._inputs[id][:, :tokens].float().sum(0)
                wanted = torch.stack(emulate.reference(total, self._residuals[id][:tokens], self._weight))
                scale = wanted.square().mean(-1, keepdim=True).sqrt() + wanted.abs()
                error = float(((ours - wanted).abs() / scale).max())
                if bool(ours.isnan().any()):
                    result[rank].append((id, "missing", -1.0))
                else:
                    result[rank].append((id, "right" if error <= BOUND[self._dtype] else "wrong", error))
        return result

    def words(self) -> list[list[list[int]]]:
        return [words.tolist() for words in self._host_words]


def with_payload(x: Tensor, payload: str, *, only_word: bool) -> Tensor:
    """Inputs of one call, (ranks, tokens, hidden). ``only_word``: the one word that is subnormal goes here."""
    match payload:
        case "subnormal word":
            if only_word:
                x.view(torch.int16)[0, x.shape[1] // 2, x.shape[2] // 2 + 1] = 0x8005 - 2**16  # an odd column
        case "negative zeros":
            x[..., : x.shape[-1] // 2] = -0.0
        case "small activations":
            x = (x.float() * 2e-5).to(x.dtype)
        case _:
            assert payload == "ordinary", payload
    return x


def flush(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What ringfence's pass puts in front of a fused op, alone."""
    from ringfence.compile_passes.clean import clean_payload
    from ringfence.compile_passes.fuse import SITE

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 2, dtype=dtype)
    op = graph.call_function(torch.ops.aten.clone.default, (x,))
    op.meta[SITE] = 0
    graph.output(op)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    clean_payload(module, {0})
    return module
