"""What a Hugging Face tensor-parallel model needs before it is compiled for inference."""

from __future__ import annotations

from typing import Any

from torch import nn

#: What Dynamo calls the count of :func:`counts_on_the_host`, as a regular expression.
HOST_COUNT = r".*\.cumulative_length_int$"


def remove_backward_hooks(model: nn.Module) -> list[str]:
    """Take the backward hooks off every submodule; the paths of those that had any.

    For norms inside attention (Qwen3's ``q_norm``), the tensor-parallel plans of
    transformers install a full backward hook that sums gradients over the ranks. It does
    nothing in inference, but Dynamo cannot trace a module that has one, and breaks the
    graph between the all-reduces and the norms. Do not train the model afterwards.
    """
    paths = []
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
            paths.append(path)
    return paths


def is_fresh(cache: Any) -> bool:
    """Whether a cache of fixed size has layers that have allocated nothing yet.

    ``generate()`` makes a cache for each call, and a layer allocates its tensors, and marks their addresses as static,
    when it is first written to. Inside a compiled graph they would be outputs of the graph, and unmarked; so the call
    that allocates, which is the prompt's, is not compiled.
    """
    return any(map(_is_fresh, _layers(cache)))


def grows(cache: Any) -> bool:
    """Whether a cache is longer after each call, as the one that ``generate()`` makes by default."""
    return getattr(cache, "is_compileable", None) is False


def counts_on_the_host(cache: Any) -> bool:
    """Whether a layer of a static cache counts its tokens in a Python number, as sliding ones do."""
    return any(hasattr(layer, "cumulative_length_int") for layer in _layers(cache))


def _layers(cache: Any) -> list[Any]:
    """Of a cache, or of both of an encoder-decoder model."""
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (cache, *parts) for layer in getattr(part, "layers", None) or ()]


def _is_fresh(layer: Any) -> bool:
    if not getattr(layer, "is_compileable", False):
        return False
    states = getattr(layer, "is_conv_states_initialized", None)  # of linear attention
    return not (any(states.values()) if states else getattr(layer, "is_initialized", True))
