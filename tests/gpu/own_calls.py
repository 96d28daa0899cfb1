"""Ranks of ringfence's own kernels, on one GPU or several, and calls of theirs with what is right to the bit."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringfence.runtime.collectives import nvrtc
from ringfence.runtime.collectives.cuda_driver import Driver
from ringfence.runtime.collectives.epilogue import Epilogue, RmsNorm
from ringfence.runtime.collectives.forms import Form
from ringfence.runtime.collectives.ringfence import Functions, RankMemory, RingfenceKernels, buffer_bytes, create
from ringfence.runtime.hazards.situation import Strategy

EPS = 1e-6
ONE, TWO = Strategy.ONE_SHOT, Strategy.TWO_SHOT
SUM = Epilogue()
NORM = Epilogue(norm=RmsNorm(EPS))
BARE = Epilogue(norm=RmsNorm(EPS, has_weight=False))
FUSED = Epilogue(True, RmsNorm(EPS))
GEMMA = Epilogue(True, RmsNorm(EPS, 1.0))
FUSED_BARE = Epilogue(True, RmsNorm(EPS, has_weight=False))
EPILOGUES = {"sum": SUM, "norm": NORM, "bare": BARE, "fused": FUSED, "gemma": GEMMA, "fused bare": FUSED_BARE}
PAYLOADS = ("ordinary", "0x8005", "negative zero", "subnormal", "infinite", "nan")

#: Relative error of a norm: one rounding to the dtype, and float32 before it.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-19}
#: What outputs hold before a call: large numbers.
POISON = 0x7F007F00
#: Blocks of a rank's grid; fewer where there are eight: those of the next two calls wait beside them.
MOST_BLOCKS = 20
#: Until a kernel gives up, which no healthy one does.
SECONDS = 8.0


@dataclass(frozen=True)
class Case:
    """A call of all ranks. blocks: that share a token, None for the usual number."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    epilogue: str
    strategy: Strategy
    blocks: int | None = None
    payload: str = "ordinary"


class Ranks:
    """Emulated ranks with inboxes for calls of so many bytes. kernels, streams: by rank, of those that are here."""

    def __init__(self, world_size: int, tokens: int, row_bytes: int) -> None:
        self.world_size = world_size
        size = buffer_bytes(world_size, tokens, row_bytes)
        self.inboxes = [torch.zeros(2 * size, dtype=torch.uint8, device="cuda") for _ in range(world_size)]
        self.functions = Functions(Driver(), torch.cuda.get_device_capability())
        self.streams = {rank: torch.cuda.Stream() for rank in range(world_size)}
        addresses = [inbox.data_ptr() for inbox in self.inboxes]
        self.kernels = {}
        for rank, inbox in enumerate(addresses):
            others = [address for other, address in enumerate(addresses) if other != rank]
            memory = RankMemory.make(0, rank, inbox, others, size)
            memory.wait_for(SECONDS)
            self.kernels[rank] = RingfenceKernels(self.functions, memory)
        torch.cuda.synchronize()

    def load(self, calls: Sequence[tuple[Tensor, Case]]) -> float:
        """Compile and load what these calls need; the seconds it took."""
        began = time.monotonic()
        forms = {self.form(x, case) for x, case in calls}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda form: nvrtc.cubin(form.source, self.functions.capability), forms))
        for form in forms:
            self.functions.of(form)
        return time.monotonic() - began

    def form(self, x: Tensor, case: Case) -> Form:
        return next(iter(self.kernels.values())).form(x, EPILOGUES[case.epilogue], case.strategy, case.blocks)


class OneRank(Ranks):
    """This process's rank among others, on a GPU of its own. Every rank must call."""

    def __init__(self, rank: int, world_size: int, tokens: int, hidden: int) -> None:
        from ringfence.runtime.channel import open_channel

        self.world_size = world_size
        group = dist.group.WORLD
        assert group is not None
        channel = open_channel(group.group_name, seconds=60)
        self.kernels = {rank: create(channel, group, tokens, hidden, torch.bfloat16)}
        self.kernels[rank].wait_for(SECONDS)
        self.functions = self.kernels[rank]._functions
        self.streams = {rank: torch.cuda.Stream()}


class Call:
    """Inputs of all ranks, and what is right."""

    def __init__(self, case: Case, world_size: int, seed: int) -> None:
        self.case = case
        generator = torch.Generator("cuda").manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(case.dtype)

        self.inputs = [numbers(case.tokens, case.hidden) for _ in range(world_size)]
        self.residual, self.weight = numbers(case.tokens, case.hidden), numbers(case.hidden)
        for rank, x in enumerate(self.inputs):
            spoil(x, case.payload, rank)
        epilogue = EPILOGUES[case.epilogue]
        total = self.inputs[0].float()
        for x in self.inputs[1:]:
            total = total + x.float()
        self.out = total.to(case.dtype)
        if epilogue.residual:
            self.out = (self.out.float() + self.residual.float()).to(case.dtype)
        self.norm: Tensor | None = None
        if epilogue.norm is not None:
            wide = self.out.double()
            self.norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
            if epilogue.norm.has_weight:
                self.norm = self.norm * (self.weight.double() + epilogue.norm.weight_bias)

    def outputs(self) -> tuple[Tensor | None, Tensor]:
        return (None if self.norm is None else torch.full_like(self.out, 7.0), torch.full_like(self.out, 7.0))

    def launch(
        self, kernels: RingfenceKernels, rank: int, norm: Tensor | None, out: Tensor, most_blocks: int = MOST_BLOCKS
    ) -> None:
        """On the current stream."""
        case, epilogue = self.case, EPILOGUES[self.case.epilogue]
        weight = self.weight if epilogue.norm is not None and epilogue.norm.has_weight else None
        operands = (self.residual if epilogue.residual else None, weight)
        most_blocks = most_blocks if kernels.rank_memory.world_size < 8 else 8
        kernels.run(
            self.inputs[rank], epilogue, case.strategy, operands, norm, out, blocks=case.blocks, most_blocks=most_blocks
        )

    def wrong(self, norm: Tensor | None, out: Tensor) -> str | None:
        """The sum has to be right to the bit: it is rounded twice, as plain torch rounds it."""
        if not same(out, self.out):
            return f"out of {self.case} differs in {int((bits(out) != bits(self.out)).sum())} elements"
        if norm is None or self.norm is None:
            return None
        right = self.norm
        if not torch.equal(norm.isfinite(), right.to(norm.dtype).isfinite()):
            return f"norm of {self.case} is finite elsewhere"
        floor = torch.finfo(norm.dtype).smallest_normal
        error = ((norm.double() - right).abs() / (right.abs() + floor)).nan_to_num(0.0, 0.0, 0.0)
        worst = float(error.max())
        return f"norm of {self.case} is off by {worst:.3g}" if worst > _ROUNDING[norm.dtype] else None


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but that there are many NaNs."""
    nan = a.isnan() & b.isnan()
    return bool(((bits(a) == bits(b)) | nan).all())


def spoil(x: Tensor, payload: str, rank: int) -> None:
    """Put what a kernel could mistake for something else into a third of the columns, and a whole row of it."""
    special = {"infinite": float("inf"), "nan": float("nan"), "negative zero": -0.0}
    if payload == "0x8005":
        words = bits(x)
        words[:, ::3] = -32763 if x.element_size() == 2 else -(2**31) + 0x80058005 % 2**31
        words[-1] = words[-1, 0]
    elif payload == "subnormal":
        words = bits(x)
        words[:, ::3] = 5 + rank
        words[-1] = 3
    elif payload == "infinite":
        x[:, rank::7] = special[payload]
        x[-1, :] = special[payload] if rank == 0 else 1.0
    elif payload in special:
        x[:, ::3] = special[payload]
        x[-1] = special[payload]
