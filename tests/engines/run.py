"""`make engines`: vLLM itself serves with ringfence, on the CPU of this machine, two ranks each.

    .engines/venv/bin/python tests/engines/run.py [NAME...]

Each run is a process of its own (serve.py) with a cache folder of its own, unless it is to find another's. It is
compared with vLLM alone: the same greedy tokens in float32, and log probabilities within 1e-3. Every all-reduce of the
model is fused, 2 * layers + 1, on both ranks. Names choose runs; all of them take about a quarter of an hour
on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("RINGFENCE_ENGINES", HERE.parent.parent / ".engines"))
LAYERS = 3
SITES = 2 * LAYERS + 1
WITHIN = 1e-3
LOADED = "Directly load AOT compilation from path"

_COMPILED = {"mode": 3, "compile_sizes": []}
_CAPTURES = {"piece_compiler": "eager", "capture_sizes": [1, 2, 3, 4, 8], "graphs": "simulated"}
_REFERENCE = {"collective": "reference"}  # by itself the pass leaves vLLM's all-reduces where no kernels serve
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(HERE / "plugins"),
}


@dataclass(frozen=True)
class Run:
    """mode: of ringfence; None is vLLM alone. cache: whose cache folder it finds; None begins with an empty one.

    loads: how many ranks load what another run compiled; the others compile. without: a rank whose part is removed
    from the cache first.
    """

    name: str
    model: str
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    compilation: Mapping[str, Any] = field(default_factory=dict)
    by_config: bool = False
    cache: str | None = None
    loads: int = 0
    without: int | None = None


def _runs(model: str, fusing: Mapping[str, Any]) -> list[Run]:
    """fusing: options of the pass."""
    cold = f"{model}-pass-cold"
    return [
        Run(f"{model}-plain", model, compilation=_COMPILED),
        Run(cold, model, "pass", fusing, _COMPILED),
        Run(f"{model}-pass-warm", model, "pass", fusing, _COMPILED, cache=cold, loads=2),
        Run(f"{model}-backend", model, "backend", _CAPTURES, by_config=model == "llama"),
    ]


RUNS = [
    *_runs("llama", _REFERENCE),
    Run(
        "llama-pass-mixed",
        "llama",
        "pass",
        _REFERENCE,
        compilation=_COMPILED,
        cache="llama-pass-cold",
        loads=1,
        without=1,
    ),
    Run("llama-off", "llama", compilation=_COMPILED, cache="llama-pass-cold"),
    Run("llama-guard", "llama", "guard", {"on_hang": "report"}, {"mode": 2, "backend": "eager"}),
    *_runs("qwen3", _REFERENCE | {"max_tokens": 16}),  # so vLLM compiles larger steps apart, without the pass
]

#: What is asked for by the environment, or by additional_config; and what the one line says.
BAD: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "a mode that is none": ({"RINGFENCE": "pas"}, {}, "RINGFENCE='pas' is none of pass, backend, guard"),
    "an option that is none": (
        {"RINGFENCE": "pass", "RINGFENCE_OPTIONS": '{"numeric": "strict"}'},
        {},
        "unknown option 'numeric'; did you mean 'numerics'?",
    ),
    "an option of another mode": (
        {},
        {"mode": "guard", "options": {"capture_sizes": [1]}},
        "'capture_sizes', which is nothing that mode 'guard' takes",
    ),
}


def main(names: list[str]) -> int:
    failures = []
    if not (WORK / "models").exists():
        _call([sys.executable, str(HERE / "models.py"), str(WORK / "models")], {}, WORK / "models.log")
    if not names or "contract" in names:
        failures += _checked("contract", _contract)
        failures += _checked("bad options", _bad_options)
    rows: list[list[Any]] = []
    for run in RUNS:
        if not names or run.name in names:
            failures += _checked(run.name, lambda run=run: rows.append(_row(run, _serve(run))))  # type: ignore[misc]
    headers = ["run", "fused of sites, by rank", "tokens", "log prob.", "ranks that loaded", "start s", "serve s"]
    print(tabulate(rows, headers, tablefmt="github"), flush=True)
    print("\n".join(failures) or "all as they should be", flush=True)
    return 1 if failures else 0


def _checked(name: str, check: Callable[[], Any]) -> list[str]:
    began = time.monotonic()
    try:
        check()
    except AssertionError as error:
        failure = f"{name}: {error}"
        print(failure, flush=True)
        return [failure]
    print(f"{name}: as it should be ({time.monotonic() - began:.0f} s)", flush=True)
    return []


def _contract() -> None:
    """Everything that is hooked is where and as it was read, and its ops take what the tests' stand-ins take."""
    done = subprocess.run(
        [sys.executable, str(HERE / "contract.py")], capture_output=True, text=True, env=_environment({})
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def _bad_options() -> None:
    """They end the start in the first process, with one line."""
    for what, (given, asked, expected) in BAD.items():
        log = WORK / "bad.log"
        more = {"additional_config": {"ringfence": asked}} if asked else {}
        code = _call(_command("llama", WORK / "bad.json", {}, more), given, log)
        text = log.read_text()
        lines = [line.strip() for line in text.splitlines() if "ringfence:" in line or "Traceback" in line]
        assert code != 0 and len(lines) == 1 and expected in lines[0], f"{what}: exit code {code}, {lines}"
        assert lines[0].startswith("ringfence: ") and "EngineCore" not in text, f"{what}: {lines[0]}"


def _serve(run: Run) -> dict[str, Any]:
    cache = WORK / "caches" / (run.cache or run.name)
    if run.cache is None:
        shutil.rmtree(cache, ignore_errors=True)
    if run.without is not None:
        for folder in cache.glob(f"torch_compile_cache/torch_aot_compile/*/rank_{run.without}_0"):
            shutil.rmtree(folder)
    given = {"VLLM_CACHE_ROOT": str(cache)}
    asked: dict[str, Any] = {}
    if run.mode is not None and run.by_config:
        asked = {"additional_config": {"ringfence": {"mode": run.mode, "options": dict(run.options)}}}
    elif run.mode is not None:
        given |= {"RINGFENCE": run.mode, "RINGFENCE_OPTIONS": json.dumps(dict(run.options))}
    out, log = WORK / f"{run.name}.json", WORK / f"{run.name}.log"
    out.unlink(missing_ok=True)
    code = _call(_command(run.model, out, run.compilation, asked), given, log)
    assert code == 0 and out.exists(), f"exit code {code}, see {log}"
    result: dict[str, Any] = json.loads(out.read_text())
    text = log.read_text()
    result["loaded"] = len({line.split(")")[0] for line in text.splitlines() if LOADED in line})
    result["lines"] = [line for line in text.splitlines() if "ringfence 0" in line]
    return result


def _row(run: Run, result: dict[str, Any]) -> list[Any]:
    plain = json.loads((WORK / f"{run.model}-plain.json").read_text())
    pairs = zip(plain["logprobs"], result["logprobs"], strict=True)
    furthest = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    same = plain["tokens"] == result["tokens"]
    counts = [f"{r['fused']} of {r['sites']}" for r in result["ranks"]]
    if run.mode in ("pass", "backend"):
        assert counts == [f"{SITES} of {SITES}"] * 2, f"fused by rank: {counts}, and {SITES} of {SITES} is expected"
    if run.mode is not None:
        assert len(result["lines"]) == 1, f"one line on rank 0, and not {result['lines']}"
        print(f"  {result['lines'][0].partition('ringfence')[2]}", flush=True)
    else:
        assert not counts and not result["lines"], f"nobody asked, and ringfence says {counts} {result['lines']}"
    if run.mode == "pass":
        assert result["loaded"] == run.loads, f"{result['loaded']} ranks loaded, and {run.loads} should"
    if run.mode is None:
        assert result["loaded"] == 0, "what was compiled with ringfence was loaded without"
    if run.mode == "backend":
        sizes = f"sizes {', '.join(map(str, run.options['capture_sizes']))}"
        captured = {rank["captured"] for rank in result["ranks"]}
        assert captured == {sizes}, f"captured: {captured}"
    assert same, f"other tokens than vLLM alone: {result['tokens']} and {plain['tokens']}"
    assert furthest <= WITHIN, f"log probabilities differ by {furthest}"
    seconds = (result["seconds"]["start"], result["seconds"]["serve"])
    return [run.name, ", ".join(counts), "equal", f"{furthest:.1e}", result["loaded"], *seconds]


def _command(model: str, out: Path, *settings: Mapping[str, Any]) -> list[str]:
    return [
        sys.executable,
        str(HERE / "serve.py"),
        str(WORK / "models" / model),
        str(out),
        *(json.dumps(dict(one)) for one in settings),
    ]


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "RINGFENCE"))}
    return kept | _ENVIRONMENT | dict(given)


def _call(command: list[str], given: Mapping[str, str], log: Path) -> int:
    """Its exit code; what it says goes to ``log``."""
    with log.open("w") as out:
        try:
            return subprocess.run(
                command, env=_environment(given), cwd=WORK, stdout=out, stderr=subprocess.STDOUT, timeout=1200
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
