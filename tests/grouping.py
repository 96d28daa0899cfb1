"""Which worker of pytest-xdist runs a test, and when: those of a group on one worker, the slow ones first.

xdist 3.8 groups by what it writes behind a test's name, and pytest 9.2 keeps that name elsewhere than where it writes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def group_of(item: pytest.Item) -> str:
    """What its ``xdist_group`` says; without one its file, so that fixtures of a module are made once."""
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark is not None else item.nodeid.split("::")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Only in a worker. The order is kept by ``--no-loadscope-reorder``: else a slow group could be left to the end."""
    if not getattr(config.option, "loadgroup", False):
        return
    groups = {item: group_of(item) for item in items}
    slow = {groups[item] for item in items if item.get_closest_marker("slow")}
    sizes = Counter(groups.values())
    items.sort(key=lambda item: (groups[item] not in slow, -sizes[groups[item]], groups[item]))
    for item in items:
        suffix = f"@{groups[item]}"
        item._id = type(item.id).parse(item.nodeid.removesuffix(suffix) + suffix)
