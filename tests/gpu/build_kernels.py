"""Build FlashInfer's kernels between ranks of one release, for machines that cannot (no network, no compiler, no time).

python tests/gpu/build_kernels.py 0.6.18.post1 --into kernels/

Downloads the release's wheel, and compiles the sources in it as FlashInfer's own JIT would:
same flags, same macros. ``-use_fast_math`` is one of them; it is where the flush to zero
comes from that M1 needs. Needs nvcc, a C++ compiler, and ``apache-tvm-ffi`` for its headers.
No GPU. Writes ``INTO/RELEASE/trtllm_mnnvl_comm.so`` or what ``--modules`` names: ``trtllm_comm``
(the trtllm all-reduce) and ``mnnvl_moe_alltoall`` (dispatch and combine) take minutes each.

``tests/gpu`` looks for them in ``$RINGFENCE_KERNELS``. For the release that is installed,
``--install`` puts them where FlashInfer looks for kernels built ahead of time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODULES = {
    "trtllm_mnnvl_comm": ("trtllm_mnnvl_allreduce.cu",),
    "trtllm_comm": ("trtllm_allreduce.cu", "trtllm_allreduce_fusion.cu", "trtllm_moe_allreduce_fusion.cu"),
    "mnnvl_moe_alltoall": (
        "nv_internal/tensorrt_llm/kernels/communicationKernels/moeAlltoAllKernels.cu",  # minutes: it goes first
        "trtllm_moe_alltoall.cu",
        *(f"nv_internal/cpp/common/{name}.cpp" for name in ("envUtils", "tllmException", "logger", "stringUtils")),
    ),
}
#: What a module's own description in `flashinfer/jit/comm.py` adds: macros, and folders of headers.
EXTRA_FLAGS = {"mnnvl_moe_alltoall": ("-DENABLE_BF16",)}
EXTRA_HEADERS = {"mnnvl_moe_alltoall": ("csrc/nv_internal", "csrc/nv_internal/include")}

#: Stands in for a header of cuBLAS where the toolkit has none: `cudaUtils.h` names this type, and nothing is linked.
CUBLAS_TYPE = """#pragma once
#include <math.h>
#ifdef __cplusplus
#include <cmath>
#endif
typedef enum {
  CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3,
  CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_ARCH_MISMATCH = 8, CUBLAS_STATUS_MAPPING_ERROR = 11,
  CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_INTERNAL_ERROR = 14, CUBLAS_STATUS_NOT_SUPPORTED = 15,
  CUBLAS_STATUS_LICENSE_ERROR = 16
} cublasStatus_t;
"""

#: As `JitSpec.write_ninja` of FlashInfer 0.6.18 writes them.
FLAGS = (
    "-DPy_LIMITED_API=0x03090000 -D_GLIBCXX_USE_CXX11_ABI=1 --compiler-options=-fPIC --expt-relaxed-constexpr "
    "-static-global-template-stub=false -std=c++17 --threads=1 -use_fast_math -Xfatbin=-compress-all "
    "--compress-mode=size -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16 -DFLASHINFER_ENABLE_FP8_E4M3 "
    "-DFLASHINFER_ENABLE_FP8_E5M2 -DFLASHINFER_ENABLE_FP8_E8M0 -DFLASHINFER_ENABLE_FP4_E2M1 -DNDEBUG -O3"
)
HEADERS = ("cccl/cub", "cccl/libcudacxx/include", "cccl/thrust", "include", "csrc", "cutlass/include",
           "cutlass/tools/util/include", "spdlog/include")  # fmt: skip


def unpacked_wheel(release: str, into: Path, wheels: Path | None) -> Path:
    """The folder ``flashinfer/data`` of the release; its wheel is in the folder ``wheels`` or is downloaded."""
    if wheels is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
        subprocess.run([*command, f"flashinfer-python=={release}"], check=True)
    (wheel,) = (wheels or into).glob(f"flashinfer_python-{release}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into / "flashinfer" / "data"


def include_flags(data: Path, module: str, cuda: Path, into: Path) -> list[str]:
    """``-isystem`` of every folder of headers, the toolkit's first."""
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the headers of apache-tvm-ffi: pip install apache-tvm-ffi")
    folders = [cuda / "include", Path(spec.origin).parent / "include"]
    folders += [data / header for header in (*HEADERS, *EXTRA_HEADERS.get(module, ()))]
    if module in EXTRA_HEADERS and not (cuda / "include/cublas_v2.h").exists():
        stand_in = into / "cublas"
        stand_in.mkdir(exist_ok=True)
        for name in ("cublas_v2.h", "cublasLt.h"):
            (stand_in / name).write_text(CUBLAS_TYPE if name == "cublas_v2.h" else '#include "cublas_v2.h"\n')
        folders.append(stand_in)
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def build(data: Path, module: str, arch: str, cuda: Path, into: Path, jobs: int) -> Path:
    """Compile and link one module; its path. ``data`` is scratch."""
    includes = include_flags(data, module, cuda, data)
    device = [*FLAGS.split(), *EXTRA_FLAGS.get(module, ()), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    host = [*FLAGS.split()[:2], *EXTRA_FLAGS.get(module, ()), "-fPIC", "-std=c++17", "-O3", "-DNDEBUG"]
    objects = [data / f"{module}.{Path(source).stem}.o" for source in MODULES[module]]

    def compile_one(pair: tuple[str, Path]) -> None:
        source, out = pair
        compiler = ["c++", *host] if source.endswith(".cpp") else [str(cuda / "bin/nvcc"), *device]
        subprocess.run([*compiler, *includes, "-c", str(data / "csrc" / source), "-o", str(out)], check=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, zip(MODULES[module], objects, strict=True)))
    library = into / f"{module}.so"
    link = ["c++", "-shared", *map(str, objects), f"-L{cuda}/lib64", "-lcudart", "-s", "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def install(library: Path) -> None:
    """Put a library where the installed FlashInfer looks for modules built ahead of time."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise SystemExit("FlashInfer is not installed")
    target = Path(spec.origin).parent / "data" / "aot" / library.stem
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, target / library.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="of flashinfer-python, such as 0.6.18.post1")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--arch", default="90a", help="of nvcc's -gencode (default: 90a, Hopper)")
    parser.add_argument("--cuda", type=Path, default=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=["trtllm_mnnvl_comm"], metavar="MODULE")
    parser.add_argument("--wheels", type=Path, help="a folder that holds the release's wheel (default: download it)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    parser.add_argument("--install", action="store_true", help="into the installed FlashInfer as well")
    arguments = parser.parse_args()
    into = arguments.into / arguments.release
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = unpacked_wheel(arguments.release, Path(scratch), arguments.wheels)
        for module in arguments.modules:
            library = build(data, module, arguments.arch, arguments.cuda, into, arguments.jobs)
            print(library)
            if arguments.install:
                install(library)


if __name__ == "__main__":
    main()
