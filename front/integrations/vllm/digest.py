"""What a graph that the pass has changed rests on, as one word: for vLLM's and Inductor's caches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ...installed import versions
from .request import Request


def digest_of(asked: Request, device: torch.device | None = None) -> str:
    """Sources, options, releases, the size table that was given; collective and device, where a worker knows them."""
    parts = {
        "mode": asked.mode,
        "up_to": asked.up_to,
        "prepared": asked.prepared,
        "options": {name: asked.options[name] for name in sorted(asked.options)},
        "versions": versions(),
        "table": _text_of(asked.options.get("size_table")),
        "device": _device(device),
    }
    found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for path, text in sources():
        found.update(f"{path}\0".encode() + text + b"\0")
    return found.hexdigest()


def sources() -> list[tuple[str, bytes]]:
    """Name and text of each source file that counts, where they are installed."""
    from ... import compile_passes, integrations
    from ...runtime import collectives

    found = []
    for package in (compile_passes, integrations, collectives):
        (folder,) = map(Path, list(package.__path__)[:1])
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                found.append((f"{package.__name__}/{path.relative_to(folder).as_posix()}", path.read_bytes()))
    return found


def _text_of(path: object) -> str | None:
    return Path(str(path)).read_text() if path is not None else None


def _device(device: torch.device | None) -> str | None:
    if device is None or device.type != "cuda":
        return device.type if device is not None else None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
