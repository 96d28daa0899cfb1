"""``ringfence.compile``: the one front door for a model that is served."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import nn

from .backend import Backend
from .hugging_face import HOST_COUNT, counts_on_the_host, grows, is_fresh, remove_backward_hooks
from .keywords import OptionKeywords
from .options import Options
from .runtime.errors import GroupError, ModelError
from .runtime.watch.steps import Watch
from .torch_compile import NO_GROUP, is_of_no_group
from .watching import watch_of_model

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Unpack[OptionKeywords]
) -> Model:
    """Compile a tensor-parallel model in place, for inference, and return it.

        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=..., dtype=torch.bfloat16)
        ringfence.compile(model, capture_sizes=[1])
        model.generate(**inputs, cache_implementation="static")
        print(model.ringfence)

    It does what otherwise has to be known. The model is put into evaluation mode; backward hooks that break the graph
    are removed, so do not train it afterwards; calls run without gradients; ``forward`` is the compiled one, which
    ``generate()`` calls. A call that allocates a static cache, which is the prompt's in ``generate()``, runs eagerly:
    transformers does not compile it either. Such a call is one step of its own in journal and watchdog, ``prompt``,
    where the model's parameters tell which ranks share it. The model's ``ringfence`` is the
    :class:`ringfence.Backend`, with its reports. One line on standard error, of the first rank, says what was done.

    model: every rank calls with its part. dynamic, fullgraph: as ``torch.compile`` takes them. options: the fields of
    :class:`ringfence.Options`.

    Raises :class:`ModelError` for what cannot be compiled in place, and :class:`OptionsError`.
    """
    _check(model)
    backend = Backend(**options)
    done = ["calls run without gradients"]
    if model.training:
        model.eval()
        done.append("evaluation mode")
    if hooked := remove_backward_hooks(model):
        done.append(f"backward hooks of {len(hooked)} modules removed")
    forward = CompiledForward(model, backend, dynamic=dynamic, fullgraph=fullgraph)
    model.forward = forward
    model.ringfence = backend  # type: ignore[assignment]
    if hasattr(model, "get_compiled_call"):  # generate() would have Inductor compile the compiled model
        model.get_compiled_call = forward.instead_of_compiling  # type: ignore[assignment]
        done.append("generate() uses it")
    if backend.options.capture_sizes:
        done.append(_captures(model, backend.options))
    _say(f"ringfence: {type(model).__name__}.forward is compiled in place: {'; '.join(done)}")
    return model


#: The argument of transformers' models that is a cache.
CACHE = "past_key_values"


class CompiledForward:
    """A model's ``forward``, compiled: without gradients, and with static caches in memory that compiled code finds."""

    def __init__(self, model: nn.Module, backend: Backend, *, dynamic: bool | None, fullgraph: bool) -> None:
        self._model, self._backend = model, backend
        self._eager = model.forward
        self._watch: Watch | None = None
        self._looked_for_ranks = False
        self._cache_at = _place_of(model.forward, CACHE)
        self._compiled = torch.compile(
            _of_its_own(model.forward), backend=backend, dynamic=dynamic, fullgraph=fullgraph
        )
        backend.is_called_by_forward()
        functools.update_wrapper(self, model.forward)  # generate() looks at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            by_place = args[self._cache_at] if self._cache_at < len(args) else None
            cache = kwargs.get(CACHE, by_place)
            if cache is not None and is_fresh(cache):
                with self._prompt(args, kwargs):
                    return self._eager(*args, **kwargs)
            if self._backend.options.capture_sizes and grows(cache):
                self._backend.cache_grows(cache, self._backend.options.capture_sizes)
            before = self._backend.progress
            try:
                with _counts_are_dynamic(cache):
                    result = self._compiled(*args, **kwargs)
            except Exception as error:
                self._backend.refuses(error, before)
                if is_of_no_group(error):
                    raise GroupError(NO_GROUP) from error
                raise
            self._backend.look_once()
            return result

    @contextlib.contextmanager
    def _prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A call that runs eagerly is a step too, as far as its ranks are known."""
        if not self._looked_for_ranks:
            self._looked_for_ranks = True
            self._watch = watch_of_model(self._model, self._backend.asked)
        if self._watch is None:
            yield
            return
        ids = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        with self._watch.step("prompt", ids.numel() if ids is not None and not ids.is_floating_point() else 0):
            yield

    def instead_of_compiling(self, compile_config: Any) -> Callable[..., Any]:
        """What ``generate()`` is to call where it would compile the model by itself."""
        if compile_config is not None:
            warnings.warn(
                "ringfence: the model is compiled by ringfence.compile, so generate()'s compile_config is not used",
                UserWarning,
                stacklevel=2,
            )
        return self._model.__call__

    def __deepcopy__(self, memo: Any) -> Any:
        raise ModelError("a copy of a compiled model would call the model that it is a copy of: copy it, then compile")

    def __reduce__(self) -> Any:
        raise ModelError("a compiled model cannot be saved: its captures are this process's; save it, then compile it")


def _place_of(forward: Callable[..., Any], name: str) -> int:
    """Where a call by place has that argument; beyond all of them where it has none. Looked up once, not per call."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in places]
    except (TypeError, ValueError):  # of C, say: nobody knows
        names = []
    return names.index(name) if name in names else sys.maxsize


@contextlib.contextmanager
def _counts_are_dynamic(cache: Any) -> Iterator[None]:
    """A sliding layer counts tokens on the host: a graph for the first count would serve one step."""
    if not counts_on_the_host(cache):
        yield
        return
    config: Any = torch.compiler.config
    with config.patch(dynamic_sources=",".join(filter(None, (config.dynamic_sources, HOST_COUNT)))):
        yield


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with a code object of its own: Dynamo counts recompilations by that, and models share theirs."""
    from torch._dynamo import external_utils, trace_rules

    if trace_rules.check(forward):  # of torch itself, which Dynamo would leave alone
        forward = external_utils.wrap_inline(forward)
    old = getattr(forward, "__func__", forward)
    if not isinstance(old, types.FunctionType):
        return forward
    new = types.FunctionType(old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__)
    new.__kwdefaults__ = old.__kwdefaults__
    functools.update_wrapper(new, old)
    return types.MethodType(new, forward.__self__) if isinstance(forward, types.MethodType) else new


def _check(model: Any) -> None:
    """Raises :class:`ModelError`."""
    if isinstance(model, type):
        raise ModelError(f"{model.__name__} is a class; make a model of it first")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{type(model).__name__} is no torch.nn.Module, whose forward could be compiled in place; compile a "
            "function with torch.compile(function, backend=ringfence.Backend(...))"
        )
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{name} is TorchScript, which torch.compile does not look into; give the module it was made of"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError("the model is wrapped by torch.compile already; give the model itself (._orig_mod)")
    if isinstance(model.forward, CompiledForward):
        raise ModelError(
            f"{name} is compiled by ringfence already, with {model.ringfence!r}; load it anew for other options"
        )
    compiled = model._compiled_call_impl is not None or hasattr(model.forward, "_torchdynamo_orig_callable")
    if compiled:
        raise ModelError(f"{name}.forward is compiled already, by torch.compile; load the model anew")
    if not _implements_forward(model):
        raise ModelError(f"{name} has no forward; compile the modules in it that have one")
    meta = next((path for path, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ModelError(f"parameter '{meta}' of {name} is on the meta device: load the weights first")


def _implements_forward(model: nn.Module) -> bool:
    return getattr(type(model).forward, "__name__", "") != "_forward_unimplemented" or "forward" in vars(model)


def _captures(model: nn.Module, options: Options) -> str:
    devices = sorted({parameter.device.type for parameter in model.parameters()})
    if options.graphs == "auto" and devices and "cuda" not in devices:
        return f"captures nothing, because {devices[0]} has no CUDA graphs (graphs='simulated' shows it)"
    sizes = options.capture_sizes
    listed = ", ".join(map(str, sizes)) if len(sizes) <= 8 else f"{len(sizes)} counts, {sizes[0]} to {sizes[-1]}"
    return f"captures {listed} token{'' if sizes == (1,) else 's'}"


def _say(text: str) -> None:
    log.info("%s", text)
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        print(text, file=sys.stderr, flush=True)
