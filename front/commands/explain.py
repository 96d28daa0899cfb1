"""``ringfence explain``: for each all-reduce of a model, is it fused, and why not?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.errors import OptionsError, RingfenceError, TargetError
from ..runtime.hazards.hazard import ALL_REDUCES
from ..runtime.protocol.plan import MODELLED
from .arguments import Commands, count, world_size
from .targets import load
from .terminal import OK, first_lines, say, say_if_unread, stage

if TYPE_CHECKING:
    from ..compile_passes.report import CompileReport


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="say for each all-reduce of a model whether it is fused, and why not",
        description="Compile a model as one of N tensor-parallel ranks, without the other ranks and without a GPU, "
        "and print the report.",
    )
    parser.add_argument(
        "target", help="a Hugging Face model folder, or module:function that returns (model, example_inputs)"
    )
    parser.add_argument("--tp", type=world_size, required=True, metavar="N", help="tensor-parallel world size")
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON (described by: ringfence docs report)"
    )
    parser.add_argument("--batch", type=count, default=1, help="batch size of a model folder's input (default 1)")
    parser.add_argument("--tokens", type=count, default=8, help="sequence length of that input (default 8)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of a model folder"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend, a Python literal or a string; may be repeated",
    )
    parser.add_argument(
        "--collective",
        choices=[str(name) for name in MODELLED if name in ALL_REDUCES],
        help="judge the fused sites as this collective's, though it need not run here",
    )
    parser.add_argument("--flashinfer", metavar="VERSION", help="and as in this version of FlashInfer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    report = _compile(arguments)
    return report.to_json(indent=2) if arguments.json else str(report), OK


def _compile(arguments: argparse.Namespace) -> CompileReport:
    # Everything that takes seconds to import is imported here, so that --help and usage errors do not.
    import torch
    import torch.distributed as dist
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ..backend import Backend
    from ..runtime.hazards.situation import Collective, Situation

    if arguments.flashinfer is not None and arguments.collective is None:
        raise OptionsError("--flashinfer says nothing without --collective")
    planned = None
    if arguments.collective is not None:
        planned = Situation(Collective(arguments.collective), arguments.flashinfer, world_size=arguments.tp)
    # Simulated, because the plan is for another machine: it shows what would be captured there.
    options = {"piece_compiler": "eager", "graphs": "simulated", **_options(arguments.option)}
    backend = Backend(planned=planned, **options)
    if arguments.flashinfer is not None:
        say_if_unread(arguments.flashinfer)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.tp)
    try:
        with stage(f"loading {arguments.target}"):
            model, args, kwargs = load(arguments)
        with stage("compiling"), torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RingfenceError):
            raise error.inner_exception from error
        raise TargetError(f"'{arguments.target}' does not compile: {first_lines(error)}") from error
    except Unsupported as error:
        raise TargetError(
            f"'{arguments.target}' breaks the graph, so no pass can see across: {first_lines(error)}"
        ) from error
    except RingfenceError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TargetError(f"'{arguments.target}' raised {type(error).__name__}: {first_lines(error)}") from error
    finally:
        dist.destroy_process_group()
    if not backend.reports:
        raise TargetError(f"'{arguments.target}' ran without compiling a graph; is it a torch.nn.Module or function?")
    report = backend.reports[-1]
    if backend.options.capture_sizes and arguments.collective is None:
        say("collectives were judged as host work, which the fake group's are; over NCCL they stay in the pieces")
    if not report.sites:
        say(f"'{arguments.target}' has no all-reduce: its tensor-parallel plan is empty, or it was not applied")
    return report


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
