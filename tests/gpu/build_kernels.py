"""Build FlashInfer's all-reduce kernels of one release, for machines that cannot (no network, no compiler, no time).

python tests/gpu/build_kernels.py 0.6.18.post1 --into kernels/

Downloads the release's wheel, and compiles the sources in it as FlashInfer's own JIT would:
same flags, same macros. ``-use_fast_math`` is one of them; it is where the flush to zero
comes from that M1 needs. Needs nvcc, a C++ compiler, and ``apache-tvm-ffi`` for its headers.
No GPU. Writes ``INTO/RELEASE/trtllm_mnnvl_comm.so`` and, with ``--trtllm``, ``trtllm_comm.so``.

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
}

#: As `JitSpec.write_ninja` of FlashInfer 0.6.18 writes them.
FLAGS = (
    "-DPy_LIMITED_API=0x03090000 -D_GLIBCXX_USE_CXX11_ABI=1 --compiler-options=-fPIC --expt-relaxed-constexpr "
    "-static-global-template-stub=false -std=c++17 --threads=1 -use_fast_math -Xfatbin=-compress-all "
    "--compress-mode=size -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16 -DFLASHINFER_ENABLE_FP8_E4M3 "
    "-DFLASHINFER_ENABLE_FP8_E5M2 -DFLASHINFER_ENABLE_FP8_E8M0 -DFLASHINFER_ENABLE_FP4_E2M1 -DNDEBUG -O3"
)
HEADERS = ("cccl/cub", "cccl/libcudacxx/include", "cccl/thrust", "include", "csrc", "cutlass/include",
           "cutlass/tools/util/include", "spdlog/include")  # fmt: skip


def unpacked_wheel(release: str, into: Path) -> Path:
    """The folder ``flashinfer/data`` of the release."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    subprocess.run([*command, f"flashinfer-python=={release}"], check=True)
    (wheel,) = into.glob("flashinfer_python-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into / "flashinfer" / "data"


def build(data: Path, module: str, arch: str, cuda: Path, into: Path) -> Path:
    """Compile and link one module; its path."""
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the headers of apache-tvm-ffi: pip install apache-tvm-ffi")
    includes = [cuda / "include", Path(spec.origin).parent / "include", *(data / header for header in HEADERS)]
    flags = [*FLAGS.split(), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    for include in includes:
        flags += ["-isystem", str(include)]
    objects = [into / f"{module}.{Path(source).stem}.o" for source in MODULES[module]]

    def compile_one(pair: tuple[str, Path]) -> None:
        source, out = pair
        subprocess.run([str(cuda / "bin/nvcc"), *flags, "-c", str(data / "csrc" / source), "-o", str(out)], check=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(MODULES[module], objects, strict=True)))
    library = into / f"{module}.so"
    link = ["c++", "-shared", *map(str, objects), f"-L{cuda}/lib64", "-lcudart", "-s", "-o", str(library)]
    subprocess.run(link, check=True)
    for file in objects:
        file.unlink()
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
    parser.add_argument("--trtllm", action="store_true", help="the trtllm module too (minutes)")
    parser.add_argument("--install", action="store_true", help="into the installed FlashInfer as well")
    arguments = parser.parse_args()
    into = arguments.into / arguments.release
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = unpacked_wheel(arguments.release, Path(scratch))
        for module in MODULES if arguments.trtllm else ("trtllm_mnnvl_comm",):
            library = build(data, module, arguments.arch, arguments.cuda, into)
            print(library)
            if arguments.install:
                install(library)


if __name__ == "__main__":
    main()
