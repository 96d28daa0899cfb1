"""SGLang's own Llama and Qwen3 on two gloo ranks, with ringfence hooked in as SGLang does it; `make engines-sglang`.

    .engines/sglang/bin/python tests/engines/sglang_models.py

First the parameters of everything that ringfence calls or replaces are read in SGLang's sources. Then each model runs
a batch unhooked and hooked, by the reference and by stand-ins of FlashInfer's kernels, in float32 and bfloat16: the
hooked function must be called at each of its sites, serve each call, and change no number by more than the dtype
rounds; and a replay of each of SGLang's graph backends must be a step of the watch. SGLang's server is not started:
its kernels are for CUDA. Attention is a tanh, and SGLang is told that it has the GPUs that its own fusion asks for.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAYERS, HIDDEN, TOKENS, VOCABULARY = 3, 256, 5, 128
#: Behind the attention of each layer, and behind each MLP but the last, whose norm SGLang calls without its function.
SITES = 2 * LAYERS - 1
SECONDS = 900


# -- what the sources say, without importing SGLang ------------------------------------------


def parameters_in(source: str, path: list[str]) -> str | None:
    """The parameters of the function at ``path`` (below its module), without annotations; None without one."""
    body: Any = ast.parse(source)
    for name in path:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        body = next((n for n in body.body if isinstance(n, kinds) and n.name == name), None)
        if body is None:
            return None
    for one in (*body.args.posonlyargs, *body.args.args, *body.args.kwonlyargs, body.args.vararg, body.args.kwarg):
        if one is not None:
            one.annotation = None
    return ast.unparse(body.args)


def contract() -> list[str]:
    """Where SGLang's sources differ from what the integration was written for."""
    from ringfence.integrations.sglang import TARGETS

    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None, "install SGLang: make engines-sglang"
    root, differs = Path(spec.origin).parent.parent, []
    for target in TARGETS["fuse"]:
        parts = target.path.split(".")
        end = next(n for n in range(len(parts), 0, -1) if root.joinpath(*parts[:n]).with_suffix(".py").exists())
        found = parameters_in(root.joinpath(*parts[:end]).with_suffix(".py").read_text(), parts[end:])
        found = found.removeprefix("cls, ") if found is not None else None
        wanted = re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", target.parameters)  # as sources write what Python prints so
        if found != wanted:
            differs.append(f"{target.path} takes ({found}), not ({wanted})")
    return differs


# -- one rank ----------------------------------------------------------------------------------


def start(rank: int, port: int) -> None:
    """SGLang as its workers start it, on the CPU."""
    import sglang_stubs

    sglang_stubs.install()
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    from sglang.srt.plugins.hook_registry import HookRegistry

    from ringfence.integrations import sglang as integration

    integration.register()
    HookRegistry.apply_hooks()
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="none", device="cpu", tp_size=2, flashinfer_allreduce_fusion_backend="auto")
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    bootstrap._init_parallel_groups(
        backend="gloo", dist_init_method=f"tcp://127.0.0.1:{port}", server_args=args, gpu_id=0
    )
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward = RotaryEmbedding.forward_native
    RadixAttention.forward = lambda self, q, k, v, batch, *_, **__: torch.tanh(q)


def build(name: str, dtype: Any, rank: int) -> Any:
    """A tiny model of random weights: those that are split differ between ranks."""
    import torch
    from sglang.srt.models.llama import LlamaModel
    from sglang.srt.models.qwen3 import Qwen3Model
    from transformers import LlamaConfig, Qwen3Config

    model, config = {"llama": (LlamaModel, LlamaConfig), "qwen3": (Qwen3Model, Qwen3Config)}[name]
    torch.set_default_dtype(dtype)
    made = model(
        config(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HIDDEN // 4,
            vocab_size=VOCABULARY,
        )
    )
    torch.set_default_dtype(torch.float32)
    for number, (path, parameter) in enumerate(made.named_parameters()):
        split = "proj" in path or "embed" in path
        seeded = torch.Generator().manual_seed(number + 1000 * rank * split)
        drawn = torch.randn(parameter.shape, generator=seeded)
        parameter.copy_((drawn * 0.06 if split else 1.0 + drawn * 0.2).bfloat16())  # the same in every dtype
    return made


def errors(ours: Any, plain: Any, truth: Any) -> dict[str, float]:
    """Relative to the rows' size. most: of one number, to the unhooked model, in the dtype's epsilon; and the root mean
    square error of both to float32."""
    import torch

    size = truth.square().mean(-1, keepdim=True).sqrt()
    most = ((ours.float() - plain.float()).abs() / size).max() / torch.finfo(ours.dtype).eps
    of_ours, of_plain = (((one.float() - truth) / size).square().mean().sqrt() for one in (ours, plain))
    return {"most": float(most), "rms": float(of_ours), "rms unhooked": float(of_plain)}


def step(model: Any) -> Any:
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    class Batch(types.SimpleNamespace):
        """What a model reads of a batch; what is not set is None."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    ids, positions = torch.arange(TOKENS) * 7 % VOCABULARY, torch.arange(TOKENS)
    batch = Batch(forward_mode=ForwardMode.DECODE, batch_size=TOKENS, input_ids=ids, positions=positions)
    return model(ids, positions, batch)


def replayed(rank: int) -> list[str]:
    """A replay by each of SGLang's backends, with a graph that only says that it ran; the programs of the journal."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner.shape_key import ShapeKey
    from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

    from ringfence.runtime.watch.supervision import Asked
    from ringfence.runtime.watch.supervisor import supervisor_for

    said: list[str] = []
    journal = supervisor_for(Asked({})).journal
    for kind, mode in ((FullCudaGraphBackend, ForwardMode.DECODE), (BreakableCudaGraphBackend, ForwardMode.EXTEND)):
        backend, key = object.__new__(kind), ShapeKey(TOKENS)
        backend._graphs = {key: types.SimpleNamespace(replay=lambda kind=kind: said.append(kind.__name__))}
        backend._outputs = {key: "output"}
        before = journal.position().step
        assert backend.replay(key, types.SimpleNamespace(forward_mode=mode)) == "output"
        assert journal.position().step == before + 1 and journal.position().sizes == (TOKENS,), journal.position()
    return said


def rank_main(rank: int, port: int) -> dict[str, Any]:
    start(rank, port)
    import torch
    from fake_flashinfer import FakeFlashInfer, installed
    from sglang.srt.layers import flashinfer_comm_fusion as fusion
    from sglang.srt.layers.layer_boundary.residual import add_norm

    from ringfence import close_workspaces

    served: list[bool] = []
    hooked = fusion.flashinfer_allreduce_residual_rmsnorm

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = hooked(*args, **kwargs)
        served.append(found[0] is not None)
        return found

    fusion.flashinfer_allreduce_residual_rmsnorm = counted
    rows: list[dict[str, Any]] = []
    truth: Any = None
    by_kernels = os.environ["SGLANG_TEST_CARRIER"] == "kernels"
    with installed(FakeFlashInfer("tp:0")) as package:
        for name in ("llama", "qwen3"):
            for dtype in (torch.float32, torch.bfloat16):
                model = build(name, dtype, rank)
                add_norm._is_sm90_supported = add_norm._is_flashinfer_available = False
                plain = step(model)
                truth = plain if dtype == torch.float32 else truth
                assert not served and plain.isfinite().all() and plain.float().std() > 0.1
                add_norm._is_sm90_supported = add_norm._is_flashinfer_available = True
                fusion.pre_initialize_workspaces(max_token_num=2048, hidden_dim=HIDDEN, dtype=dtype)
                package.calls.clear()
                ours = step(model)
                rows.append(
                    {
                        "model": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "calls": len(served),
                        "served": sum(served),
                        "kernels": len(package.calls),
                        "wanted kernels": SITES if by_kernels else 0,
                    }
                    | errors(ours, plain, truth)
                )
                served.clear()
                close_workspaces("tp:0")
    told = replayed(rank)
    torch.distributed.barrier()  # the store ends with rank 0
    return {"rows": rows, "replayed": told}


# -- all of it ---------------------------------------------------------------------------------


def run(carrier: str) -> list[dict[str, Any]]:
    """Both ranks as processes with a hard end; what each found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"kernels": {"agree_seconds": 120}, "reference": {"agree_seconds": 120, "collective": "reference"}}
    environment = os.environ | {
        "RINGFENCE": "fuse",
        "RINGFENCE_OPTIONS": json.dumps(options[carrier]),
        "SGLANG_TEST_CARRIER": carrier,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    deadline, found = time.monotonic() + SECONDS, []
    try:
        for rank, process in enumerate(ranks):
            try:
                said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as late:
                raise AssertionError(
                    f"rank {rank} was not done in {SECONDS} s:\n{(late.output or b'').decode()}"
                ) from None
            lines = [line for line in said.splitlines() if line.startswith("FOUND ")]
            assert process.returncode == 0 and lines, f"rank {rank} ended with {process.returncode}:\n{said}"
            found.append(json.loads(lines[0].removeprefix("FOUND ")))
            found[-1]["log"] = [line for line in said.splitlines() if "in SGLang" in line]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return found


def check(carrier: str, found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        for row in one["rows"]:
            print(
                f"rank {rank} {carrier:9} "
                + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )
            assert row["calls"] == row["served"] == SITES, row
            assert row["kernels"] == row["wanted kernels"], row
            assert row["most"] <= 12, row  # what the sites round, over the layers behind them
            assert row["rms"] <= 1.25 * row["rms unhooked"] + 1e-6, row
        assert one["replayed"] == ["FullCudaGraphBackend", "BreakableCudaGraphBackend"], one["replayed"]
        assert len(one["log"]) == (0 if rank else 2 if carrier == "kernels" else 1), one["log"]
    print(found[0]["log"][0])


def main() -> int:
    began = time.monotonic()
    if differs := contract():
        print("SGLang's functions are not what they were:", *differs, sep="\n  ")
        return 1
    print("contract: every function that is called or replaced takes what it took")
    for carrier in ("reference", "kernels"):
        check(carrier, run(carrier))
    print(f"SGLang {importlib.metadata.version('sglang')}: all as it should be, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        import faulthandler
        import logging

        faulthandler.dump_traceback_later(SECONDS - 20)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        print("FOUND " + json.dumps(rank_main(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
        os._exit(0)  # the store goes with the rank that ends last; nothing is to be waited for
    sys.exit(main())
