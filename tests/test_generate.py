"""``generate()`` of real Hugging Face models on two gloo ranks: eager's tokens, from replays.

Two architectures here, one whose plan installs hooks and one with experts and a sliding window; ``make support`` runs
all, and an assistant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generate_ranks import NEW, generate, save

from support import run_ranks

#: By name: so many layers. Those with a window take turns with those without.
SHARE = {"qwen3": 1, "gpt_oss": 2}
FIRST = "qwen3"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("models")
    for kind, layers in SHARE.items():
        save(folder, kind, layers)
    return run_ranks(2, generate, folder, list(SHARE), FIRST)


@pytest.mark.slow
@pytest.mark.xdist_group("generate")
@pytest.mark.parametrize("kind", SHARE)
def test_tokens_are_those_of_eager_and_all_steps_but_the_first_of_each_graph_are_replayed(
    results: list[dict[str, Any]], kind: str
) -> None:
    for result in (rank[kind] for rank in results):
        assert result["same"] == [True, True]
        assert result["fused"] == result["sites"] > 0
        graphs = {"qwen3": 1, "gpt_oss": 2}[kind]  # while the window fills, and when it is full
        assert result["graphs"] == graphs
        for how in result["how"]:  # the prompt's own step is eager, and makes the first token
            assert how == {"uncaptured": 1, "capture": graphs, "replay": NEW - 1 - graphs}


@pytest.mark.slow
@pytest.mark.xdist_group("generate")
def test_in_a_batch_and_by_a_compile_config(results: list[dict[str, Any]]) -> None:
    for result in (rank[FIRST] for rank in results):
        same, how = result["batch"]
        assert same and how == {"uncaptured": 1, "capture": 1, "replay": NEW - 2}
        assert result["config"] == {"same": [True, True], "graphs": 1}  # the reports are those of the one backend
