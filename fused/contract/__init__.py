"""What every stage accepts, returns, saves and costs: the single home of shapes, legality and cost.

Fakes, kernels' checks, tests and rooflines read it; nothing here computes on data. Symbols follow
the paper: `B` batch, `C` channels, `G` groups, `c = C / G` a group's width, `H`, `W` spatial.
"""

from .cost import LAUNCHES, Cost, Problem, cost, saved_bytes
from .legality import (
    BN_STATISTICS,
    EPS,
    FLOAT_DTYPES,
    SAVED,
    STAGES,
    TOLERANCES,
    check_batch_statistics,
    check_bn_statistics,
    check_count,
    check_dtype,
    check_groups,
    check_map,
    check_tensor,
    check_whole,
    memory_format,
    product_dtype,
    statistics_dtype,
)
from .shapes import CHECKS, OUTPUTS, TensorSpec, check_cross_spatial_parameters

__all__ = [
    "BN_STATISTICS",
    "CHECKS",
    "EPS",
    "FLOAT_DTYPES",
    "LAUNCHES",
    "OUTPUTS",
    "SAVED",
    "STAGES",
    "TOLERANCES",
    "Cost",
    "Problem",
    "TensorSpec",
    "check_batch_statistics",
    "check_bn_statistics",
    "check_count",
    "check_cross_spatial_parameters",
    "check_dtype",
    "check_groups",
    "check_map",
    "check_tensor",
    "check_whole",
    "cost",
    "memory_format",
    "product_dtype",
    "saved_bytes",
    "statistics_dtype",
]
