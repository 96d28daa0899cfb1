"""What ``ringfence explain`` compiles where it is no folder: what a function of the user's returns."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..runtime.errors import TargetError, on_one_line
from ..runtime.spelling import meant, near

T = TypeVar("T")

#: Names that are listed, of more.
_MOST = 8

_FORM = "a target is module:function, as my_module:make_model"


def named(target: str) -> tuple[str, str]:
    """The module and the function that a target names. Raises :class:`TargetError`; nothing is imported."""
    module, colon, function = target.rpartition(":")
    if not colon:
        raise TargetError(f"'{target}' is neither an existing folder nor module:function{_meant_by(target)}")
    if not module or not function:
        raise TargetError(f"'{target}' names no {'function' if module else 'module'}; {_FORM}")
    if "/" in module or "\\" in module or module.startswith("~") or module.endswith(".py"):
        raise TargetError(f"'{target}' names a file, and {_of_file(module, function)}")
    if not all(module.split(".")) or ":" in module or "\0" in module:
        raise TargetError(f"'{target}' names no module: '{module}' is none that can be imported by its name; {_FORM}")
    if not function.isidentifier():
        raise TargetError(f"'{target}' names no function: '{function}' is no name of one in '{module}'; {_FORM}")
    return module, function


def load_function(target: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The model of ``module:function`` and its inputs. A process group is there. Raises :class:`TargetError`."""
    import torch.distributed

    module_name, function_name = named(target)
    with _importable_from_here():
        function = _function(target, _module(target, module_name), function_name)
        result = _called(f"'{target}()'", function)
    if not torch.distributed.is_initialized():
        raise TargetError(f"'{target}()' destroyed the process group that it was called in; leave that out")
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[0])):
        types = [type(r).__name__ for r in result] if isinstance(result, tuple) else type(result).__name__
        raise TargetError(f"'{target}' must return (model, example_inputs), and returned {types}")
    model, inputs = result
    if isinstance(inputs, Mapping):
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


def _module(target: str, name: str) -> ModuleType:
    try:
        return _called(f"'{target}' cannot be imported: '{name}'", lambda: importlib.import_module(name))
    except TargetError as error:
        missing = getattr(error.__cause__, "name", None) if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise
        raise TargetError(
            f"'{target}' cannot be imported: there is no module '{missing}', neither installed nor in "
            f"'{Path.cwd()}', where modules are looked for as with python -m{meant(name, _modules_here())}"
        ) from error.__cause__


def _function(target: str, module: ModuleType, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if function is None:
        raise TargetError(
            f"'{target}' names no function: module '{module.__name__}' has no '{name}'; {_there(module, name)}"
        )
    if not callable(function):
        raise TargetError(f"'{target}' is of type {type(function).__name__}, and no function; {_FORM}")
    with contextlib.suppress(ValueError):  # some of C have no signature
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise TargetError(
                f"'{target}' is called without arguments, and: {error}; name a function that needs none, which may "
                "call this one"
            ) from error
    return function  # type: ignore[no-any-return]


def _there(module: ModuleType, name: str) -> str:
    """What is in a module instead."""
    own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    inside = [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    if near(name, own) is not None:
        return f"did you mean '{near(name, own)}'?"
    if name in inside:
        return f"'{name}' is a module of it: {module.__name__}.{name}:FUNCTION"
    if inside and not own:
        return f"it is a package of {', '.join(inside[:_MOST])}: {module.__name__}.{inside[0]}:{name}"
    return f"its functions: {', '.join(own[:_MOST]) or 'none'}"


def _called(what: str, call: Callable[[], T]) -> T:
    """Whatever the user's code raises is a :class:`TargetError`, and where it exits too."""
    try:
        return call()
    except SystemExit as error:
        raise TargetError(
            f"{what} ends the process (SystemExit: {error}); what a script does stands under if __name__ == '__main__'"
        ) from error
    except Exception as error:
        raise TargetError(f"{what} raised {on_one_line(error)}") from error


def _meant_by(target: str) -> str:
    """What somebody may have meant who named no function."""
    path = Path(target)
    if path.name == "config.json":
        return f"; name the folder of it: {path.parent}"
    if path.suffix == ".py":
        return f"; of a file, name the module and a function: {path.stem}:FUNCTION"
    if target.count("/") == 1 and not target.startswith((".", "/", "~")) and not target.endswith("/"):
        return "; a model of the Hub is downloaded first"
    if target.isidentifier():
        return f"; of a module, name a function too: {target}:FUNCTION"
    return "; a folder has a config.json, and a function is named as my_module:make_model"


def _of_file(path: str, function: str) -> str:
    """How what is in a file is named. path: of the file, with or without its suffix."""
    with contextlib.suppress(RuntimeError):  # ~somebody who is not known here
        path = str(Path(path).expanduser())
    file = Path(path if path.endswith(".py") else f"{path}.py")
    if not _is_file(file):
        return f"there is no file '{file}'; {_FORM}"
    if file.resolve().is_relative_to(Path.cwd()):
        return f"a module is named as for import, without its suffix: {_dotted(file, Path.cwd())}:{function}"
    root = file.resolve().parent
    while (root / "__init__.py").is_file():  # what is in a package is named by it
        root = root.parent
    return (
        "a module is named as for import, which looks here and in PYTHONPATH: "
        f"PYTHONPATH={root} ringfence explain {_dotted(file, root)}:{function}"
    )


def _dotted(file: Path, root: Path) -> str:
    return ".".join(file.resolve().relative_to(root).with_suffix("").parts)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _modules_here() -> list[str]:
    return [path.stem for path in Path.cwd().iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """As with ``python -m``: modules of the current folder can be named."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
