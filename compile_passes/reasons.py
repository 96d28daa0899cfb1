"""Why a site was not fused, and what a fusion changes in the rounding: reasons are values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """One code for each way in which an all-reduce stays as it was.

    The codes are part of the report's schema (``ringfence docs report``): add, never reuse.
    """

    # the collective
    REDUCE_OP = "reduce_op"
    GROUP_KIND = "group_kind"
    OTHER_GROUP = "other_group"
    REDUCE_DTYPE = "reduce_dtype"
    ALL_REDUCE_FORM = "all_reduce_form"
    NESTED_REGION = "nested_region"
    # what reads the reduced value
    ESCAPES_GRAPH = "escapes_graph"
    UNUSED = "unused"
    OP_BETWEEN = "op_between"
    VALUE_USED_ELSEWHERE = "value_used_elsewhere"
    MUTATION_BETWEEN = "mutation_between"
    LAYOUT = "layout"
    CLAIMED = "claimed_by_another_site"
    SCALE_KIND = "scale_kind"
    SCALE_RANGE = "scale_range"
    # the residual add
    RESIDUAL_SHAPE = "residual_shape"
    RESIDUAL_DTYPE = "residual_dtype"
    RESIDUAL_KIND = "residual_kind"
    RESIDUAL_IS_REDUCED = "residual_is_reduced"
    ADD_ALPHA = "add_alpha"
    BIAS = "bias_after_all_reduce"
    # the norm
    NO_NORM = "no_norm"
    LAYER_NORM = "layer_norm"
    NORM_OP = "norm_op"
    NORM_DIMS = "norm_dims"
    MEAN_DIM = "mean_dim"
    MEAN_OF_OTHER_TENSOR = "mean_of_other_tensor"
    NORM_DTYPE = "norm_dtype"
    ACTIVATION_DTYPE = "activation_dtype"
    HIDDEN_SIZE_DYNAMIC = "hidden_size_dynamic"
    WEIGHT_DTYPE = "weight_dtype"
    WEIGHT_SHAPE = "weight_shape"
    WEIGHT_KIND = "weight_kind"
    WEIGHT_NOT_READY = "weight_not_ready"
    EPS_KIND = "eps_kind"
    # a MoE site
    HOST_SPLITS = "host_splits"
    IDS_NOT_KNOWN = "ids_not_known"
    GATHER_SHAPE = "gather_shape"
    COLLECTIVE_BETWEEN = "collective_between"
    EXPERTS_NOT_ROW_WISE = "experts_not_row_wise"
    OTHER_RANK = "declined_on_another_rank"
    # the machine
    BEYOND_TABLE = "beyond_table"
    NO_KERNEL = "no_kernel"
    # policy
    SWITCHED_OFF = "switched_off"
    ROUNDING_DIFFERS = "rounding_differs"
    FLOAT32_SUM_USED_ELSEWHERE = "float32_sum_used_elsewhere"
    VERIFY_FAILED = "verify_failed"


@dataclass(frozen=True)
class Decline:
    """An all-reduce that stays as it was, and why.

    ``message`` names the node in the way and, where there is one, the remedy.
    """

    reason: Reason
    message: str


class Rounding(StrEnum):
    """Where the source rounds differently from the fused op.

    The fused op rounds the sum once to the activation dtype, computes the norm in
    float32 and rounds once at the end, as the FlashInfer kernels do.
    """

    BEFORE_WEIGHT = "the source rounds the normalised value before the weight; the fused op rounds once, after it"
    FLOAT32_RESIDUAL = "the source normalises the unrounded float32 sum; the fused op normalises the rounded one"
    COMPUTE_DTYPE = "the source computes the norm in another precision than float32"
    MERGED = "the source adds the results of several all-reduces; the fused op sums their inputs and reduces once"
    SCALED = "the source scales the result of the all-reduce; the fused op scales what it adds up"
    RESIDUALS = "the source adds to the reduced value one tensor after the other; the fused op adds their sum"
    BIAS = "the source adds a bias to the reduced value before the residual; the fused op adds bias + residual"
    NORM_OP = "the source's norm is an engine's op, which may round elsewhere than the fused op"
    COMBINE = "the source sums over the ranks in its own dtype; the combine sums in float32 and rounds once"
    WEIGHT_BIAS = "the source rounds (bias + weight) before it multiplies; the fused op adds in float32"
