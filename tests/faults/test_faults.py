"""One rank goes wrong: all others end in time and say which one, in which call."""

from __future__ import annotations

import pytest
from faults.catalogue import FAULTS, Fault
from faults.run import run_fault


def _name(fault: Fault) -> str:
    checked = ", every step checked" if "check_every_step" in fault.options else ""
    reported = ", after the report" if fault.name == "interrupted" and fault.on_hang == "report" else ""
    after = f" after {fault.before.name}" if fault.before is not None else ""
    return f"{fault.name}{after} on rank {fault.rank}{checked}{reported}{', unwatched' * (fault.on_hang is None)}"


@pytest.mark.xdist_group("faults")  # one at a time: each runs three processes
@pytest.mark.parametrize("fault", FAULTS, ids=_name)
def test_all_other_ranks_end_in_time_and_name_it(fault: Fault) -> None:
    outcome = run_fault(fault)
    assert not outcome.problems()
