"""How AITER's arguments become jaxnorm's options."""

from __future__ import annotations

import numbers
from typing import Any

from jax import core

from .._api import _checks as check
from .._types import QuantSpec
from ..errors import type_error, value_error


def spec(
    op: str, out_dtype: Any, group_size: Any = 0, scale_dtype: str = "float32", shuffle_scale: bool = False, scale_ub: Any = None
) -> QuantSpec:  # fmt: skip
    """``group_size`` 0 is one scale a row; ``shuffle_scale`` is columns, or MX tiles where there are such."""
    if isinstance(group_size, bool) or not isinstance(group_size, numbers.Integral) or group_size < 0:
        raise value_error(op, "group_size", group_size, "0 (one scale a row) or a positive integer")
    group = int(group_size) or None
    tiles = scale_dtype == "e8m0" and group == 32
    layout = ("shuffled" if tiles else "column") if shuffle_scale else "row"
    bound = None if scale_ub is None else check.number(op, "scale_ub", scale_ub)
    return QuantSpec(out_dtype, group, scale_dtype, layout, bound)


def order(op: str, use_model_sensitive_rmsnorm: Any, residual: bool = False) -> dict[str, Any]:
    """The rounding order of 0 and of 1."""
    if use_model_sensitive_rmsnorm not in (0, 1):
        raise value_error(op, "use_model_sensitive_rmsnorm", use_model_sensitive_rmsnorm, "0 or 1")
    if not use_model_sensitive_rmsnorm:
        return {}
    return {"cast": "before_weight"} | ({"residual_rounding": "input"} if residual else {})


def offset(op: str, gemma_norm: Any) -> float:
    if gemma_norm not in (False, True):
        raise value_error(
            op, "gemma_norm", gemma_norm, "False or True", "weight_offset of jaxnorm's own takes a number."
        )
    return 1.0 if gemma_norm else 0.0


def same(op: str, **sizes: tuple[Any, int]) -> None:
    """Each size that is given twice, as (given, what the shapes say)."""
    for name, (given, found) in sizes.items():
        if isinstance(given, core.Tracer):
            raise type_error(op, name, "a traced value", "a Python integer", "Mark it static under jit.")
        if given != found:
            raise value_error(op, name, given, f"{found}, what the shapes of the arrays say")
