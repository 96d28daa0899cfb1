"""Process groups, by the names that graphs carry.

A name is torch's own, an alias that was registered (an engine's ``"tp:0"``), or one that is made of global ranks
(``"ranks:0,1"``). torch numbers its groups as a process makes them, so its names mean nothing to another process;
aliases do, and stay in the graph. They live in torch's registry of names, where its functional collectives look too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import GroupError, OptionsError
from .spelling import WORLD, group_word

T = TypeVar("T")
#: A key of a mapping by group.
AnyGroup = TypeVar("AnyGroup", bound=dist.ProcessGroup | str)

#: Backends whose collectives are carried out by the host, or by nobody.
HOST_BACKENDS = frozenset({"gloo", "mpi", "ucc", "fake", "threaded"})

#: What backends of torch that are NCCL call themselves. The others came with torch 2.14; with TORCH_DIST_USE_NCCL2=1
#: "nccl" makes one of them.
NCCL_BACKENDS = frozenset({"nccl", "nccl2", "nccl-lazy"})

#: Groups whose ranks are not processes of their own.
_WITHOUT_PEERS = frozenset({"fake", "threaded"})

_OF_RANKS = "ranks:"


@dataclass(frozen=True)
class Group:
    """``backend`` is what serves the tensors' device: "gloo", "nccl" (whatever torch calls it), "fake", ..."""

    name: str
    backend: str
    size: int
    rank: int


def describe_group(name: str, device: torch.device) -> Group:
    """The group with this name. Raises :class:`GroupError` where there is none."""
    group = resolve_group(name, device)
    if type(group) is not dist.ProcessGroup:  # a group of its own class serves every device
        return Group(name, group.name(), group.size(), group.rank())
    try:
        backend = group._get_backend(device).name()
    except RuntimeError as error:
        raise GroupError(
            f"group '{group_word(name)}' has no backend for {device.type} tensors; create it with one for that device"
        ) from error
    return Group(name, "nccl" if backend in NCCL_BACKENDS else backend, group.size(), group.rank())


def resolve_group(name: str, device: torch.device | None = None) -> dist.ProcessGroup:
    """The process group of that name; one that is named by its ranks is looked for, one for ``device`` first.

    Raises :class:`GroupError` where this process has none.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            f"group '{group_word(name)}' is asked for, and no process group is initialised: call "
            "torch.distributed.init_process_group before"
        )
    found = _find(name)
    if found is not None:
        return found
    if name == WORLD and dist.group.WORLD is not None:
        _register(name, dist.group.WORLD)
        return dist.group.WORLD
    if ranks := _ranks_in(name):
        alike = [group for group in _groups() if dist.get_process_group_ranks(group) == ranks]
        if not alike:
            raise GroupError(
                f"an all-reduce names the ranks {ranks}, and no process group has these; make one on every rank: "
                f"torch.distributed.new_group({ranks})"
            )
        group = next((g for g in alike if device is not None and _serves(g, device)), alike[0])
        _register(name, group)
        return group
    raise GroupError(
        f"group '{name}' does not exist in this process; groups are named by ProcessGroup.group_name, and the default "
        f"one is '{WORLD}' too. A name of an engine's own is registered in each process: "
        f"ringfence.register_group('{name}', process_group)"
    )


def name_of_group(group: dist.ProcessGroup | str | None) -> str:
    """What a call gives as its group, for a process group or a name; None is the default group.

    May be traced. Raises :class:`GroupError` for anything else.
    """
    if group is None:
        return WORLD
    if isinstance(group, str):
        return group
    if not isinstance(group, dist.ProcessGroup):
        raise GroupError(f"{group!r} is no process group, nor the name of one (a rank outside of a group has none)")
    return str(group.group_name)


def device_of_group(name: str) -> torch.device:
    """The current CUDA device where the group serves one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if _serves(resolve_group(name, device), device):
            return device
    return torch.device("cpu")


def device_for(name: str, asked: torch.device | str | None) -> torch.device:
    """The device that a caller named, or :func:`device_of_group`.

    Raises :class:`OptionsError` for one that this process does not have.
    """
    if asked is None:
        return device_of_group(name)
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise OptionsError(f"device={asked!r} is no device of torch's: 'cpu', 'cuda', 'cuda:1'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionsError(f"device={str(asked)!r}, and this process sees {torch.cuda.device_count()} CUDA devices")
    return device


def is_registered(name: str) -> bool:
    """Whether torch knows a group by that name: not by its ranks, nor "world", before somebody asked for it."""
    return _find(name) is not None


def group_exists(name: str) -> bool:
    """Whether this process has a process group of that name."""
    return not isinstance(group_or_name(name), str)


def register_group(name: str, process_group: dist.ProcessGroup | str) -> None:
    """Let ``name`` stand for a process group of this process, as an engine's ``"tp:0"`` does.

    The name, and not torch's own, is what graphs carry from then on; so every process that runs such a graph registers
    it, before its first call. It may differ between ranks which group it stands for. It ends with the group, or with
    torch.distributed. Registering it again for the same group does nothing.

    Raises :class:`GroupError` for what is no process group of this process, and where the name stands for another.
    """
    if not isinstance(name, str) or not name:
        raise GroupError(f"a group is registered by a name, and {name!r} is none")
    group = group_or_name(process_group) if isinstance(process_group, str) else process_group
    if isinstance(group, str | None) or not (dist.is_available() and dist.is_initialized()) or group not in _groups():
        raise GroupError(
            f"{process_group!r} is no process group of this process, nor the name of one; pass what "
            "torch.distributed.new_group returned on a rank of the group (a rank outside registers nothing)"
        )
    known = group_or_name(name)
    if known is group:
        return
    if not isinstance(known, str):
        raise GroupError(
            f"'{name}' stands for the group of ranks {dist.get_process_group_ranks(known)} "
            f"(torch calls it '{known.group_name}') already; register another name for that of ranks "
            f"{dist.get_process_group_ranks(group)}"
        )
    _register(name, group)


def _register(name: str, group: dist.ProcessGroup) -> None:
    distributed_c10d._unregister_process_group(name)  # type: ignore[attr-defined, arg-type]  # what an earlier group left behind
    distributed_c10d._register_process_group(name, group)  # type: ignore[attr-defined, arg-type]


def name_of_ranks(ranks: Sequence[int]) -> str:
    """What graphs call the group of these global ranks, where an engine's op lists them: the same in every process."""
    return _OF_RANKS + ",".join(map(str, sorted(ranks)))


def group_or_name(name: str) -> dist.ProcessGroup | str:
    """What tells a group from others, whatever it is called: itself; its name where this process has no such group.

    A graph may be read elsewhere than where it runs, and names are all that is known of its groups then.
    """
    try:
        return resolve_group(name)
    except GroupError:
        return name


def _ranks_in(name: str) -> list[int]:
    """The ranks of a name that :func:`name_of_ranks` made; empty for any other."""
    parts = name.removeprefix(_OF_RANKS).split(",")
    return [int(rank) for rank in parts] if name.startswith(_OF_RANKS) and all(map(str.isdecimal, parts)) else []


def same_groups(names: Iterable[str], among: Iterable[str]) -> set[str]:
    """Which of ``names`` stand for a process group that one of ``among`` stands for too, be it by another name."""
    wanted = set(map(group_or_name, among))
    return {name for name in names if group_or_name(name) in wanted}


class ByGroup(Generic[T]):
    """Values that a user gives by group: each is found by any name of its group."""

    def __init__(self, given: Mapping[AnyGroup, T]) -> None:
        """Raises :class:`GroupError` for a key that is no group, and where two keys say two things of one."""
        self._values: dict[dist.ProcessGroup | str, T] = {}
        for key, value in given.items():
            group = group_or_name(name_of_group(key))
            if self._values.setdefault(group, value) != value:
                raise GroupError(f"one group is given as {[*given]}, with {self._values[group]!r} and {value!r}")

    def get(self, name: str, default: T) -> T:
        return self._values.get(group_or_name(name), default)


def with_peers(groups: Iterable[Group]) -> list[tuple[Group, int]]:
    """Those with somebody to talk to, in an order that all ranks have; each with how many before it are that group by
    another name."""
    real = sorted((g for g in groups if g.size > 1 and g.backend not in _WITHOUT_PEERS), key=lambda g: g.name)
    same = [group_or_name(g.name) for g in real]
    return [(group, same[:i].count(same[i])) for i, group in enumerate(real)]


def ranks_of(name: str) -> tuple[int, ...]:
    """The global ranks of a group that exists."""
    return tuple(dist.get_process_group_ranks(resolve_group(name)))


def _find(name: str) -> dist.ProcessGroup | None:
    """The group of that name. torch keeps an alias longer than the group that was destroyed."""
    try:
        group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except RuntimeError:
        return None
    return group if group.group_name == name or group in _groups() else None


def _groups() -> Collection[dist.ProcessGroup]:
    """The process groups that this rank is in, in the order in which they were made."""
    return distributed_c10d._world.pg_map.keys()


def _serves(group: dist.ProcessGroup, device: torch.device) -> bool:
    try:
        group._get_backend(device)
    except RuntimeError:
        return False
    return True


def nccl_version() -> str | None:
    """The NCCL that this process uses, as "2.28.9"; None where torch has none.

    torch tells the one that it was built with; a newer one may have been installed beside it, as V#52504 advises.
    """
    if not dist.is_available() or not dist.is_nccl_available():
        return None
    code = ctypes.c_int()
    try:  # the library that torch has loaded, and no other
        failed = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY).ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):  # built into torch
        failed = True
    if failed:
        return ".".join(map(str, torch.cuda.nccl.version()[:3]))
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"
