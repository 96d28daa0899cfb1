"""The command line: ``ringfence explain`` and ``ringfence hazards``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.errors import OptionsError, RingfenceError, TargetError, UnknownHazardError

if TYPE_CHECKING:
    from .compile_passes.report import CompileReport

#: Exit codes: what was asked for was done; the target cannot be loaded or compiled; wrong usage (argparse's own).
OK, FAILED, USAGE = 0, 1, 2

_QUIET_SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ringfence", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ringfence {importlib.metadata.version('ringfence')}")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser(
        "explain",
        help="say for each all-reduce of a model whether it is fused, and why not",
        description="Compile a model as one of N tensor-parallel ranks, without the other ranks and without a GPU, "
        "and print the report.",
    )
    explain.add_argument(
        "target", help="a Hugging Face model folder, or module:function that returns (model, example_inputs)"
    )
    explain.add_argument("--tp", type=_world_size, required=True, metavar="N", help="tensor-parallel world size")
    explain.add_argument("--json", action="store_true", help="print the report as JSON (docs/report.md)")
    explain.add_argument("--batch", type=_count, default=1, help="batch size of a model folder's input (default 1)")
    explain.add_argument("--tokens", type=_count, default=8, help="sequence length of that input (default 8)")
    explain.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of a model folder"
    )
    explain.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend, a Python literal or a string; may be repeated",
    )
    hazards = commands.add_parser(
        "hazards",
        help="list the known ways in which a fused collective hangs or corrupts",
        description="Print the hazard table, or one row of it in full.",
    )
    hazards.add_argument("id", nargs="?", help="an id, such as M1")
    form = hazards.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (docs/report.md)")
    form.add_argument("--markdown", action="store_true", help="print docs/hazards.md")
    arguments = parser.parse_args(argv)
    if arguments.command == "hazards" and arguments.id and arguments.markdown:
        hazards.error("--markdown prints the whole table; leave the id out")
    run = {"explain": _explain, "hazards": _hazards}[arguments.command]
    try:
        print(run(arguments), flush=True)
    except BrokenPipeError:  # the reader has enough, as in `ringfence hazards | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RingfenceError as error:
        print(f"ringfence: {error}", file=sys.stderr)
        return USAGE if isinstance(error, OptionsError | UnknownHazardError) else FAILED
    return OK


def _hazards(arguments: argparse.Namespace) -> str:
    import json

    from .runtime.hazards import HAZARDS, as_dict, as_markdown, as_text, find_hazard, summary_table

    rows = (find_hazard(arguments.id),) if arguments.id else HAZARDS
    if arguments.json:
        return json.dumps(as_dict(rows), indent=2)
    if arguments.markdown:
        return as_markdown().rstrip("\n")
    return as_text(rows[0]) if arguments.id else summary_table(rows)


def _explain(arguments: argparse.Namespace) -> str:
    report = _compile(arguments)
    return report.to_json(indent=2) if arguments.json else str(report)


def _world_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a world size of two or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def _compile(arguments: argparse.Namespace) -> CompileReport:
    # Everything that takes seconds to import is imported here, so that --help and usage errors do not.
    import torch
    import torch.distributed as dist
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from .backend import Backend

    backend = Backend(**{"piece_compiler": "eager", **_options(arguments.option)})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.tp)
    try:
        with _stage(f"loading {arguments.target}"):
            model, args, kwargs = _load(arguments)
        with _stage("compiling"), torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RingfenceError):
            raise error.inner_exception from error
        raise TargetError(f"'{arguments.target}' does not compile: {_first_lines(error)}") from error
    except Unsupported as error:
        raise TargetError(
            f"'{arguments.target}' breaks the graph, so no pass can see across: {_first_lines(error)}"
        ) from error
    except RingfenceError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TargetError(f"'{arguments.target}' raised {type(error).__name__}: {_first_lines(error)}") from error
    finally:
        dist.destroy_process_group()
    if not backend.reports:
        raise TargetError(f"'{arguments.target}' ran without compiling a graph; is it a torch.nn.Module or function?")
    report = backend.reports[-1]
    if backend.options.capture_sizes:
        _say("collectives were judged as host work, which the fake group's are; over NCCL they stay in the pieces")
    if not report.sites:
        _say(f"'{arguments.target}' has no all-reduce: its tensor-parallel plan is empty, or it was not applied")
    return report


def _say(text: str) -> None:
    print(f"ringfence: {text}", file=sys.stderr, flush=True)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    import ast

    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _load(arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    target = arguments.target
    if Path(target).is_dir():
        return _load_folder(Path(target), arguments)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        raise TargetError(f"'{target}' is neither an existing folder nor module:function")
    return _load_function(module_name, function_name)


def _load_folder(folder: Path, arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    import torch

    from .hugging_face import remove_backward_hooks

    if not (folder / "config.json").is_file():
        raise TargetError(f"'{folder}' has no config.json; a model folder is what save_pretrained writes")
    try:
        from transformers import AutoModelForCausalLM
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise TargetError("a model folder needs transformers: pip install 'ringfence[transformers]'") from error
    plan = DistributedConfig(tp_plan="auto", tp_size=arguments.tp)
    dtype = getattr(torch, arguments.dtype)
    try:
        with _local_rank():
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=dtype).eval()
    except Exception as error:  # transformers raises what its loaders raise: OSError, ValueError, ImportError, ...
        raise TargetError(f"'{folder}' cannot be loaded: {type(error).__name__}: {_first_lines(error)}") from error
    hooked = remove_backward_hooks(model)
    if hooked:
        _say(
            f"removed the backward hooks of {len(hooked)} modules ({hooked[0]}, ...), which break the graph; before "
            "you compile it, call remove_backward_hooks(model) from ringfence.hugging_face"
        )
    shape = (arguments.batch, arguments.tokens)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=model.device)
    return model, (tokens,), {"use_cache": False}


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """On a machine with an accelerator, transformers reads the device's index from this variable."""
    given = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = given or "0"
    try:
        yield
    finally:
        if given is None:
            del os.environ["LOCAL_RANK"]


def _load_function(module_name: str, function_name: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    with _importable_from_here():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            path = module_name.removesuffix(".py").replace("/", ".")
            hint = f"; a module is named without its suffix: {path}:{function_name}" if path != module_name else ""
            raise TargetError(f"'{module_name}:{function_name}' cannot be imported: {error}{hint}") from error
        try:
            result = function()
        except Exception as error:  # whatever the user's function raises
            raise TargetError(f"'{module_name}:{function_name}()' raised {type(error).__name__}: {error}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[0])):
        types = [type(r).__name__ for r in result] if isinstance(result, tuple) else type(result).__name__
        raise TargetError(f"'{module_name}:{function_name}' must return (model, example_inputs), and returned {types}")
    model, inputs = result
    if isinstance(inputs, Mapping):
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """As with ``python -m``: modules of the current folder can be named."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def _stage(label: str) -> Iterator[None]:
    """One line on standard error for a stage that takes more than two seconds."""
    timer = threading.Timer(_QUIET_SECONDS, _say, [f"{label} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
