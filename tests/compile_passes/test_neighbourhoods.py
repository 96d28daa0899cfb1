"""Random neighbourhoods of an all-reduce: the rewritten graph never computes another answer.

A :class:`Program` says what surrounds one to three all-reduces: views, residual, the spelling of the
norm, who else reads what. It is traced as AOT would trace it, run node by node, rewritten, and run again
on the same inputs. An all-reduce is an elementwise function, linear as the sum of ranks is (:func:`stand_in`), so
one that is dropped, doubled, moved past a change, sent to another group or given a term that is not its own shows in
the numbers.

No choice below is known to the recogniser: whether a program may fuse is its own decision, and only the
answer and the number of collectives are checked.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
import torch
from neighbourhoods.compare import difference, problem
from neighbourhoods.programs import Block, Program, draw, shrink
from neighbourhoods.stand_in import stand_in

from ringfence.compile_passes import Reason, Site
from ringfence.runtime.collectives import reference


@pytest.fixture(autouse=True)
def quiet_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest captures every log, and torch's tracing log has many lines for each fake tensor."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture
def stand_in_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "all_reduce", lambda x, group: stand_in(x, group))


#: Programs that were once answered wrongly or broke the rewrite, and traps that are too rare to meet by chance.
_KNOWN = {
    "plain": Program(),
    "int_before_weight": Program((Block(middle="int32"),)),
    "float8_before_weight": Program((Block(middle="float8"),)),
    "int_at_the_end": Program((Block(end="int32"),), dtype=torch.bfloat16),
    "int_without_weight": Program((Block(weight="none", end="int32"),), strict=True),
    "half_without_weight": Program((Block(weight="none", end="bfloat16"),), strict=True),
    "other_half_at_the_end": Program((Block(end="bfloat16"),), dtype=torch.float16, strict=True),
    "alpha_of_gemma": Program((Block(weight="gemma_alpha"),)),
    "alpha_of_epsilon": Program((Block(eps=1e-2, eps_form="scalar_alpha"),)),
    "mean_over_everything": Program((Block(mean="all"),)),
    "mean_in_half": Program((Block(mean="half"),)),
    "sum_in_half": Program((Block(mean="sum_half"),), strict=True),
    "root_in_half": Program((Block(factor="bfloat16"),), strict=True),
    "root_in_activation_dtype": Program((Block(factor="dtype"),), dtype=torch.bfloat16, strict=True),
    "epsilon_in_half": Program((Block(eps_form="full_half"),), scale=0.015625, strict=True),
    "default_epsilon_of_float64": Program(
        (Block(add="float64", norm="rms_norm", eps=None),), scale=0.015625, front="pre_dispatch"
    ),
    "root_of_wide_sum_read": Program((Block(add="wide", readers=("root",)),), dtype=torch.bfloat16),
    "view_of_wide_sum_read": Program(
        (Block(add="wide", before_norm=("unsqueeze",), readers=("sum",)),), dtype=torch.bfloat16
    ),
    "view_of_sliced_input": Program((Block(layout="sliced", after_reduce=("to_2d",)),), batch=2),
    "view_of_wide_sum": Program((Block(add="wide", before_norm=("unsqueeze",), middle="dtype"),), dtype=torch.bfloat16),
    "view_of_cast_sum": Program((Block(before_norm=("to_3d",)),), dtype=torch.bfloat16, batch=2),
    "view_of_expanded_input": Program((Block(layout="expanded", after_reduce=("to_2d",)),), batch=2),
    "strides_of_residual": Program(
        (Block(residual="transposed", add="swapped", readers=("sum_transposed",)),), batch=2
    ),
    "strides_of_reduced": Program(
        (Block(layout="transposed", collective="custom_inplace", readers=("sum_transposed",)),), batch=2
    ),
    "weights_of_each_other": Program((Block(weight="of_other"), Block(weight="of_other")), order="phased"),
    "weight_behind_mutation": Program(
        (Block(weight="of_other"), Block(collective="custom_inplace")), order="phased", front="plain"
    ),
    "weight_right_behind_reduce": Program((Block(residual="none", weight="late", norm="rms_norm"),)),
    "mean_without_its_column": Program((Block(mean="lost"),), hidden=4),
    "mean_of_columns_as_column": Program((Block(mean="rows_lost"),), hidden=4),
    "doubled": Program((Block(behind="doubled"),)),
    "doubled_over_other_group": Program((Block(behind="doubled_over_other_group"),)),
    "residual_is_another_sum": Program((Block(behind="scaled", residual="other_reduce_view"),), dtype=torch.bfloat16),
    "bias_without_residual": Program((Block(behind="biased", residual="none"),), batch=2, strict=True),
    "bias_of_dynamic_tokens": Program((Block(behind="biased", residual="none"),), dynamic="tokens"),
    "bias_through_a_view": Program((Block(behind="biased", after_reduce=("to_3d",)),), batch=2),
    "scale_of_the_whole": Program((Block(behind="biased", residual="column", add="scaled"),)),
    "difference_of_sums": Program((Block(behind="less_another", add="rsub"),)),
    "wide_sum_of_scaled": Program((Block(behind="scaled", add="wide", middle="dtype"),), dtype=torch.bfloat16),
    "huge_in_half": Program((Block(behind="huge"),), dtype=torch.float16),
    "sum_again": Program((Block(readers=("sum_again", "sum_again_read")),)),
    "heads": Program((Block(norm="heads"),)),
    "one_element_of_a_row_cancels": Program(  # no wrong answer, but once taken for one
        (Block(behind="biased", residual="other_reduce", add="alpha_swapped", readers=("sum_transposed",)),),
        dtype=torch.bfloat16,
        tokens=1,
        hidden=4,
    ),
}


@pytest.mark.usefixtures("stand_in_reference")
@pytest.mark.parametrize("program", _KNOWN.values(), ids=_KNOWN.keys())
def test_known_neighbourhood_keeps_its_answer(program: Program) -> None:
    wrong, sites, text = problem(program)
    assert wrong is None, f"{wrong}\n{program!r}\n{[(s.fused, s.message) for s in sites]}\n{text}"


#: What some hundred programs must meet. The rest needs two rare choices at once, or no program can say it.
_COMMON = {
    Reason.REDUCE_OP,
    Reason.OTHER_GROUP,
    Reason.REDUCE_DTYPE,
    Reason.ALL_REDUCE_FORM,
    Reason.UNUSED,
    Reason.OP_BETWEEN,
    Reason.VALUE_USED_ELSEWHERE,
    Reason.CLAIMED,
    Reason.RESIDUAL_SHAPE,
    Reason.RESIDUAL_DTYPE,
    Reason.RESIDUAL_KIND,
    Reason.RESIDUAL_IS_REDUCED,
    Reason.SCALE_KIND,
    Reason.SCALE_RANGE,
    Reason.NO_NORM,
    Reason.LAYER_NORM,
    Reason.MEAN_DIM,
    Reason.MEAN_OF_OTHER_TENSOR,
    Reason.NORM_DTYPE,
    Reason.HIDDEN_SIZE_DYNAMIC,
    Reason.WEIGHT_NOT_READY,
    Reason.ROUNDING_DIFFERS,
    Reason.FLOAT32_SUM_USED_ELSEWHERE,
}


def _look(program: Program) -> tuple[str | None, Sequence[Site]]:
    """What is wrong with a program, its graphs included, and its sites."""
    try:
        wrong, sites, text = problem(program)
    except Exception:
        return traceback.format_exc(), ()
    return wrong and f"{wrong}\n{[(s.fused, s.message) for s in sites]}\n{text}", sites


@pytest.mark.slow
@pytest.mark.xdist_group("neighbourhoods")
@pytest.mark.usefixtures("stand_in_reference")
def test_no_neighbourhood_changes_its_answer() -> None:
    """And they are worth drawing: neither all declined nor all fused, and declined for many reasons."""
    reasons: Counter[Reason] = Counter()
    fused: list[bool] = []
    random = Random(1)
    for program in (draw(random) for _ in range(250)):
        wrong, sites = _look(program)
        if wrong is not None:
            smallest = shrink(program, lambda p: _look(p)[0] is not None)
            pytest.fail(f"{smallest!r}\n{_look(smallest)[0]}\nwas first {program!r}")
        fused.append(any(site.fused for site in sites))
        reasons.update(site.decline.reason for site in sites if site.decline is not None)
    assert 0.3 * len(fused) <= sum(fused) <= 0.7 * len(fused)
    assert not _COMMON - set(reasons), f"never seen: {sorted(_COMMON - set(reasons))}; seen: {reasons.most_common()}"


def test_an_element_that_cancelled_is_told_from_a_wrong_one() -> None:
    """Of a transposed output with one token each row is one element: its rounding is measured by the whole output."""
    program = Program((Block(),), dtype=torch.bfloat16, tokens=1, hidden=4)
    expected = torch.tensor([[1.5], [-2.0], [0.75], [0.002]], dtype=torch.bfloat16)
    rounded = expected + torch.tensor([[0.0], [0.0], [0.0], [2.0**-12]], dtype=torch.bfloat16)
    assert difference(program, [rounded], [expected]) is None
    for row in range(4):
        wrong = expected.clone()
        wrong[row] += 0.25
        assert difference(program, [wrong], [expected]) is not None


def test_what_is_wrong_is_made_small() -> None:
    def swapped(program: Program) -> bool:
        return any(block.weight_swapped for block in program.blocks)

    random, smallest = Random(1), Program((Block(weight_swapped=True),))
    first = next(program for program in (draw(random) for _ in range(20)) if swapped(program))
    assert shrink(first, swapped) == smallest != first
