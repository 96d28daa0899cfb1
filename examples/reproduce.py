"""The founding hang, twice: mnnvl fusion captured inside piecewise CUDA graphs (A), and as a split op between them (B).

    python examples/reproduce.py --model                    # what the protocol's model says; needs no GPU
    python examples/reproduce.py --kernels DIR              # with FlashInfer's own kernels, on one GPU

DIR is where tests/gpu/build_kernels.py has put the kernels of the releases below. docs/reproduce.md explains both.
Exits with 0 where everything hangs that hung as published, and nothing else does.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tabulate import tabulate  # noqa: E402

from gpu import emulate  # noqa: E402
from gpu.cases import NEVER, RETURNED  # noqa: E402
from gpu.children import run_child  # noqa: E402
from gpu.recipes import BY_REFERENCE, CLEANED, NO_LEFT_OVERS, PUBLISHED, RECIPES, STEPS, TOKENS, Recipe  # noqa: E402
from ringfence.runtime.hazards.situation import Collective, Payload, Situation, Strategy  # noqa: E402
from ringfence.runtime.protocol import timeline  # noqa: E402
from ringfence.runtime.protocol.calls import Calls, changed  # noqa: E402
from ringfence.runtime.protocol.explore import ModelFailure, Result  # noqa: E402
from ringfence.runtime.protocol.plan import PlannedPiece, PlannedRank, PlannedSite, check, programs  # noqa: E402

AFFECTED, FIXED, NEWEST = "0.6.10.post1", "0.6.13", "0.6.18.post1"
SAYS = {None: RETURNED, ModelFailure.DEADLOCK: NEVER}
#: Of one case: starting torch and compiling takes most of it.
SECONDS = 120
#: At once: each case that hangs takes a share of the one GPU until it is killed.
TOGETHER = 3


@dataclass(frozen=True)
class Case:
    recipe: str
    release: str
    how: str

    @property
    def expected(self) -> str:
        """As published: releases before 0.6.12, wherever the call is, as soon as such a word is sent."""
        return NEVER if (self.release, self.how) == (AFFECTED, PUBLISHED) else RETURNED


def cases(recipes: Sequence[str]) -> Iterator[Case]:
    for recipe in recipes:
        for how in (PUBLISHED, NO_LEFT_OVERS, CLEANED, BY_REFERENCE):
            yield Case(recipe, AFFECTED, how)
        yield Case(recipe, FIXED, PUBLISHED)
        yield Case(recipe, NEWEST, PUBLISHED)


# -- the model --------------------------------------------------------------------------------


def pieces(recipe: Recipe, layers: int = 2) -> tuple[PlannedPiece, ...]:
    """As the backend cuts the model of the recipe."""
    found = []
    for i in range(layers):
        call = (PlannedSite(f"layer {i}", Strategy.ONE_SHOT),)
        found.append(PlannedPiece(f"attention {i}", True, ()))
        if recipe.split:
            found.append(PlannedPiece(f"piece before the call {i}", False, ()))
            found.append(PlannedPiece(f"split op {i}", True, call))
            found.append(PlannedPiece(f"piece behind the call {i}", False, ()))
        else:
            found.append(PlannedPiece(f"piece {i}", False, call))
    return tuple(found)


def schedule(case: Case) -> Calls:
    """What each rank calls, in all steps; in the last one with the words that the padding holds."""
    recipe = RECIPES[case.recipe]
    rank = PlannedRank(pieces(recipe), (TOKENS,) * STEPS, (TOKENS,) if recipe.capture else ())
    calls, _ = programs([rank] * 2)
    last = [call.id for call in calls if call.where.startswith(f"step {STEPS - 1},")]
    return changed(calls, *last, payload=Payload.SUBNORMAL) if case.how == PUBLISHED else calls


def model_of(case: Case) -> Result[Any] | None:
    """None where no call is carried out by mnnvl."""
    return check("mnnvl", case.release, [schedule(case)] * 2) if case.how != BY_REFERENCE else None


def predicted(case: Case) -> str:
    result = model_of(case)
    return RETURNED if result is None else SAYS[result.failure]


# -- what ringfence decides ----------------------------------------------------------------------


def decided(release: str, **options: Any) -> str:
    """By the shipped policy, of a model with the same layers: what becomes of its sites, in a sentence."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import ringfence

    def layers(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(2):
            y = x * 0.5
            dist.all_reduce(y)
            residual = residual + y
            x = torch.nn.functional.rms_norm(residual, (256,), None, 1e-6) + 0.25
        return x, residual

    situation = Situation(Collective.MNNVL, release, world_size=2, strategy=Strategy.ONE_SHOT)
    backend = ringfence.Backend(
        planned=situation, capture_sizes=[TOKENS], graphs="simulated", piece_compiler="eager", **options
    )
    torch._dynamo.reset()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x = torch.randn(TOKENS, 256).bfloat16()
        with torch.no_grad():
            torch.compile(layers, backend=backend, fullgraph=True)(x, x)
    finally:
        dist.destroy_process_group()
    (report,) = backend.reports
    (verdict,) = {(str(v.decision), v.clean, v.message) for v in report.verdicts if v.site is not None}
    captured = "" if report.captured else ", and nothing is captured"
    return f"{verdict[0]}{' and CLEAN' * verdict[1]}{captured}: {verdict[2]}"


# -- the kernels -----------------------------------------------------------------------------------


def observed(asked: Sequence[Case]) -> dict[Case, dict[str, Any]]:
    """Each in a child process that is killed when its time is over."""

    def run(case: Case) -> dict[str, Any]:
        item = {"recipe": case.recipe, "release": case.release, "how": case.how}
        return run_child("gpu.recipes:run", [item], timeout=SECONDS)[0]

    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        return dict(zip(asked, pool.map(run, asked), strict=True))


def report(asked: Sequence[Case], found: dict[Case, dict[str, Any]]) -> tuple[str, bool]:
    """The table, and whether all of it is as expected."""
    rows, right = [], True
    for case in asked:
        said = {"the model says": predicted(case)}
        if case in found:
            outcome = found[case]
            at = f", in step {outcome['step']}" if outcome["kind"] == NEVER and "step" in outcome else ""
            said |= {"the kernels": f"{outcome['kind']}{at}", "plan": outcome.get("plan", "")}
            right &= outcome["kind"] == case.expected
        right &= predicted(case) == case.expected
        rows.append({"recipe": case.recipe, "FlashInfer": case.release, "how": case.how, **said})
    notes = [
        f"{case.recipe}, {case.release}, {case.how}: {found[case]['note']}" for case in found if "note" in found[case]
    ]
    return "\n".join([tabulate(rows, headers="keys", disable_numparse=True), *notes]), right


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="ask the model alone; needs no GPU")
    parser.add_argument("--kernels", type=Path, metavar="DIR", help="what build_kernels.py wrote ($RINGFENCE_KERNELS)")
    parser.add_argument("--recipe", choices=list(RECIPES), action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    asked = list(cases(arguments.recipe or list(RECIPES)))
    if arguments.kernels is not None:
        os.environ["RINGFENCE_KERNELS"] = str(arguments.kernels)
    if not arguments.model:
        lacks = next(filter(None, (emulate.missing(case.release, "mnnvl") for case in asked)), None)
        if lacks is not None:
            print(f"{lacks}; the model answers without: {parser.prog} --model", file=sys.stderr)
            return 2
    for name, recipe in RECIPES.items():
        print(f"recipe {name}: {recipe.title}")
    print()
    table, right = report(asked, {} if arguments.model else observed(asked))
    print(table)
    for case in (case for case in asked if case.expected == NEVER):
        result = model_of(case)
        assert result is not None
        print(f"\nThe model's trace of recipe {case.recipe} with {case.release}, {case.how}:\n{timeline.text(result)}")
    print()
    for release in (AFFECTED, FIXED, NEWEST):
        print(f"ringfence decides with {release}: {decided(release)}")
    print(f'with on_hazard="clean": {decided(AFFECTED, on_hazard="clean")}')
    print(f'with profile="conservative": {decided(AFFECTED, profile="conservative")}')
    print(f"\n{'all as expected' if right else 'NOT all as expected'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
