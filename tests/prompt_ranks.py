"""Two ranks whose eager prompts are watched: to the second, rank 1 does not come until rank 0 has said so."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor


class Caching(nn.Module):
    """Its parameter is only there to say which ranks share the model."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (ranks,))
        self.weight = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))

    def forward(self, ids: Tensor, past_key_values: Any = None) -> Tensor:
        for layer in past_key_values.layers:
            layer.is_initialized = True
        x = ids.float()
        dist.all_reduce(x)
        return x


def prompt_of(model: Any) -> None:
    cache = SimpleNamespace(layers=[SimpleNamespace(is_compileable=True, is_initialized=False)])
    assert model(torch.arange(8)[None], past_key_values=cache).sum() == 2 * 28


def watched_by_one(rank: int, folder: str) -> dict[str, Any]:
    """Rank 0 alone asks for a journal; then for a watchdog too."""
    import ringfence

    own: dict[str, Any] = {"journal_dir": folder} if rank == 0 else {}
    model = ringfence.compile(Caching(2), piece_compiler="eager", agree_seconds=180, **own)
    for _ in range(2):
        prompt_of(model)
    steps = model.ringfence.supervisor.journal.to_dict("")["steps"]
    dist.barrier()
    model.ringfence.close()
    own |= {"on_hang": "report"} if rank == 0 else {}
    model = ringfence.compile(Caching(2), piece_compiler="eager", agree_seconds=180, **own)
    try:
        prompt_of(model)
    except ringfence.RankMismatch as error:
        said = str(error)
    model.ringfence.close()
    return {"steps": [(step["sizes"], step["how"]) for step in steps], "said": said}


def prompts(rank: int, folder: str) -> dict[str, Any]:
    """What the journals say while rank 1 stays away, and the steps of this rank."""
    import ringfence
    from ringfence.runtime.watch.journals import merge, read_folder

    options: dict[str, Any] = {"piece_compiler": "eager", "on_hang": "report", "journal_dir": folder}
    model = ringfence.compile(Caching(2), step_seconds=0.5, **options)

    prompt_of(model)
    said = ""
    if rank == 1:
        until = time.monotonic() + 120
        while "did not come" not in said and time.monotonic() < until:
            time.sleep(0.1)
            said = merge(read_folder(Path(folder))).sentence if list(Path(folder).glob("journal-rank0*")) else ""
    prompt_of(model)
    steps = model.ringfence.supervisor.journal.to_dict("")["steps"]
    model.ringfence.close()
    return {"said": said, "steps": [(step["sizes"], step["how"]) for step in steps]}
