"""Fake model: one tensor-parallel rank of a Hugging Face model, out of its config alone.

Its tensors are fake (torch.FakeTensorMode): they have shapes, dtypes and strides, and no memory, so a model of any size
fits on a laptop. Nothing is read but the config.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .hugging_face import remove_backward_hooks
from .layers import Folding, fold, keep_layers, record_layers
from .runtime.errors import OptionsError, TargetError

#: What a static cache holds where nothing is said.
CONTEXT = 4096


@dataclass(frozen=True)
class ModelCall:
    """A call of the model. tokens: of each sequence. context: what its static cache holds; None: it has no cache."""

    batch: int
    tokens: int
    context: int | None = None

    @property
    def name(self) -> str:
        return "prefill" if self.context is None else "decode"

    def __str__(self) -> str:
        """``decode: 1 sequence of 1 token, static cache of 4096``."""
        sequences = f"{self.batch} sequence{'s' if self.batch > 1 else ''}"
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        cache = "no cache" if self.context is None else f"a static cache of {self.context} tokens"
        return f"{self.name}: {sequences} of {tokens}, {cache}"


@dataclass(frozen=True)
class FakeModel:
    """A model of fake tensors. hooked: modules that had backward hooks, which would break the graph."""

    model: nn.Module
    mode: FakeTensorMode
    hooked: tuple[str, ...]

    def inputs(self, call: ModelCall) -> tuple[torch.Tensor, dict[str, Any]]:
        """Token ids ``[batch, tokens]``, int64, and keyword arguments."""
        with self.mode:
            tokens = torch.zeros((call.batch, call.tokens), dtype=torch.long)
        if call.context is None:
            return tokens, {"use_cache": False}
        from transformers import StaticCache

        cache = StaticCache(config=cast(Any, self.model).config, max_cache_len=call.context)
        return tokens, {"past_key_values": cache, "use_cache": True}

    def warm(self, tokens: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        """Call it once, so that its cache has its tensors, as in all steps but the first."""
        with self.mode, torch.no_grad():
            self.model(tokens, **kwargs)

    def folded(self, tokens: torch.Tensor, kwargs: Mapping[str, Any]) -> Folding | str:
        """Leave out layers that others stand for; or why that cannot be. The cache is as after the call."""
        try:
            layers = self.model.get_decoder().layers  # type: ignore[operator]
            path = next(path for path, module in self.model.named_modules() if module is layers)
        except (AttributeError, StopIteration):
            return "the model has no list of decoder layers"
        try:
            with self.mode, torch.no_grad():
                records = record_layers(self.model, layers, tokens, **kwargs)
        except Exception as error:  # what works in a trace need not work with fake tensors alone
            return f"the layers cannot be compared: {type(error).__name__}: {str(error).splitlines()[:1]}"
        folding = fold(path, records)
        keep_layers(self.model, layers, folding.kept, kwargs.get("past_key_values"))
        return folding


def read_config(folder: Path) -> Any:
    """The Hugging Face config in a folder's ``config.json``. Raises :class:`TargetError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise TargetError(f"'{folder}' has no config.json; a model folder is what save_pretrained writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise TargetError(f"'{path}' names no model_type, so it is not the config of a Hugging Face model")
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises what it likes: KeyError, ValueError, its own validation errors
        if content["model_type"] not in transformers.CONFIG_MAPPING:
            raise TargetError(
                f"'{path}': transformers {transformers.__version__} knows no model type '{content['model_type']}'"
            ) from error
        raise TargetError(f"'{path}' cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def fake_model(config: Any, tp: int, dtype: torch.dtype, *, expert_parallel: bool = False) -> FakeModel:
    """Rank 0 of ``tp``, as ``from_pretrained(tp_plan="auto")`` would shard it. A process group of that size is there.

    expert_parallel: by the model's plan for its experts instead, ``DistributedConfig(enable_expert_parallel=True)``.

    Raises :class:`TargetError` where transformers has no such model, :class:`OptionsError` where ``tp`` ranks cannot
    share its heads.
    """
    transformers = _transformers()
    from transformers.distributed.configuration_utils import DistributedConfig

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    except Exception as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise TargetError(f"no model can be made of this config of '{kind}': {_one_line(error)}") from error
    _check_heads(model, tp)
    wanted = DistributedConfig(tp_plan="auto", tp_size=tp, enable_expert_parallel=expert_parallel)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _local_rank():
            plan, _, mesh = model.prepare_distribute_model(wanted)
            model = model.maybe_distribute_model(model, plan, mesh)
        with mode:
            model = model.to_empty(device="cpu")
    except Exception as error:
        raise TargetError(f"{tp} ranks cannot share '{config.model_type}': {_one_line(error)}") from error
    return FakeModel(model, mode, tuple(remove_backward_hooks(model)))


def quantised_by(config: Any) -> str | None:
    """The method of a config's ``quantization_config``, as ``fp8``; None where it has none."""
    for one in (config, config.get_text_config(decoder=True)):
        given = getattr(one, "quantization_config", None)
        if given:
            method = given.get("quant_method") if isinstance(given, Mapping) else getattr(given, "quant_method", None)
            return str(getattr(method, "value", method) or "of no method")
    return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            "a model's config needs transformers: pip install 'transformers>=5.17' 'accelerate>=1.15'"
        ) from error
    return transformers


def _check_heads(model: Any, tp: int) -> None:
    config = model.config.get_text_config(decoder=True)
    plan = " ".join(model.tp_plan)
    for projection, attribute, name in (
        ("q_proj", "num_attention_heads", "attention heads"),
        ("k_proj", "num_key_value_heads", "key-value heads"),
    ):
        heads = getattr(config, attribute, None)
        if projection in plan and isinstance(heads, int) and heads % tp:
            sizes = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
            raise OptionsError(f"--tp {tp}: {tp} ranks cannot share {heads} {name}; these can: {sizes or 'none'}")


@contextmanager
def _local_rank() -> Iterator[None]:
    """On a machine with an accelerator, transformers reads the device's index from this variable."""
    given = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = given or "0"
    try:
        yield
    finally:
        if given is None:
            del os.environ["LOCAL_RANK"]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
