"""What follows the sum of an all-reduce, as a value: a residual or not, a norm or not.

    epilogue                          op                          returns
    Epilogue()                        all_reduce                  sum
    Epilogue(norm=n)                  all_reduce_rms_norm         norm, sum
    Epilogue(residual=True, norm=n)   all_reduce_add_rms_norm     norm, sum + residual

:func:`ringfence.runtime.collectives.reference.apply` is its meaning. Whoever recognises, carries out, tests or
measures a fused all-reduce speaks of this value; a quantiser behind the norm is a third field and a case of the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: What can be summed and followed so.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class RmsNorm:
    """``x * rsqrt(mean(x ** 2, -1) + eps) * (weight_bias + weight)``, in float32, rounded once.

    has_weight: whether there is a weight; without one, the normalised value is multiplied by one.
    weight_bias: 1 for weights that are stored less one (Gemma), 0 for others.
    """

    eps: float
    weight_bias: float = 0.0
    has_weight: bool = True


@dataclass(frozen=True)
class Epilogue:
    """What is done to the sum before it is returned."""

    residual: bool = False
    norm: RmsNorm | None = None

    @property
    def op(self) -> str:
        """The name of the op that a graph calls, without its namespace."""
        return f"all_reduce{'_add' if self.residual else ''}{'_rms_norm' if self.norm is not None else ''}"
