"""ringfence: a torch.compile backend that fuses all-reduce + residual add + RMSNorm.

    backend = ringfence.Backend(capture_sizes=[1, 16])
    model = torch.compile(model, backend=backend)
    ...
    print(backend.reports[0])

:mod:`ringfence.compile_passes` holds the passes, each usable alone;
:mod:`ringfence.runtime` what runs.
"""

from .backend import Backend
from .compile_passes.report import CompileReport, assert_fused
from .options import Options
from .runtime.errors import RingfenceError

__all__ = ["Backend", "CompileReport", "Options", "RingfenceError", "assert_fused"]
__version__ = "0.1.0"
