from __future__ import annotations

import builtins
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import ringfence
from ringfence import options
from ringfence.keywords import OptionKeywords, WatchKeywords
from ringfence.options import Options
from ringfence.runtime import errors
from ringfence.runtime.collectives import table
from ringfence.runtime.errors import OptionsError, RingfenceError, SizeTableError
from ringfence.runtime.watch.settings import OF_PROCESS


def test_options_by_place_and_the_class_in_place_of_an_instance() -> None:
    with pytest.raises(OptionsError, match="by name"):
        ringfence.Backend([4])  # type: ignore[arg-type]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"an instance: backend=Backend\(\.\.\.\)"):
        torch.compile(lambda x: x + 1, backend=ringfence.Backend)(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"colective": "auto"}, ["unknown option 'colective'; did you mean 'collective'?"]),
        ({"frobnicate": 1}, ["unknown option 'frobnicate'; the options are fuse, ", "capture_sizes"]),
        ({"collective": "nccl"}, ["collective='nccl'", "reference"]),
        ({"collective": None}, ["collective=None"]),
        ({"piece_compiler": "triton"}, ["piece_compiler", "inductor", "eager"]),
        ({"numerics": "fast"}, ["numerics", "strict"]),
        ({"graphs": "hip"}, ["graphs", "simulated"]),
        ({"verify": 1}, ["verify=1", "bool"]),
        ({"static_outputs": "yes"}, ["static_outputs"]),
        ({"capture_sizes": [0]}, ["capture_sizes", "0"]),
        ({"capture_sizes": [4, "8"]}, ["capture_sizes", "'8'"]),
        ({"capture_sizes": [True]}, ["capture_sizes", "True"]),
        ({"capture_sizes": 8}, ["capture_sizes=8"]),
        ({"capture_sizes": "18"}, ["capture_sizes"]),
        ({"max_tokens": 0}, ["max_tokens=0"]),
        ({"max_tokens": 4, "capture_sizes": [2, 8]}, ["8", "max_tokens=4"]),
        ({"split_ops": "aten::mm"}, ["split_ops", "list"]),
        ({"split_ops": ["mm"]}, ["split_ops", "'mm'", "namespace::name"]),
        ({"split_ops": [3]}, ["split_ops", "3"]),
        ({"groups": "0"}, ["groups", "list"]),
        ({"groups": []}, ["groups", "None means every group"]),
        ({"groups": [3]}, ["groups", "3", "no process group"]),
        ({"skip_sites": None}, ["skip_sites=None", "list"]),
        ({"all_reduce_ops": {"lib::ar": 0}}, ["all_reduce_ops"]),
        ({"all_reduce_ops": ["ar"]}, ["all_reduce_ops", "'ar'"]),
        ({"pad_to_capture_size": True}, ["pad_to_capture_size", "capture_sizes"]),
        ({"on_report": 3}, ["on_report=3", "callable"]),
        ({"on_hang": "ignore"}, ["on_hang='ignore'", "abort"]),
        ({"on_capture_failure": None}, ["on_capture_failure=None", "uncaptured"]),
        ({"check_every_step": "yes"}, ["check_every_step='yes'", "bool"]),
        ({"step_seconds": 0}, ["step_seconds=0", "positive"]),
        ({"kernel_wait_seconds": -1}, ["kernel_wait_seconds=-1", "positive"]),
        ({"agree_seconds": float("inf")}, ["agree_seconds=inf", "positive"]),
        ({"warm_up_seconds": "60"}, ["warm_up_seconds='60'", "seconds"]),
        ({"warm_up_seconds": 30}, ["step_seconds is more than warm_up_seconds"]),
        ({"journal_dir": 3}, ["journal_dir=3", "folder"]),
        ({"journal_dir": ""}, ["journal_dir=''", "folder"]),
        ({"fuse": 0}, ["fuse=0", "bool"]),
        ({"skip_sites": "model.layers.3"}, ["skip_sites", "list"]),
        ({"fuse": False, "deterministic": True, "max_tokens": 8}, ["fuse=False", "deterministic=True"]),
        ({"moe_dispatch": True, "deterministic": True, "max_tokens": 8}, ["moe_dispatch=True", "deterministic=True"]),
        ({"fuse": False, "collective": "trtllm"}, ["fuse=False", "collective='trtllm'", "leave it out"]),
        ({"fuse": False, "skip_sites": ["a"], "verify": True}, ["skip_sites=('a',)", "verify=True", "leave them out"]),
    ],
)
def test_bad_option_is_refused_by_name(options: dict[str, object], names: list[str]) -> None:
    with pytest.raises(OptionsError) as error:
        ringfence.Backend(**options)
    assert all(name in str(error.value) for name in names), str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, RingfenceError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": True}, "needs max_tokens"),
        ({"transport": "peer", "collective": "trtllm"}, "is for collective='mnnvl'"),
        ({"transport": "nvlink"}, "is not one of"),
        ({"plain_all_reduce": 1}, "is not a bool"),
        ({"size_table": 3}, "is not a path"),
        ({"journal_dir": "/dev/null/journals"}, "cannot be written"),
        ({"size_table": "/nowhere/table.json"}, "cannot be read"),
    ],
)
def test_bad_options_of_the_collective(options: dict[str, Any], message: str) -> None:
    with pytest.raises((OptionsError, SizeTableError), match=message):
        Options.parse(options)


def test_a_folder_for_journals_has_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path would be made, and its files be looked for elsewhere; nothing is made before there is a file."""
    with pytest.raises(OptionsError, match=f"'{tmp_path}/lgo' does not exist, and only the last level"):
        Options(journal_dir=tmp_path / "lgo" / "deep" / "job")
    monkeypatch.chdir(tmp_path)
    assert Options(journal_dir="job").journal_dir == str(tmp_path / "job")
    assert Options(journal_dir=tmp_path).journal_dir == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionsError, match=r"cannot be written.*name too long"):
        Options(journal_dir=tmp_path / ("j" * 300))


def test_options_built_directly_are_checked_too() -> None:
    assert Options(capture_sizes=[8, 1]).capture_sizes == (1, 8)
    assert Options(capture_sizes=[8, 1]) == ringfence.Backend(capture_sizes=[8, 1]).options
    assert dataclasses.replace(Options(capture_sizes=[4]), max_tokens=8).capture_sizes == (4,)
    for wrong in ({"capture_size": [1]}, {"on_hang": 3}, {"max_tokens": 4, "capture_sizes": [8]}, {"verify": 1}):
        with pytest.raises(OptionsError):
            Options(**wrong)
    with pytest.raises(OptionsError, match="max_tokens=4"):
        dataclasses.replace(Options(capture_sizes=[8]), max_tokens=4)
    with pytest.raises(OptionsError, match="by name"):
        Options([1])


def test_a_backend_takes_options_and_what_differs() -> None:
    given = Options(capture_sizes=[1], step_seconds=5, on_hang=None)
    with ringfence.Backend(given, verify=True) as backend:
        assert backend.options == Options(capture_sizes=[1], step_seconds=5, verify=True)
        assert backend.asked.process == {"step_seconds": 5}
    assert backend.asked.process == {}, "not closed"
    with pytest.raises(OptionsError, match="max_tokens=2"):
        ringfence.Backend(Options(capture_sizes=[4]), max_tokens=2)


def test_what_type_checkers_see_is_what_there_is() -> None:
    """The keywords are the fields, their words the ones that are accepted, their defaults among them."""
    fields = {f.name: f for f in dataclasses.fields(Options)}
    hints = OptionKeywords.__annotations__
    assert set(hints) == set(fields)
    for name, field in fields.items():
        if name in options._CHOICES:
            assert field.default in options._CHOICES[name], name
            assert field.type == ("str | None" if None in options._CHOICES[name] else "str"), name
        assert (field.type == "bool") == (name in options._FLAGS), name
    assert {"collective", "on_hang", "on_hazard"} < set(options._CHOICES) and len(options._FLAGS) == 10
    assert set(options._CHOICES["collective"]) == {"auto", *(str(one.name) for one in table.ALL)}
    assert tuple(OF_PROCESS) == tuple(name for name in WatchKeywords.__annotations__ if name in OF_PROCESS)


def test_an_option_of_inductor_is_said_to_be_one() -> None:
    with pytest.raises(OptionsError, match=r"set torch\._inductor\.config\.triton\.cudagraphs"):
        ringfence.Backend(**{"triton.cudagraphs": True})


def test_groups_may_be_groups() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    group = dist.group.WORLD
    try:
        assert Options(groups=[group, "tp:0"]).groups == (group.group_name, "tp:0")
    finally:
        dist.destroy_process_group()


def test_options_are_normalised() -> None:
    options = ringfence.Backend(
        capture_sizes=[8, 1, 8], split_ops=["aten::mm"], all_reduce_ops=["lib::ar"], max_tokens=8
    ).options
    assert options.capture_sizes == (1, 8)
    assert options.all_reduce_ops == {"lib::ar": None}
    assert ringfence.Backend().options == ringfence.Options()
    assert options.as_dict()["capture_sizes"] == [1, 8]


def test_a_backend_shows_what_was_asked_of_it() -> None:
    assert repr(ringfence.Backend()) == "<ringfence.Backend(), 0 reports>"
    backend = ringfence.Backend(capture_sizes=[16, 1], numerics="kernel", on_hang=None, verify=True)
    assert repr(backend) == "<ringfence.Backend(capture_sizes=(1, 16), verify=True), 0 reports>"
    backend.reports.append(None)  # type: ignore[arg-type]
    assert repr(backend).endswith(", 1 report>")


def test_every_error_is_importable_from_the_package() -> None:
    """What a user may have to catch. Each class of errors.py, and each that anything raises, is one."""
    classes = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception | Warning)}
    assert len(classes) > 30 and classes <= set(ringfence.__all__)
    assert all(getattr(ringfence, name) is getattr(errors, name) for name in classes)
    package = Path(ringfence.__file__).parent.parent
    raised: set[str] = set()
    for folder in ("front", "compile_passes", "runtime"):
        for file in (package / folder).rglob("*.py"):
            raised |= set(re.findall(r"raise (\w+(?:Error|Mismatch|Warning))\b", file.read_text()))
    own = raised - set(vars(builtins))
    assert len(own) > 15 and own <= classes | {"ArgumentTypeError"}, own - classes
