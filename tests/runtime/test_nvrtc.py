"""The compiler of ringfence's own kernels, and the folder that keeps what it made; the real one where it is there."""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ringfence.runtime.collectives import nvrtc
from ringfence.runtime.collectives.forms import GRANULE_DATA, CallArguments, Form, granules_of, granules_of_token
from ringfence.runtime.collectives.ringfence import CAPABILITIES
from ringfence.runtime.errors import WorkspaceError
from ringfence.runtime.hazards.situation import Strategy

needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
FUSED = Form(Strategy.ONE_SHOT, torch.bfloat16, 2, 2048, residual=True, norm=True, weight=True, blocks=1)


class FakeNvrtc:
    """Compiles a source to its own text."""

    def __init__(self, version: tuple[int, int] = (13, 0), log: bytes = b"") -> None:
        self.version, self.log, self.compiled = version, log, 0

    def nvrtcVersion(self) -> Any:
        return (0, *self.version)

    def nvrtcCreateProgram(self, source: bytes, *_: Any) -> Any:
        return 0, [source, ()]

    def nvrtcCompileProgram(self, program: Any, count: int, flags: list[bytes]) -> Any:
        assert count == len(flags)
        self.compiled += 1
        program[1] = tuple(flags)
        return (6 if self.log else 0,)

    def nvrtcGetProgramLogSize(self, program: Any) -> Any:
        return 0, len(self.log)

    def nvrtcGetProgramLog(self, program: Any, into: bytearray) -> Any:
        into[:] = self.log
        return (0,)

    def nvrtcGetCUBINSize(self, program: Any) -> Any:
        return 0, len(self._text(program))

    def nvrtcGetCUBIN(self, program: Any, into: bytearray) -> Any:
        into[:] = self._text(program)
        return (0,)

    def nvrtcDestroyProgram(self, program: Any) -> None:
        pass

    def _text(self, program: Any) -> bytes:
        return program[0] + b" ".join(program[1])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    found = FakeNvrtc()
    monkeypatch.setattr(nvrtc, "_library", lambda: found)
    return found


def test_what_was_compiled_once_is_read_from_the_folder(fake: FakeNvrtc, tmp_path: Path) -> None:
    first = nvrtc.cubin("a", (9, 0), tmp_path / "deep" / "er")
    assert first == b"a--gpu-architecture=sm_90 --std=c++17"
    assert nvrtc.cubin("a", (9, 0), tmp_path / "deep" / "er") == first and fake.compiled == 1


def test_the_name_of_a_file_holds_all_that_its_content_depends_on(
    fake: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.cubin("a", (9, 0), tmp_path)
    nvrtc.cubin("b", (9, 0), tmp_path)
    nvrtc.cubin("a", (10, 0), tmp_path)
    fake.version = (13, 1)
    nvrtc.cubin("a", (9, 0), tmp_path)
    monkeypatch.setattr(nvrtc, "FLAGS", ("--std=c++20",))
    nvrtc.cubin("a", (9, 0), tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    nvrtc.cubin("a", (9, 0), tmp_path)
    assert fake.compiled == 6 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]])
def test_a_file_that_was_cut_off_or_changed_is_made_anew(
    fake: FakeNvrtc, tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(nvrtc.log, "warning", lambda text, *values: said.append(text % values))
    right = nvrtc.cubin("a", (9, 0), tmp_path)
    (file,) = tmp_path.iterdir()
    assert nvrtc.cubin("a", (9, 0), tmp_path) == right and said == []
    file.write_bytes(damage(file.read_bytes()))
    assert nvrtc.cubin("a", (9, 0), tmp_path) == right and fake.compiled == 2
    assert said == [f"the kernel in {file} was cut off or changed; it is compiled anew"]
    assert nvrtc.cubin("a", (9, 0), tmp_path) == right and fake.compiled == 2


def test_a_folder_that_cannot_be_written_to_costs_time_only(fake: FakeNvrtc, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for turn in (1, 2):
        assert nvrtc.cubin("a", (9, 0), tmp_path / "file") and fake.compiled == turn


def test_a_write_that_fails_leaves_nothing(fake: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", refuse)
    assert nvrtc.cubin("a", (9, 0), tmp_path) and list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", lambda: FakeNvrtc(log=b"line 3: no such thing\n\0"))
    with pytest.raises(WorkspaceError, match=r"sm_90.*line 3: no such thing$"):
        nvrtc.cubin("a", (9, 0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-bindings" in str(nvrtc.missing()) and "pip install" in str(nvrtc.missing())
    with pytest.raises(WorkspaceError, match="pip install cuda-bindings"):
        nvrtc.cubin("a", (9, 0))


def test_the_folder_follows_the_users_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / "ringfence"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_folder() == Path.home() / ".cache" / "ringfence"


@pytest.mark.parametrize("row_bytes", [16, 112, 480, 496, 2048, 5760, 16384, 65536])
def test_the_warps_of_a_form_cover_its_row(row_bytes: int) -> None:
    for blocks in (1, 2, 4):
        form = Form(Strategy.ONE_SHOT, torch.bfloat16, 2, row_bytes, True, True, True, blocks)
        assert form.warps * form.rounds * blocks >= form.granules >= row_bytes / GRANULE_DATA
        assert 64 <= form.threads <= 1024
    assert granules_of_token(Strategy.ONE_SHOT, row_bytes, 4) == 3 * granules_of(row_bytes)


# -- the real compiler


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forms_compile_for_every_architecture(capability: tuple[int, int], tmp_path: Path) -> None:
    clusters = capability >= (9, 0)
    for strategy in (Strategy.ONE_SHOT, Strategy.TWO_SHOT):
        form = Form(strategy, torch.bfloat16, 2, 2048, True, True, True, 4 if clusters else 1)
        found = nvrtc.cubin(form.source, capability, tmp_path)
        assert found.startswith(b"\x7fELF") and b"entry" in found


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_epilogue_compiles(dtype: torch.dtype, tmp_path: Path) -> None:
    for residual, (norm, weight) in itertools.product((True, False), ((False, False), (True, True), (True, False))):
        form = Form(Strategy.ONE_SHOT, dtype, 3, 1040, residual, norm, weight, 1)
        assert nvrtc.cubin(form.source, (9, 0), tmp_path).startswith(b"\x7fELF")


@needs_compiler
def test_a_form_that_a_kernel_cannot_have_does_not_compile(tmp_path: Path) -> None:
    form = Form(Strategy.TWO_SHOT, torch.bfloat16, 8, 1024, True, True, True, 1)
    with pytest.raises(WorkspaceError, match="every rank has a share of each row"):
        nvrtc.cubin(form.source, (9, 0), tmp_path)
    source = replace(FUSED, blocks=2).source.replace("__cluster_dims__(2, 1, 1)", "")  # which is refused by itself
    assert nvrtc.cubin(source, (9, 0), tmp_path)
    with pytest.raises(WorkspaceError, match="several blocks have a norm in common from SM90 on"):
        nvrtc.cubin(source, (8, 0), tmp_path)


@needs_compiler
def test_the_arguments_lie_where_the_kernel_looks(tmp_path: Path) -> None:
    offsets = {name: getattr(CallArguments, name).offset for name, *_ in CallArguments._fields_}
    offsets["peers[6]"] = offsets["peers"] + 48
    checks = [f'static_assert(__INTADDR__(&(((Call *)0)->{n})) == {at}, "{n}");' for n, at in offsets.items()]
    checks.append(f'static_assert(sizeof(Call) == {ctypes.sizeof(CallArguments)}, "size");')
    nvrtc.cubin("\n".join([FUSED.source, *checks]), (9, 0), tmp_path)
    assert offsets["report"] > offsets["begun"] > offsets["peers"]
