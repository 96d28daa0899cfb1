"""What processes leave on GPUs: memory that is still taken, and processes that nvidia-smi still lists."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from support import HARD_END

#: Less is the driver's own coming and going.
_MEBIBYTES = 64


@dataclass(frozen=True)
class Used:
    """Of some GPUs: mebibytes of memory, by device, and who computes there as far as this container may see."""

    memory: Mapping[int, int]
    processes: frozenset[str] = frozenset()

    def beyond(self, before: Used) -> str:
        """What is used now and was not before; empty where nothing is."""
        more = {device: now - before.memory[device] for device, now in self.memory.items()}
        said = [f"{n} MiB of device {device}" for device, n in more.items() if n > _MEBIBYTES]
        return "; ".join([*said, *(f"process {line}" for line in sorted(self.processes - before.processes))])


def smi(*arguments: str) -> str:
    """What nvidia-smi prints; a GPU that does not answer must not hold a soak up for ever."""
    command = ["nvidia-smi", "--format=csv,noheader,nounits", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HARD_END, check=True).stdout


def used(devices: Sequence[int], ask: Callable[..., str] = smi) -> Used:
    """By CUDA's numbers of the devices; makes no context on them."""
    index = torch.cuda._get_nvml_device_index  # type: ignore[attr-defined]
    which = "--id=" + ",".join(str(index(device)) for device in devices)
    memory = {d: int(line) for d, line in zip(devices, ask("--query-gpu=memory.used", which).split(), strict=True)}
    processes = ask("--query-compute-apps=gpu_uuid,pid", which).splitlines()
    return Used(memory, frozenset(line.strip() for line in processes if line.strip()))


def left_behind(before: Used, ask: Callable[..., str] = smi, seconds: float = 5.0) -> str:
    """What is still there that was not ``before``; a driver has some seconds to give back what an ended process had."""
    until = time.monotonic() + seconds
    while (left := used(tuple(before.memory), ask).beyond(before)) and time.monotonic() < until:
        time.sleep(0.2)
    return left
