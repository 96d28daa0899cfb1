"""NVRTC: CUDA C++ to a device's instructions, at run time, kept on disk.

The compiler is a library that torch's CUDA wheels bring, with cuda-bindings to call it; no toolkit is needed, and no
device. What was compiled once is kept in a folder of the user's: the name of a file is made of all that its content
depends on, and a file holds a checksum, so one that was cut off or changed is compiled anew, with a note in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import WorkspaceError

log = logging.getLogger(__name__)

FLAGS = ("--std=c++17",)
_DIGEST = 32  # bytes of the checksum before the instructions


def cubin(source: str, capability: tuple[int, int], folder: Path | None = None) -> bytes:
    """The instructions of a CUDA C++ source for devices of this capability; from ``folder`` if they are there.

    folder: :func:`cache_folder` unless given. Raises :class:`WorkspaceError` where there is no compiler, or the
    source has errors.
    """
    nvrtc = _library()
    flags = (f"--gpu-architecture=sm_{capability[0]}{capability[1]}", *FLAGS)
    place = (folder or cache_folder()) / f"{_key(source, flags, _checked(nvrtc, nvrtc.nvrtcVersion()))}.cubin"
    found = _read(place)
    if found is None:
        found = _compiled(nvrtc, source, flags)
        with contextlib.suppress(OSError):  # a home that cannot be written to: compiled again by the next process
            _write(place, found)
    return found


def cache_folder() -> Path:
    """Where instructions are kept: ``$XDG_CACHE_HOME/ringfence``, or ``~/.cache/ringfence``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringfence"


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        _library()
    except WorkspaceError as error:
        return str(error)
    return None


def _library() -> Any:
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-untyped, import-not-found, unused-ignore]

        nvrtc.nvrtcVersion()  # finds the library
    except ImportError as error:
        raise WorkspaceError(
            f"kernels are compiled through cuda-bindings, which torch's CUDA wheels bring: {error}; "
            "pip install cuda-bindings"
        ) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkspaceError(f"NVRTC cannot be loaded: {reason}; pip install nvidia-cuda-nvrtc") from error
    return nvrtc


def _key(source: str, flags: tuple[str, ...], compiler: tuple[Any, ...]) -> str:
    package = importlib.metadata.version("ringfence")
    return hashlib.sha256(repr((source, flags, compiler, package)).encode()).hexdigest()


def _compiled(nvrtc: Any, source: str, flags: tuple[str, ...]) -> bytes:
    (program,) = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"ringfence.cu", 0, [], []))
    try:
        result, *_ = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if int(result):
            log = _text(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            said = log.strip(b"\0 \n").decode(errors="replace")[:1000]
            raise WorkspaceError(f"a kernel cannot be compiled with {' '.join(flags)}: {said}")
        return _text(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, size_of: Any, read: Any, program: Any) -> bytes:
    (size,) = _checked(nvrtc, size_of(program))
    buffer = bytearray(size)
    _checked(nvrtc, read(program, buffer))
    return bytes(buffer)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(answer[0]):
        raise WorkspaceError(f"NVRTC says {answer[0]!r}")
    return answer[1:]


def _read(place: Path) -> bytes | None:
    try:
        content = place.read_bytes()
    except OSError:
        return None
    digest, found = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(found).digest() == digest:
        return found
    log.warning("the kernel in %s was cut off or changed; it is compiled anew", place)
    return None


def _write(place: Path, found: bytes) -> None:
    """Whole or not at all, whoever else writes it."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".", delete=False) as file:
        try:
            file.write(hashlib.sha256(found).digest() + found)
            file.close()
            os.replace(file.name, place)
        except BaseException:
            os.unlink(file.name)
            raise
