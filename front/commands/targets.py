"""What ``ringfence explain`` compiles: a model folder, or what a function of the user's returns."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import TargetError
from .terminal import first_lines, say


def load(arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    target = arguments.target
    if Path(target).is_dir():
        return _load_folder(Path(target), arguments)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        raise TargetError(f"'{target}' is neither an existing folder nor module:function")
    return _load_function(module_name, function_name)


def _load_folder(folder: Path, arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    import torch

    from ..hugging_face import remove_backward_hooks

    if not (folder / "config.json").is_file():
        raise TargetError(f"'{folder}' has no config.json; a model folder is what save_pretrained writes")
    try:
        from transformers import AutoModelForCausalLM
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise TargetError(
            "a model folder needs transformers: pip install 'transformers>=5.17' 'accelerate>=1.15'"
        ) from error
    plan = DistributedConfig(tp_plan="auto", tp_size=arguments.tp)
    dtype = getattr(torch, arguments.dtype)
    try:
        with _local_rank():
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=dtype).eval()
    except Exception as error:  # transformers raises what its loaders raise: OSError, ValueError, ImportError, ...
        raise TargetError(f"'{folder}' cannot be loaded: {type(error).__name__}: {first_lines(error)}") from error
    hooked = remove_backward_hooks(model)
    if hooked:
        say(
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
