"""The hazard table: complete, sourced and shown; a page and JSON of it; checks of ours that it cites."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.runtime.errors import UnknownHazardError, VersionError
from ringfence.runtime.hazards import checks
from ringfence.runtime.hazards.catalogue import (
    HAZARDS,
    Action,
    Certainty,
    Collective,
    Fact,
    Hazard,
    Invariant,
    Situation,
    as_dict,
    as_markdown,
    find_hazard,
)
from ringfence.runtime.hazards.engine_default import ENGINE_DEFAULTS, barred_from_capture, engine_default
from ringfence.runtime.hazards.hazard import Check
from ringfence.runtime.hazards.table import REPOSITORIES
from ringfence.runtime.versions import parse_version
from support import run_python

ROOT = Path(__file__).resolve().parents[2]
CHECKS = {name: check for name, check in vars(checks).items() if isinstance(check, Check)}


def test_every_mechanism_has_one_row_in_order() -> None:
    assert [hazard.id for hazard in HAZARDS] == [f"M{number}" for number in range(1, 70)]


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.id)
def test_row_is_complete(hazard: Hazard) -> None:
    for field in ("title", "symptom", "mechanism", "remedy", "source"):
        assert getattr(hazard, field).strip(), field
    assert hazard.remedy.endswith(".") and hazard.mechanism.endswith(".") and hazard.symptom.endswith(".")
    assert (hazard.shown_by is None) != (hazard.not_shown is None)
    assert hazard.when and hazard.invariants
    assert hazard.decides not in hazard.instead
    for when in hazard.when:
        ends = [parse_version(end) for end in (when.low, when.high) if end]
        assert ends == sorted(set(ends))


@pytest.mark.parametrize("hazard", [h for h in HAZARDS if h.shown_by], ids=lambda hazard: hazard.id)
def test_row_names_a_test_that_exists(hazard: Hazard) -> None:
    path, _, name = str(hazard.shown_by).partition("::")
    assert (ROOT / path).is_file(), path
    functions = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions, f"{path} has no {name}"


def test_the_remedy_for_an_old_nccl_does_not_lead_into_the_next_hang() -> None:
    for id in ("M34", "M48", "M55"):
        assert "NCCL_GRAPH_REGISTER=0" in find_hazard(id).remedy


def test_a_string_that_is_no_version_is_refused() -> None:
    with pytest.raises(VersionError, match="'latest' is not a version"):
        Situation(Collective.MNNVL, "latest")


def test_decisions_follow_the_causes() -> None:
    assert find_hazard("M1").decides == Action.REFUSE  # splitting does not cure it
    assert Action.SPLIT not in find_hazard("M1").instead and Action.CLEAN_PAYLOAD in find_hazard("M1").instead
    assert [h.id for h in HAZARDS if h.certainty is Certainty.DISPROVED] == ["M44"]
    assert [h.id for h in HAZARDS if h.decides is Action.CAPTURE] == ["M44"]
    assert {h.id for h in HAZARDS if h.decides is Action.SPLIT} == {"M15", "M19", "M32", "M34", "M57"}
    with pytest.raises(UnknownHazardError, match="no hazard 'M99'"):
        find_hazard("M99")


def test_every_word_of_the_vocabulary_is_used() -> None:
    whens = [when for hazard in HAZARDS for when in hazard.when]
    assert {fact for when in whens for fact in when.facts} == set(Fact)
    assert {i for hazard in HAZARDS for i in hazard.invariants} == set(Invariant)
    assert {h.certainty for h in HAZARDS} == set(Certainty)


def test_json_is_plain_and_complete() -> None:
    table = json.loads(json.dumps(as_dict()))
    assert table["schema"] == 1 and len(table["hazards"]) == len(HAZARDS)
    first = table["hazards"][0]
    assert set(first) == {field.name for field in dataclasses.fields(Hazard)} | {"reached"}
    assert first["when"] == [{"collectives": ["mnnvl"], "high": "0.6.12", "payload": "subnormal"}]
    described = (ROOT / "docs" / "report.md").read_text()
    for name in itertools.chain(table, first, *(when for hazard in table["hazards"] for when in hazard["when"])):
        assert re.search(rf"`\.?{name}(\[\])?`", described), f"docs/report.md does not describe {name}"


def test_the_generated_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "hazards.md").read_text()
    assert page == as_markdown(), "stale: run `ringfence hazards --markdown > docs/hazards.md`"
    for name in REPOSITORIES:
        assert not re.search(rf"(?<!\[)\b{name}#\d+", page), f"a thread of {name} is not linked"


@pytest.mark.parametrize("document", ["hangs.md", "report.md", "design.md", "../README.md"])
def test_links_into_the_table_lead_somewhere(document: str) -> None:
    linked = re.findall(r"hazards\.md#(\w+)", (ROOT / "docs" / document).read_text())
    assert {row.upper() for row in linked} <= {hazard.id for hazard in HAZARDS} | {"INVARIANTS", "FACTS"}


def test_the_story_of_hangs_sends_to_most_rows() -> None:
    linked = set(re.findall(r"hazards\.md#(m\d+)", (ROOT / "docs" / "hangs.md").read_text()))
    assert len(linked) >= 35


def test_the_table_needs_no_torch() -> None:
    result = run_python("-c", "import sys, ringfence.runtime.hazards.catalogue; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


# -- the field's rule, for profile="conservative" ------------------------------------------------


@pytest.mark.parametrize(("collective", "captures"), [(Collective.MNNVL, False), (Collective.TRTLLM, True)])
def test_conservative_profile_goes_by_the_name(collective: Collective, captures: bool) -> None:
    rule = engine_default(collective)
    assert rule is not None and rule.captures is captures and rule.why and rule.source
    assert (barred_from_capture([Collective.TRTLLM, collective]) is rule) is not captures and barred_from_capture(
        [Collective.TRTLLM]
    ) is None


def test_conservative_profile_says_nothing_of_others() -> None:
    assert [rule.collective for rule in ENGINE_DEFAULTS] == [Collective.MNNVL, Collective.TRTLLM]
    assert engine_default(Collective.NCCL) is None and engine_default(Collective.REFERENCE) is None


# -- checks of ours --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_names_what_exists(name: str) -> None:
    path, _, place = CHECKS[name].where.partition("::")
    body = ast.parse((ROOT / path).read_text()).body
    for part in place.split("."):
        found = [node for node in body if part in _names(node)]
        assert found, f"{path} has no {place}"
        body = getattr(found[0], "body", [])


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def test_every_check_is_a_rows() -> None:
    used = {check for hazard in HAZARDS for check in (hazard.guard, hazard.prevented_by)}
    assert used - {None} == set(CHECKS.values())


def test_a_guard_is_what_acts_at_run_time_and_is_called() -> None:
    called = set(_called())
    for hazard in HAZARDS:
        assert (hazard.guard is not None) == (hazard.decides is Action.RUNTIME_GUARD), hazard.id
        if hazard.guard is not None:
            name = hazard.guard.where.rpartition("::")[2].rpartition(".")[2]
            assert name in called, f"{hazard.id}: nothing calls {name}"


def _called() -> Iterator[str]:
    for top in ("front", "compile_passes", "runtime"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    function = node.func
                    yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
