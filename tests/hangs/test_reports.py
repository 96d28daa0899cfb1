"""Twenty-two public reports: each leads to its row and remedy, by its words and by its facts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hangs import reports
from hangs.reports import PAGE, REPORTS, answer, answers
from ringfence.cli import main
from ringfence.commands.terminal import FAILED, OK, USAGE
from ringfence.runtime.hazards.catalogue import HAZARDS, find_hazard
from ringfence.runtime.hazards.search import search, words

#: For each report, the row that is right, and what a reader of its remedy must meet.
RIGHT: dict[str, tuple[str, tuple[str, ...]]] = {
    "V#51513, nccl#2079": ("M51", ("NCCL_P2P_DISABLE=1", "ACS")),
    "FlashInfer 0.7.2's barrier": ("M58", ("0.7.2",)),
    "V#48071, V#48075": ("M50", ("ringfence bench", "auto")),
    "nccl#2389, nccl#2390": ("M55", ("NCCL_GRAPH_REGISTER=0",)),
    "nccl#2334": ("M55", ("NCCL_GRAPH_REGISTER=0",)),
    "torch_memory_saver#88": ("M31", ("NCCL_GRAPH_REGISTER=0",)),
    "PT#189228, rccl#2179": ("M37", ("stream", "communicator")),
    "PT#191681": ("M57", ("branch",)),
    "V#54626": ("M34", ("windows before the capture",)),
    "SGL#37561, SGL#33871": ("M25", ("reduced over the group",)),
    "SGL#27221": ("M25", ("reduced over the group",)),
    "V#54269": ("M61", ("pinned buffer",)),
    "V#41725": ("M28", ("the rank that did not enter",)),
    "FI#4089": ("M54", ("SYS_PTRACE", "pidfd_getfd")),
    "SGL#29073, PT#195596, torchcomms#3130": ("M52", ("nvidia-fabricmanager", "NCCL_NVLS_ENABLE=0")),
    "mscclpp#467, k8s-dra-driver-gpu#892, V#51986": ("M53", ("/dev/nvidia-caps-imex-channels", "IMEX domain")),
    "V#45520, V#45552, V#44483, V#50011": ("M56", ("Drain", "unmap")),
    "FlashInfer 0.7.2, V#39942, V#30112, Mooncake#3963": ("M59", ("not enough",)),
    "FI#3971, SGL#30919": ("M60", ("0.6.15",)),
    "SGL#35822": ("M60", ("another backend",)),
    "SGL#29548": ("M55", ("NCCL_GRAPH_REGISTER=0",)),
    "verl#7846, SGL#29485": ("M25", ("reduced over the group",)),
}


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.threads)
def test_a_report_leads_to_its_row_and_remedy(report: reports.Report) -> None:
    expected, remedy = RIGHT[report.threads]
    row = answer(report)
    assert row is not None and row.id == expected
    assert all(text in row.remedy for text in remedy)
    by_words, by_facts = answers(report)
    assert row in by_words[:2] and row in by_facts
    assert main(["hazards", "--symptom", report.seen]) == OK


def test_all_of_them_are_told_apart() -> None:
    assert list(RIGHT) == [report.threads for report in REPORTS] and len(REPORTS) == 22


def test_the_situation_alone_does_not_give_the_answer_away() -> None:
    """Without its facts the row does not apply; a table that answers everything would pass the tests above."""
    for report in REPORTS:
        row = answer(report)
        assert row not in answers(replace(report, situation=replace(report.situation, facts=frozenset())))[1]
        assert sum(row in answers(other)[1] for other in REPORTS) <= 6


def test_the_table_of_the_page_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert reports.page(text) == text, "stale: run `PYTHONPATH=tests python tests/hangs/reports.py`"
    assert text.count("\n| ") > 22


#: The same troubles as somebody else would put them.
SAID_OTHERWISE = {
    "vllm start-up freezes at TP=2 on PCIe boards, NCCL_P2P_DISABLE=1 helps, iommu is on": "M51",
    "decode got 30x slower with the flashinfer allreduce on H100 NVL": "M50",
    "two nodes, replays hang at 100 %, no error": "M55",
    "CUDA error 802 system not yet initialized, symmetric memory rendezvous never ends": "M52",
    "engine crashes with illegal memory access when waking from sleep": "M56",
    "no permission for pidfd_getfd in docker": "M54",
    "mnnvl spins for ever, polled word is 0x80000001": "M1",
    "the norm is zero in float16": "M49",
    "every GPU sits in the same EAGLE verify kernel": "M60",
    "NCCL hangs after the memory pool was resumed": "M31",
    "a rank of elastic EP was masked and comes back, dispatch hangs": "M59",
    "IMEX channel missing, cuMemCreate fails on GB200": "M53",
}


@pytest.mark.parametrize("said", SAID_OTHERWISE)
def test_other_words_lead_there_too(said: str) -> None:
    found = [match.hazard.id for match in search(said)]
    assert SAID_OTHERWISE[said] in found[:2], found


def test_a_row_is_found_by_its_own_symptom() -> None:
    for hazard in HAZARDS:
        assert search(hazard.symptom + " " + hazard.title)[0].hazard is hazard, hazard.id


@pytest.mark.parametrize(
    ("thread", "ids"),
    [
        ("nccl#2389", ["M55"]),
        ("NVIDIA/nccl#2334", ["M55"]),
        ("V#51513", ["M51"]),
        ("see fi#5081 there", ["M17"]),
        ("vllm#45448", ["M16"]),
        ("vllm-project/vllm#45448", ["M16"]),
        ("https://github.com/vllm-project/vllm/issues/45448#issuecomment-1", ["M16"]),
        ("as in github.com/flashinfer-ai/flashinfer/pull/3053", ["M1"]),
    ],
)
def test_a_thread_is_looked_up_among_the_sources(thread: str, ids: list[str]) -> None:
    assert [match.hazard.id for match in search(thread)] == ids
    assert search("nccl#238") == (), "no other number"
    assert search("nccl#238, replays hang") == search("replays hang")


def test_words_that_nobody_uses_find_nothing() -> None:
    assert search("") == search("the of and") == search("zzz qqq") == search("%$ 7") == ()
    assert words("Hangs; HUNG all-reduce 0x8000, 0.7.2") == ["hang", "hang", "all-reduc", "reduc", "0x8000", "0.7.2"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["hazards", "--symptom", "rare wrong sums in two-shot, sizes vary"]) == OK
    out = capsys.readouterr().out
    assert out.startswith("M58  ") and f"  remedy   {find_hazard('M58').remedy[:40]}" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "http" not in line)
    assert main(["hazards", "--symptom", "nccl#2389", "--json"]) == OK
    assert [h["id"] for h in json.loads(capsys.readouterr().out)["hazards"]] == ["M55"]
    assert main(["hazards", "--symptom", "zzz"]) == FAILED
    captured = capsys.readouterr()
    assert "no row says 'zzz'" in captured.err
    for wrong in (["M1", "--symptom", "hang"], ["--symptom", "hang", "--markdown"], ["--symptom"]):
        with pytest.raises(SystemExit) as ended:
            main(["hazards", *wrong])
        assert ended.value.code == USAGE
