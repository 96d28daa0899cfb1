"""Which FlashInfer is loaded, and why another is not: packages that are made for the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringfence.runtime.collectives.flashinfer import CONTRACT, FlashInfer, Unavailable, load

ALLREDUCE = """
class AllReduceFusionPattern:
    kAllReduce, kARResidualRMSNorm = 0, 1
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FlashInfer | Unavailable]]:
    """Install a FlashInfer with this version and these texts in place of a module's, and load it."""
    original = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "flashinfer"}

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] == "flashinfer"]:
            del sys.modules[name]

    def install(version: str = "0.6.18", **texts: Callable[[str], str]) -> FlashInfer | Unavailable:
        modules: dict[str, str] = {"flashinfer": f"__version__ = {version!r}\n", "flashinfer.comm": ""}
        for name, parameters in CONTRACT.items():
            module, _, function = name.partition(":")
            text = modules.setdefault(module, ALLREDUCE if module.endswith(".allreduce") else "")
            modules[module] = text + f"def {function}({', '.join(parameters)}): ...\n"
        for module, text in modules.items():
            path = tmp_path / module.replace(".", "/")
            path.mkdir(parents=True, exist_ok=True)
            (path / "__init__.py").write_text(texts.get(module.rpartition(".")[2], str)(text))
        return load()

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    forget()
    sys.modules.update(original)


Install = Callable[..., FlashInfer | Unavailable]


def reason(found: FlashInfer | Unavailable) -> str:
    assert isinstance(found, Unavailable), found
    return found.reason


def test_a_package_that_keeps_the_contract_is_loaded(package: Install) -> None:
    found = package()
    assert isinstance(found, FlashInfer) and found.version == "0.6.18"
    assert {name.partition(":")[0] for name in CONTRACT} <= {*found.modules}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert reason(load()) == "FlashInfer is not installed: pip install '.[flashinfer]' in a clone of ringfence"


def test_a_package_that_lacks_a_dependency(package: Install) -> None:
    said = reason(package(mnnvl=lambda text: "import surely_nobody_has_this\n"))
    assert said == "FlashInfer cannot be imported: No module named 'surely_nobody_has_this'"


@pytest.mark.parametrize("error", ["AssertionError('no CUDA runtime')", "OSError('libcuda.so.1')"])
def test_a_package_that_fails_to_import(package: Install, error: str) -> None:
    said = reason(package(flashinfer=lambda text: f"raise {error}\n"))
    assert said.startswith("FlashInfer cannot be imported: ") and error.split("'")[1] in said


@pytest.mark.parametrize("version", ["0.6.17.post2", "0.8.0", "0.6.18rc1"])
def test_releases_that_were_not_read_are_refused(package: Install, version: str) -> None:
    assert reason(package(version)) == f"FlashInfer {version} is not supported; install 0.6.18 or later, before 0.8"


@pytest.mark.parametrize("version", ["0.6.18", "0.6.18.post1+cu130", "0.7.2.post1"])
def test_releases_that_were_read_are_taken(package: Install, version: str) -> None:
    assert isinstance(package(version), FlashInfer)


def test_a_build_without_a_version(package: Install) -> None:
    assert reason(package("unknown")).startswith("FlashInfer unknown cannot be read: 'unknown' is not a version")


@pytest.mark.parametrize("name", CONTRACT)
def test_a_function_that_is_gone(package: Install, name: str) -> None:
    module, _, function = name.partition(":")
    said = reason(package(**{module.rpartition(".")[2]: lambda text: text.replace(f"def {function}(", "def other(")}))
    assert said == f"FlashInfer 0.6.18 has another API: {name} is gone"


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, parameters in CONTRACT.items() for p in parameters])
def test_a_parameter_that_is_gone(package: Install, name: str, parameter: str) -> None:
    module, _, function = name.partition(":")
    before = f"def {function}({', '.join(CONTRACT[name])})"
    after = f"def {function}({', '.join(p for p in CONTRACT[name] if p != parameter)})"
    said = reason(package(**{module.rpartition(".")[2]: lambda text: text.replace(before, after)}))
    assert said == f"FlashInfer 0.6.18 has another API: {name} has no parameter {parameter}"


def test_a_pattern_with_another_code(package: Install) -> None:
    said = reason(package(allreduce=lambda text: text.replace("= 0, 1", "= 0, 2")))
    assert said == "FlashInfer 0.6.18 has another API: AllReduceFusionPattern.kARResidualRMSNorm is not 1"


def test_patterns_that_are_gone(package: Install) -> None:
    said = reason(package(allreduce=lambda text: text.replace("class AllReduceFusionPattern", "class Other")))
    assert "kAllReduce is not 0; AllReduceFusionPattern.kARResidualRMSNorm is not 1" in said


def test_a_function_without_a_signature(package: Install) -> None:
    broken = "SymmDeviceMemory = type\n"  # inspect.signature(type) raises ValueError
    assert reason(package(mnnvl=lambda text: broken)).startswith("FlashInfer 0.6.18 cannot be read: ")
