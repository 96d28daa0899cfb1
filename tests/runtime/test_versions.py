from __future__ import annotations

import pytest

from ringfence.runtime.errors import RingfenceError, VersionError
from ringfence.runtime.versions import in_range, parse_version

ASCENDING = [
    *("0.2.9", "0.6.0.dev1", "0.6.0a1", "0.6.0b1", "0.6.0rc1.dev2", "0.6.0rc1", "0.6", "0.6.0.post1.dev1"),
    *("0.6.0.post1", "0.6.4", "0.6.10.post1", "0.6.11", "0.6.11.post3", "0.6.12rc1", "0.6.12"),
    *("0.6.18.dev20260810", "0.6.18rc2", "0.6.18rc10", "0.6.18", "0.7.2.post1", "1.0"),
]


def test_versions_are_ordered_as_pip_orders_them() -> None:
    packaging = pytest.importorskip("packaging.version")
    assert sorted(ASCENDING, key=packaging.Version) == ASCENDING
    parsed = [parse_version(text) for text in ASCENDING]
    assert parsed == sorted(parsed) and len(set(parsed)) == len(parsed)


@pytest.mark.parametrize(
    ("one", "other"), [("0.6", "0.6.0"), ("v0.6.12", "0.6.12"), ("0.6.13+cu130", "0.6.13"), (" 0.6.18RC2", "0.6.18rc2")]
)
def test_the_same_version_in_two_spellings(one: str, other: str) -> None:
    assert parse_version(one) == parse_version(other)


@pytest.mark.parametrize("text", ["", "banana", "0.6.x", "main", "0..6", "0.6.12 or later", "0.6-"])
def test_what_is_not_a_version_is_refused_by_name(text: str) -> None:
    with pytest.raises(VersionError, match="not a version") as error:
        parse_version(text)
    assert f"'{text}'" in str(error.value) and isinstance(error.value, RingfenceError)


def test_ranges_include_the_low_end_only() -> None:
    assert in_range("0.6.10", "0.6.10", "0.6.13") and in_range("0.6.12", "0.6.10", "0.6.13")
    assert not in_range("0.6.13", "0.6.10", "0.6.13") and not in_range("0.6.9", "0.6.10", None)
    assert in_range("0.0.1", None, None)
