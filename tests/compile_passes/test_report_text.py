"""The printed report: equal layers are one row, and lines fit the width that is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from backend_model import Model, rows

import ringfence
from ringfence.compile_passes.report import CompileReport
from ringfence.compile_passes.report_text import ranges
from support import start_fake_group

LAYERS = 12


@pytest.fixture(scope="module")
def report() -> CompileReport:
    start_fake_group(2)
    model = Model(layers=LAYERS)
    backend = ringfence.Backend(piece_compiler="eager", capture_sizes=[4], graphs="simulated")
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(rows(4))
    dist.destroy_process_group()
    return backend.reports[0]


def test_equal_layers_are_one_row_and_so_are_parts_that_come_again(report: CompileReport) -> None:
    text = report.text()
    assert "layers.1-11: as layers.0" in text
    (folded,) = [line for line in text.splitlines() if "as layers.0" in line]
    assert folded.split()[0] == "1-11"
    assert sum("all_reduce_add_rms_norm  " in line for line in text.splitlines()) == 1
    assert len(report.pieces) == 2 * LAYERS and "the same" in text
    assert len(text.splitlines()) < 25
    assert len(report.to_dict()["sites"]) == LAYERS  # the JSON has all


def test_a_layer_that_differs_is_not_folded(report: CompileReport) -> None:
    other = dataclasses.replace(report.sites[5], eps=1e-3)
    text = dataclasses.replace(report, sites=(*report.sites[:5], other, *report.sites[6:])).text()
    assert "layers.1-4: as layers.0" in text and "layers.7-11: as layers.6" in text
    (row,) = [line for line in text.splitlines() if line.startswith("5 ")]
    assert "0.001" in row and "layers.5" in row


@pytest.mark.parametrize("width", [80, 160])
def test_lines_fit(report: CompileReport, width: int) -> None:
    deep = tuple(
        dataclasses.replace(s, module=f"model.language_model.model.{s.module}.feed_forward.down_proj")
        for s in report.sites
    )
    long = dataclasses.replace(report, sites=deep, notes=(*report.notes, "word " * 60))
    text = long.text(width)
    assert max(map(len, text.splitlines())) <= width
    assert max(map(len, long.text().splitlines())) > 160  # nothing is lost where nobody reads in a terminal


@pytest.mark.parametrize(("numbers", "said"), [([0], "0"), ([0, 1], "0-1"), ([3, 0, 1, 2, 7], "0-3, 7"), ([], "")])
def test_ranges(numbers: list[int], said: str) -> None:
    assert ranges(numbers) == said
