"""Argument checks shared by the families. Messages: op, argument, got, expected, what to do."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from ..errors import type_error, value_error

FLOATS = ("bfloat16", "float16", "float32")
LARGEST = float(np.finfo(np.float32).max)
CASTS = ("output", "before_weight")
ROUNDINGS = ("float32", "input")


def array(op: str, argument: str, value: Any) -> jax.Array:
    """A float array of 16 or 32 bits; anything else is a TypeError."""
    if value is None:
        raise type_error(op, argument, None, "an array")
    if isinstance(value, jax.Array):  # tracers, too
        a = value
    elif type(value) is float:  # a number has no width of its own, also under jax_enable_x64
        a = jnp.asarray(value, jnp.float32)
    else:
        try:
            a = jnp.asarray(value)
        except (TypeError, ValueError) as e:
            raise type_error(op, argument, type(value).__name__, "an array", str(e)) from None
    if a.dtype.name not in FLOATS:
        remedy = "Cast it first; jaxnorm computes in float32." if a.dtype == jnp.float64 else "Cast it first."
        raise type_error(op, argument, f"dtype {a.dtype.name}", f"one of {', '.join(FLOATS)}", remedy)
    return a


def features_last(op: str, argument: str, a: jax.Array) -> None:
    if a.ndim < 1 or a.shape[-1] < 1:
        raise value_error(op, argument, f"shape {a.shape}", "[..., N] with N >= 1")


def known(op: str, argument: str, a: jax.Array, sizes: Sequence[Any]) -> None:
    """The sizes that a row is summed over, which an export may not leave open."""
    if not all(isinstance(d, int) for d in sizes):
        raise value_error(
            op,
            argument,
            f"shape {a.shape}",
            "known sizes but for the leading dims",
            "Export one program for each size.",
        )


def same_shape(op: str, argument: str, a: jax.Array, x: jax.Array) -> None:
    if a.shape != x.shape:
        raise value_error(
            op, argument, f"shape {a.shape}", f"{x.shape} as x", "Did you shard or slice only one of them?"
        )


def vector(op: str, argument: str, value: Any, n: int) -> jax.Array | None:
    """A float vector over the features, or None."""
    if value is None:
        return None
    a = array(op, argument, value)
    if a.shape != (n,):
        raise value_error(op, argument, f"shape {a.shape}", f"({n},), the last dim of x")
    return a


def number(op: str, argument: str, value: Any) -> float:
    """A finite Python number, known when tracing."""
    if isinstance(value, core.Tracer):
        raise type_error(
            op, argument, "a traced value", "a Python number", "Close over it or mark it static under jit."
        )
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise type_error(op, argument, type(value).__name__, "a number")
    if not abs(float(value)) <= LARGEST:  # NaN, too
        raise value_error(op, argument, value, "a finite number within float32")
    return float(value)


def eps(op: str, value: Any) -> float:
    v = number(op, "eps", value)
    if v < 0:
        raise value_error(op, "eps", v, "a number >= 0")
    return v


def offset(op: str, value: Any, weight: jax.Array | None) -> float:
    v = number(op, "weight_offset", value)
    if weight is None and v != 0.0:
        raise value_error(
            op, "weight_offset", v, "0.0 when weight is None", "Pass a weight, or leave weight_offset out."
        )
    return v


def choice(op: str, argument: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise value_error(op, argument, repr(value), " or ".join(map(repr, allowed)))
    return value


def out_dtype(op: str, value: Any, x: jax.Array) -> str:
    if value is None:
        return x.dtype.name
    try:
        name = jnp.dtype(value).name
    except TypeError:
        raise type_error(op, "out_dtype", repr(value), f"one of {', '.join(FLOATS)}") from None
    if name not in FLOATS:
        raise type_error(op, "out_dtype", name, f"one of {', '.join(FLOATS)}")
    return name


def padded_width(op: str, value: Any, n: int) -> int:
    """``ceil(n / p) * p``; None or 0 = no padding."""
    if value is None:
        return n
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(op, "pad_to_multiple", type(value).__name__, "a positive integer or None")
    p = int(value)
    if p < 0:
        raise value_error(op, "pad_to_multiple", p, "a positive integer or None")
    return n if p == 0 else -(-n // p) * p
