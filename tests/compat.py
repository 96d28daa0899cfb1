"""`make compat`: ringfence with other releases of torch, FlashInfer and transformers than those that are pinned.

    .venv/bin/python tests/compat.py [--only torch==2.14.1] [--write]

Each release is installed below ``.compat/``, without what it depends on, and laid over the pinned environment. For
each pair: ringfence is imported; the real FlashInfer's Python side is held against what ringfence calls
(tests/runtime/test_flashinfer_real.py); a small model goes through ``Backend`` with simulated captures on a gloo rank
(this file, ``smoke``); Hugging Face's Llama does, split over two (examples/demo.py). ``--write`` puts the table
into docs/support.md. Answers are kept in ``.compat/answers.json`` with their day, so that ``--only`` runs some pairs
and the table still has all. What pip cannot install here is said in the table. 12 GB and half an hour.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".compat"
KEPT = FOLDER / "answers.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- make compat: what follows is written by it -->", "<!-- make compat: end -->"

TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
FLASHINFER = ("0.6.18", "0.6.18.post1", "0.7.0.post1", "0.7.1", "0.7.2.post1")
TRANSFORMERS = ("5.17.0", "5.24.0")
PACKAGES = {"torch": TORCH, "flashinfer-python": FLASHINFER, "transformers": TRANSFORMERS}
#: torch's libraries for CUDA, without which its wheels for CUDA do not load, come with this one and serve the others.
WITH_LIBRARIES = "2.14.1"
SECONDS = 600


@dataclass(frozen=True)
class Layer:
    """A release, and the folder that is laid over the pinned environment; None is that environment's own.

    missing: why it is not there.
    """

    package: str
    version: str
    folder: Path | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a check came to: "ok", or the line that says why not. seconds: how long it took, 0 for what is not there."""

    said: str
    seconds: float
    day: str = ""


def layer(package: str, version: str) -> Layer:
    """Installed, unless it is there."""
    if importlib.metadata.version(package).partition("+")[0] == version:
        return Layer(package, version)
    folder = FOLDER / f"{package.partition('-')[0]}-{version}"
    if not folder.exists():
        alone = [] if (package, version) == ("torch", WITH_LIBRARIES) else ["--no-deps"]
        into = folder.with_name(f"{folder.name}.partial")
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
            str(into),
        ]
        done = subprocess.run([*install, *alone, f"{package}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            told = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
            said = [line.removeprefix("ERROR: ") for line in told if line.startswith("ERROR: ")][:1] or ["pip failed"]
            limits = [line for line in told if "(constraint)" in line]
            return Layer(package, version, missing=" ".join([*said, *limits]))
        into.rename(folder)
    return Layer(package, version, folder)


def environment(layers: Sequence[Layer]) -> dict[str, str]:
    """With the layers first, and libraries behind them where a torch needs some."""
    folders = [str(one.folder) for one in layers if one.folder is not None]
    if any(one.package == "torch" and one.folder is not None for one in layers):
        folders.append(str(FOLDER / f"torch-{WITH_LIBRARIES}"))
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(folders)}


def run(layers: Sequence[Layer], *arguments: str) -> Answer:
    """A child of its own, with a hard end."""
    missing = [one.missing for one in layers if one.missing is not None]
    if missing:
        return Answer(missing[0], 0.0)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(layers),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(f"not done in {SECONDS} s", SECONDS)
    seconds = time.monotonic() - began
    if done.returncode == 0:
        return Answer("ok", seconds)
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"ended with {done.returncode}"]
    told = [
        line for line in lines if line.startswith(("FAILED", "ERROR", "E  ", "demo:")) or "Error: " in line
    ] or lines
    return Answer(" ".join(told[-1].split())[:160], seconds)


def contract(torch: Layer, flashinfer: Layer) -> Answer:
    quiet = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider")
    return run((flashinfer, torch), "-m", "pytest", *quiet, "tests/runtime/test_flashinfer_real.py")


def imports(torch: Layer, smoke: Future[Answer]) -> Answer:
    """By itself only where the small model failed, to tell why."""
    done = smoke.result()
    return done if done.said == "ok" else run((torch,), "-c", "import ringfence; ringfence.Backend")


def smoke() -> None:
    """A model with two sites, in every dtype, captured and replayed; run in a child, on a gloo rank."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    import ringfence
    from support import TOLERANCE, relative_error

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(2):
            y = x @ m
            dist.all_reduce(y)
            r = r + y
            x = F.rms_norm(r, (r.shape[-1],), w, 1e-6)
        return x, r

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch._dynamo.reset()
        backend = ringfence.Backend(capture_sizes=[1, 4], graphs="simulated", piece_compiler="eager")
        compiled = torch.compile(model, backend=backend)
        for tokens in (4, 4, 3, 1, 4, 1):
            drawn = (torch.randn(tokens, 64), torch.randn(tokens, 64), torch.rand(64) + 0.5, torch.randn(64, 64) / 8)
            given = [one.to(dtype) for one in drawn]
            with torch.no_grad():
                ours, wanted = compiled(*given), model(*given)
            worst = max(relative_error(a, b) for a, b in zip(ours, wanted, strict=True))
            assert worst <= 4 * TOLERANCE[dtype], (dtype, tokens, worst)
        for report in backend.reports:
            ringfence.assert_fused(report, count=2)
        assert any(not piece.island for piece in backend.reports[0].pieces)
    dist.destroy_process_group()


def answers(only: Sequence[str]) -> dict[str, dict[str, Answer]]:
    """Of all pairs that ``only`` leaves, by torch's release and check; and those that were kept of the others."""
    chosen = {p: [v for v in versions if not _other(p, v, only)] for p, versions in PACKAGES.items()}
    layers = {p: [layer(p, version) for version in versions] for p, versions in chosen.items()}
    today = str(datetime.date.today())
    with ThreadPoolExecutor(2) as pool:
        checks = {}
        for torch in layers["torch"]:
            checks[torch.version, "smoke"] = pool.submit(run, (torch,), str(Path(__file__)), "smoke")
            checks[torch.version, "import"] = pool.submit(imports, torch, checks[torch.version, "smoke"])
            for other in layers["flashinfer-python"]:
                checks[torch.version, f"FlashInfer {other.version}"] = pool.submit(contract, torch, other)
            for other in layers["transformers"]:
                ran = pool.submit(run, (other, torch), "examples/demo.py")
                checks[torch.version, f"transformers {other.version}"] = ran
        for (release, check), ran in checks.items():
            answer = replace(ran.result(), day=today)
            print(f"torch {release}, {check}: {answer.said}, {answer.seconds:.0f} s", flush=True)
            kept = _read()  # another run may have written meanwhile
            kept.setdefault(release, {})[check] = answer
            KEPT.write_text(json.dumps({r: {c: astuple(a) for c, a in row.items()} for r, row in kept.items()}))
    return _read()


def _read() -> dict[str, dict[str, Answer]]:
    if not KEPT.exists():
        return {}
    return {r: {c: Answer(*a) for c, a in row.items()} for r, row in json.loads(KEPT.read_text()).items()}


def table(found: Mapping[str, Mapping[str, Answer]]) -> str:
    """As Markdown."""
    names = ["import", "smoke", *(f"FlashInfer {v}" for v in FLASHINFER), *(f"transformers {v}" for v in TRANSFORMERS)]
    notes: list[str] = []
    rows = []
    for release in TORCH:
        row = found.get(release, {})
        cells = []
        for name in names:
            said = row[name].said if name in row else "not run"
            if said not in ("ok", "not run"):
                if said not in notes:
                    notes.append(said)
                said = f"{'no' if row[name].seconds else 'not tried'} [{notes.index(said) + 1}]"
            cells.append(said)
        rows.append([release, *cells, max((answer.day for answer in row.values()), default="")])
    text = tabulate(rows, ["torch", *names, "day"], tablefmt="github", disable_numparse=True)
    said = "\n".join(f"[{number}] {note}  " for number, note in enumerate(notes, 1))
    return f"{text}\n\n{said}".rstrip()


def _other(package: str, version: str, only: Sequence[str]) -> bool:
    """Whether ``only`` names releases of this package, and not this one."""
    named = [one.partition("==")[2] for one in only if one.partition("==")[0] == package]
    return bool(named) and version not in named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", action="append", default=[], metavar="PACKAGE==VERSION", help="may be repeated")
    parser.add_argument("--write", action="store_true", help="put the table into docs/support.md")
    given = parser.parse_args()
    for one in given.only:
        package, _, version = one.partition("==")
        if version not in PACKAGES.get(package, ()):
            parser.error(f"--only {one}: none of {', '.join(f'{p}=={v}' for p, vs in PACKAGES.items() for v in vs)}")
    found = answers(given.only)
    text = f"`make compat`, Python {platform.python_version()}, on a CPU:\n\n{table(found)}"
    print(text)
    if given.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return 0 if all(a.said == "ok" or a.seconds == 0 for row in found.values() for a in row.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["smoke"]:
        smoke()
    else:
        sys.exit(main())
