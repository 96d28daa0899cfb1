"""Process groups, by the names that graphs carry."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .errors import GroupError


@dataclass(frozen=True)
class Group:
    """``backend`` is what serves the tensors' device: "gloo", "nccl", "fake", ..."""

    name: str
    backend: str
    size: int
    rank: int


def describe_group(name: str, device: torch.device) -> Group:
    """The group with this name. Raises :class:`GroupError` where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            f"the model all-reduces over group '{name}', and no process group is initialised; "
            "call torch.distributed.init_process_group before compiling"
        )
    try:
        group = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except RuntimeError as error:
        raise GroupError(
            f"the model all-reduces over group '{name}', which does not exist in this process; "
            f"groups are named by ProcessGroup.group_name, and the default one is '{_default_group_name()}'"
        ) from error
    if type(group) is not dist.ProcessGroup:  # a group of its own class serves every device
        return Group(name, group.name(), group.size(), group.rank())
    try:
        backend = group._get_backend(device).name()
    except RuntimeError as error:
        raise GroupError(
            f"group '{name}' has no backend for {device.type} tensors; create it with one for that device"
        ) from error
    return Group(name, backend, group.size(), group.rank())


def group_exists(name: str) -> bool:
    """Whether this process has a process group of that name."""
    try:
        distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except RuntimeError:
        return False
    return True


def ranks_of(name: str) -> tuple[int, ...]:
    """The global ranks of a group that exists."""
    group = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return tuple(dist.get_process_group_ranks(group))


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


def _default_group_name() -> str:
    world = dist.group.WORLD
    return str(world.group_name) if world is not None else ""
