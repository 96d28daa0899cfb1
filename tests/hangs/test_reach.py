"""What the table says of our own runs: computed anew, and compared with what is generated and with what rows claim."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from hangs import reach
from ringfence.compile_passes.rules import KNOWN_UNSAFE
from ringfence.options import Options
from ringfence.runtime.collectives.flashinfer import SUPPORTED
from ringfence.runtime.hazards import checks
from ringfence.runtime.hazards.hazard import Check
from ringfence.runtime.hazards.reached import REACHED
from ringfence.runtime.hazards.situation import Fact, When
from ringfence.runtime.hazards.table import HAZARDS, Hazard
from ringfence.runtime.versions import parse_version

ROOT = Path(__file__).resolve().parents[2]
UNREACHED = [hazard for hazard in HAZARDS if hazard.id not in REACHED]


@pytest.mark.usefixtures("fake_group")
def test_the_generated_table_is_up_to_date() -> None:
    assert reach.reached() == REACHED, "stale: run `PYTHONPATH=tests python tests/hangs/reach.py`"


def test_a_row_says_why_no_run_reaches_it_exactly_where_none_does() -> None:
    for hazard in HAZARDS:
        reasons = [hazard.prevented_by, hazard.not_seen]
        assert sum(reason is not None for reason in reasons) == (hazard.id not in REACHED), hazard.id


@pytest.mark.usefixtures("fake_group")
def test_every_fact_of_a_cut_is_looked_for_in_a_graph_that_has_it() -> None:
    text = (ROOT / "compile_passes" / "facts.py").read_text()
    named = {Fact[name] for name in re.findall(r"Fact\.([A-Z0-9_]+)", text)} | set(KNOWN_UNSAFE.values())
    assert reach.careless_facts() == named
    assert reach.plan_facts() == {Fact.TWO_STREAMS}, "the judge's own plans have no other"


@functools.cache
def _chosen() -> dict[str, set[Fact]]:
    """Whom the product gives a call to, and the facts that it can say of that."""
    situations = set().union(*reach.all_judged(), reach.moe_situations())
    found: dict[str, set[Fact]] = {}
    for situation in situations:
        found.setdefault(situation.collective, set()).update(situation.facts)
    return found


def _out_of_reach(when: When, by: Check | None) -> bool:
    """Whether this reason keeps this condition from holding, as far as data can tell."""
    chosen = {name: facts for name, facts in _chosen().items() if not when.collectives or name in when.collectives}
    facts = set[Fact]().union(*chosen.values())
    if by is checks.RELEASES:
        return when.high is not None and parse_version(when.high) <= parse_version(SUPPORTED[0])
    if by is checks.NOT_OURS:
        return not chosen
    return bool(set(when.facts) - facts) or when.multicast is False or when.multi_node is True


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("hazard", UNREACHED, ids=lambda hazard: hazard.id)
def test_the_reason_is_of_the_kind_that_keeps_the_row_away(hazard: Hazard) -> None:
    by = hazard.prevented_by
    reasons = (by, checks.RELEASES, checks.NOT_OURS)
    assert all(any(_out_of_reach(when, reason) for reason in reasons) for when in hazard.when)
    if by in (checks.RELEASES, checks.NOT_OURS):
        assert all(_out_of_reach(when, by) for when in hazard.when)


def test_the_option_says_which_rows_make_it_act() -> None:
    acting = [id for id, by in REACHED.items() if any(len(set(what.values()) - {"IN_GRAPH"}) for what in by.values())]
    document = " ".join(str(Options.__doc__).split())
    (listed,) = re.findall(r"With the releases that run, ([M0-9, and]+) make it act", document)
    assert re.findall(r"M\d+", listed) == acting
