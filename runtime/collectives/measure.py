"""Measure a size table: up to which size each fused collective is worth using on this machine.

One process per GPU, under torchrun. The workspaces are made, tested and chosen as the product
makes them, only that nothing is too large for them. Multicast is never among the candidates.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..channel import DEFAULT_SECONDS, Channel, open_channel
from ..errors import CollectiveUnavailableError, OptionsError
from ..groups import Group, describe_group, nccl_version, resolve_group
from ..hazards.situation import Strategy
from . import table as collectives
from .epilogue import Epilogue, RmsNorm
from .flashinfer import FlashInfer, load
from .group_facts import facts_of_all
from .kernels import KernelCall
from .links import Topology
from .opt_outs import own_opt_outs
from .rank_facts import topology_of
from .ready import Wanted, prepare
from .size_table import MoeRow, SizeRow, write_table
from .workspace import Workspace, close_workspaces

SIZES = tuple(1 << power for power in range(13, 26))

#: What is measured: no other transport, since that of multicast must not be tried uninvited.
TRANSPORT = "peer"
CANDIDATES = tuple(one.name for one in collectives.ALL if one.transport == TRANSPORT)

#: Of a group on a device, for hidden sizes of a dtype, with the source of its rows: rows, and what to print.
MeasureMoe = Callable[[Group, torch.device, Sequence[int], torch.dtype, str], tuple[tuple[MoeRow, ...], str]]

_CALLS, _REPEATS = 20, 15
_EPS = 1e-6
_EPILOGUE, _SUM = Epilogue(residual=True, norm=RmsNorm(_EPS)), Epilogue()
#: The logarithm of "faster by any factor": where one of two ways does not exist.
_FAR = 20.0


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; infinite where there is none of that kind.

    bits: digests of what one-shot made of the first row, which is the same for each size, from all ranks and runs.
    """

    hidden: int
    size: int
    nccl: float
    nccl_all_reduce: float
    one_shot: float = math.inf
    two_shot: float = math.inf
    all_reduce_one_shot: float = math.inf
    all_reduce_two_shot: float = math.inf
    bits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Measured:
    """rows: of the collectives that were measured. missing: why another was not."""

    rows: tuple[SizeRow, ...]
    timings: Mapping[str, Sequence[Timing]]
    missing: Mapping[str, str]


# -- from timings to a row -------------------------------------------------------------


def worth_up_to(times: Iterable[tuple[int, float, float]]) -> int:
    """Up to which size to take ours rather than theirs, given ``(size, ours, theirs)``; 0 is never.

    Where ours wins up to some size, that size. Where noise has them alternate, what gains most over all sizes.
    """
    best, most, gain = 0, 0.0, 0.0
    gains: dict[int, float] = {}
    for size, ours, theirs in times:
        if math.isfinite(ours) or math.isfinite(theirs):
            log = math.log(theirs / ours) if math.isfinite(ours) and math.isfinite(theirs) else _FAR
            gains[size] = gains.get(size, 0.0) + (log if math.isfinite(ours) else -_FAR)
    for size in sorted(gains):
        gain += gains[size]
        if gain > most:
            best, most = size, gain
    return best


def row_of(
    collective: str,
    capability: tuple[int, int],
    world_size: int,
    timings: Sequence[Timing],
    source: str,
    topology: Topology = Topology.NVSWITCH,
) -> SizeRow:
    """What these timings say. Two-shot begins where one-shot ends, so a size has one strategy, also without a norm."""
    switch = worth_up_to((t.size, t.one_shot, t.two_shot) for t in timings)
    fused = worth_up_to((t.size, t.one_shot if t.size <= switch else t.two_shot, t.nccl) for t in timings)
    all_reduce = worth_up_to(
        (t.size, t.all_reduce_one_shot if t.size <= switch else t.all_reduce_two_shot, t.nccl_all_reduce)
        for t in timings
    )
    one_shot = min(switch, fused)
    bits = {t.hidden: frozenset[str]() for t in timings}
    for t in timings:
        if t.size <= one_shot:
            bits[t.hidden] |= t.bits
    bitwise = all(len(each) == 1 for each in bits.values())
    return SizeRow(
        collective,
        TRANSPORT,
        capability,
        world_size,
        one_shot,
        fused,
        min(all_reduce, fused),
        source,
        bitwise,
        topology,
    )


# -- timing ----------------------------------------------------------------------------


def measure(
    group: Group,
    device: torch.device,
    capability: tuple[int, int],
    sizes: Sequence[int],
    hiddens: Sequence[int],
    dtype: torch.dtype,
    source: str,
    *,
    seconds: float = DEFAULT_SECONDS,
) -> Measured:
    """Measure every candidate that can be had, for tensors of these bytes and hidden sizes. Every rank must call.

    A size that is no whole number of rows is rounded down; at least one holds a row of each hidden size.
    """
    channel = open_channel(group.name, seconds=seconds)
    topology = topology_of(facts_of_all(channel, device))
    timings: dict[str, list[Timing]] = {collective: [] for collective in CANDIDATES}
    missing: dict[str, str] = {}
    for hidden in hiddens:
        row_bytes = hidden * dtype.itemsize
        tokens = tuple(sorted({size // row_bytes for size in sizes} - {0}))
        ready: dict[str, Workspace] = {}
        for collective in CANDIDATES:
            limit = tokens[-1] * row_bytes
            row = SizeRow(
                collective, TRANSPORT, capability, group.size, limit, limit, limit, "to be measured", topology=topology
            )
            wanted = Wanted(str(collective), TRANSPORT, hidden, dtype, sizes=tokens, table=(row,))
            try:
                chosen = prepare(channel, group, device, wanted)
            except CollectiveUnavailableError as error:
                missing[collective] = str(error)
                continue
            if chosen.workspace is None or chosen.capture_failure:
                missing[collective] = chosen.capture_failure or "it has no workspace"
            else:
                ready[collective] = chosen.workspace
        for n in tokens if ready else ():
            for collective, timing in _timings(group, channel, ready, n, hidden, dtype, device).items():
                timings[collective].append(timing)
        ready.clear()
        channel.barrier("bench: every rank is done with the workspaces")
        close_workspaces(group.name)
    measured = {c: tuple(timings[c]) for c in CANDIDATES if c not in missing}
    rows = tuple(row_of(c, capability, group.size, times, source, topology) for c, times in measured.items())
    return Measured(rows, measured, missing)


def _timings(
    group: Group,
    channel: Channel,
    workspaces: Mapping[str, Workspace],
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Timing]:
    """One size. Every way is timed in turn, on the same machine in the same state."""
    process_group = resolve_group(group.name, device)
    x, residual = _drawn(tokens, hidden, dtype, device, channel.rank), _drawn(tokens, hidden, dtype, device, -1)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    norm, out = torch.empty_like(x), torch.empty_like(x)
    zeros = torch.zeros_like(x)  # summed in place, over and over

    def nccl() -> None:
        dist.all_reduce(zeros, group=process_group)
        torch.add(zeros, residual, out=out)
        F.rms_norm(out, weight.shape, weight, _EPS)

    def digest() -> str:
        return hashlib.sha256(bytes(torch.stack((norm[0], out[0])).view(torch.uint8).flatten().tolist())).hexdigest()

    base = (
        slowest_us(nccl, channel, device),
        slowest_us(partial(dist.all_reduce, zeros, group=process_group), channel, device),
    )
    found = {}
    for collective, workspace in workspaces.items():
        kernels, times, bits = workspace.kernels, {}, set()
        for strategy in kernels.strategies:
            call = KernelCall(tokens, hidden, dtype, group.size, strategy)
            if workspace.implementation.unmet(call) or not kernels.holds(call):
                continue
            fused = partial(kernels.run, x, _EPILOGUE, strategy, (residual, weight), norm, out)
            name = {Strategy.ONE_SHOT: "one_shot", Strategy.TWO_SHOT: "two_shot"}[strategy]
            fused()
            eager = digest()
            times[name] = slowest_us(fused, channel, device)
            if strategy is Strategy.ONE_SHOT:
                bits = {each for pair in channel.exchange("bench: bits", (eager, digest())) for each in pair}
            times[f"all_reduce_{name}"] = slowest_us(
                partial(kernels.run, x, _SUM, strategy, None, None, out), channel, device
            )
        found[collective] = Timing(hidden, tokens * hidden * dtype.itemsize, *base, **times, bits=frozenset(bits))
    return found


def _drawn(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Numbers whose first row is the same for every token count."""
    draw = torch.Generator(device).manual_seed(1000 + seed)
    first = torch.randn(1, hidden, generator=draw, device=device)
    return torch.cat([first, torch.randn(tokens - 1, hidden, generator=draw, device=device)]).to(dtype)


def slowest_us(call: Callable[[], object], channel: Channel, device: torch.device) -> float:
    """The median over the repeats, each as slow as the slowest rank had it."""
    samples = _on_cuda(call, channel) if device.type == "cuda" else _on_cpu(call)
    slowest = [max(each) for each in zip(*channel.exchange("bench: times", samples), strict=True)]
    return float(statistics.median(slowest))


def _on_cuda(call: Callable[[], object], channel: Channel) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    channel.barrier("bench: warm")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog queries events meanwhile
        for _ in range(_CALLS):
            call()
    channel.barrier("bench: captured")
    samples = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # brings the ranks' streams in line while the host runs ahead
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    graph.reset()  # a process group that is destroyed waits for graphs that hold its calls
    return samples


def _on_cpu(call: Callable[[], object]) -> list[float]:
    call()
    samples = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


# -- the command -----------------------------------------------------------------------


def bench(
    path: Path, sizes: Sequence[int], hiddens: Sequence[int], dtype: torch.dtype, moe: MeasureMoe | None = None
) -> str:
    """Measure and write a table; what to print, empty on all ranks but the first. Raises :class:`OptionsError`.

    moe: measures dispatch and combine too.
    """
    rank, world_size, local_rank = (int(os.environ.get(n, "-1")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank < 0 or world_size < 2 or local_rank < 0:
        raise OptionsError(
            "bench measures two or more ranks; start it with "
            "torchrun --nproc-per-node N -m ringfence bench --write-table FILE"
        )
    if (off := own_opt_outs()) and not any(each.startswith("NCCL_NVLS_ENABLE=") for each in off):
        raise OptionsError(
            f"{off[0]} forbids NVLink multicast, and NCCL, which bench starts, would use it; set NCCL_NVLS_ENABLE=0 too"
        )
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= devices:
        raise OptionsError(
            f"bench measures CUDA devices, one for each rank; this process sees {devices} and is local rank "
            f"{local_rank}; see `ringfence doctor`"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise OptionsError(f"'{path}' cannot be written: it is a folder, or in a folder that does not exist")
    if max(sizes) < (row := max(hiddens) * dtype.itemsize):
        raise OptionsError(f"no size holds a row of {max(hiddens)} {dtype}, {row} bytes; give a larger one")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    world = dist.group.WORLD
    assert world is not None
    group = describe_group(world.group_name, device)
    with torch.no_grad():
        capability = torch.cuda.get_device_capability(device)
        source = _source(device, world_size, hiddens, dtype)
        measured = measure(group, device, capability, sizes, hiddens, dtype, source)
        moe_rows, moe_text = moe(group, device, hiddens, dtype, source) if moe is not None else ((), "")
    dist.destroy_process_group()  # not after an error: it would wait for a kernel that spins
    if not measured.rows:
        raise CollectiveUnavailableError("nothing to measure: " + "; ".join(measured.missing.values()))
    if rank:
        return ""
    try:
        write_table(path, measured.rows, moe_rows)
    except OSError as error:
        raise OptionsError(f"'{path}' cannot be written: {error}") from error
    return f"{as_text(measured)}{moe_text}\n\nwritten to {path}; use it with Backend(size_table='{path}')"


def _source(device: torch.device, world_size: int, hiddens: Sequence[int], dtype: torch.dtype) -> str:
    package = load()
    flashinfer = package.version if isinstance(package, FlashInfer) else "not usable"
    return (
        f"ringfence bench, {datetime.date.today().isoformat()}: {world_size} x {torch.cuda.get_device_name(device)}, "
        f"torch {torch.__version__}, NCCL {nccl_version()}, FlashInfer {flashinfer}, "
        f"hidden {', '.join(map(str, hiddens))}, {str(dtype).removeprefix('torch.')}"
    )


def as_text(measured: Measured) -> str:
    """Microseconds for each size, and what follows."""
    from tabulate import tabulate

    lines: dict[tuple[int, int], list[str]] = {}
    headers = ["hidden", "KiB", "NCCL, add, norm", "NCCL"]
    for collective, timings in measured.timings.items():
        headers += [f"{collective} {kind}" for kind in ("one-shot", "two-shot", "all-reduce")]
        for t in timings:
            line = lines.setdefault((t.hidden, t.size), [f"{t.nccl:.1f}", f"{t.nccl_all_reduce:.1f}"])
            alone = min(t.all_reduce_one_shot, t.all_reduce_two_shot)
            line += [f"{us:.1f}" if math.isfinite(us) else "-" for us in (t.one_shot, t.two_shot, alone)]
    table = [[str(hidden), f"{size / 1024:g}", *line] for (hidden, size), line in sorted(lines.items())]
    text = ["us per call", tabulate(table, headers, disable_numparse=True, stralign="right"), ""]
    for row in measured.rows:
        limits = (("one-shot", row.one_shot), ("fused", row.fused), ("all-reduce", row.all_reduce))
        sizes = ", ".join(f"{what} up to {size / 1024:g} KiB" for what, size in limits)
        bitwise = "the same bits" if row.bitwise else "not the same bits"
        text.append(f"{row.collective}/{row.transport}: {sizes}; {bitwise} at every token count")
    text += [f"{collective} was not measured: {why}" for collective, why in measured.missing.items()]
    return "\n".join(text)
