"""No backward: the fused ops are for inference, and say so where a call of theirs would be differentiated."""

from __future__ import annotations

from typing import Any, Never

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ..errors import GradModeError


def check_no_grad(what: str, *operands: Tensor | None) -> None:
    """Of an eager call. Raises :class:`GradModeError` where grad mode is on and an operand requires grad."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise _error(what)


def without_backward(op: CustomOpDef, what: str) -> None:
    """Of a traced call: whoever differentiates it, AOT when it compiles among them, raises the same."""

    def backward(ctx: Any, *grads: Any) -> Never:
        raise _error(what)

    op.register_autograd(backward)


def _error(what: str) -> GradModeError:
    return GradModeError(
        f"{what} has no backward and was called in grad mode with tensors that require grad; call it, or the model "
        "around it, under torch.inference_mode() or torch.no_grad()"
    )
