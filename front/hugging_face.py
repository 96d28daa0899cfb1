"""What a Hugging Face tensor-parallel model needs before it is compiled for inference."""

from __future__ import annotations

from torch import nn


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
