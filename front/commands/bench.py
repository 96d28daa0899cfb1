"""``ringfence bench``: up to which size each fused collective is worth using on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, bytes_, count
from .terminal import OK


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure up to which size each fused collective is worth using here",
        description="Measure the fused collectives against NCCL on this machine and write a size table, the backend's "
        "option size_table. Start one process for each GPU: torchrun --nproc-per-node N -m ringfence bench ...",
    )
    parser.add_argument("--write-table", type=Path, required=True, metavar="FILE", help="where to write the table")
    parser.add_argument("--hidden", type=count, nargs="+", default=[8192], metavar="N", help="(default 8192)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--sizes",
        type=bytes_,
        nargs="+",
        metavar="SIZE",
        help="bytes that a rank reduces, as 65536, 64K or 8M (default: the powers of two from 8K to 32M)",
    )
    parser.add_argument("--moe", action="store_true", help="measure MoE dispatch and combine too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    import torch

    from ..runtime.collectives.measure import SIZES, bench
    from ..runtime.collectives.measure_moe import measure_moe

    dtype = getattr(torch, arguments.dtype)
    moe = measure_moe if arguments.moe else None
    return bench(arguments.write_table, arguments.sizes or SIZES, arguments.hidden, dtype, moe), OK
