"""Input sets of a cell, the float32 formulas they are checked with, and how far a contestant's outputs are from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._bench.timing import rotation

from .cells import EPS, INPUTS, OUTPUTS, Cell

Arrays = dict[str, jax.Array]
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3, "float32": 2e-5}
"""Largest ||out - ref|| / ||ref||: two roundings of the dtype, or a residual sum rounded before the norm, still pass."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


@dataclasses.dataclass
class Inputs:
    """``sets[i]`` holds the [M, N] inputs of ``INPUTS[op]`` and the weight [N], which all sets share."""

    cell: Cell
    sets: list[Arrays]
    cached: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_inputs(cell: Cell, seed: int = 0) -> Inputs:
    """Random inputs, as many sets as the rotation needs; weights around one."""
    count, _ = rotation(cell.input_bytes)
    key = jax.random.key(seed, impl="rbg")  # threefry takes longer than the norms at 2 GB
    w = (1.0 + 0.1 * _normal(key, (cell.features,), "float32")).astype(cell.dtype)
    sets = []
    for i in range(count):
        s: Arrays = {"weight": w}
        for j, name in enumerate(INPUTS[cell.op]):
            s[name] = _normal(jax.random.fold_in(key, 8 * i + j + 1), (cell.rows, cell.features), cell.dtype)
        sets.append(s)
    jax.block_until_ready(sets)
    return Inputs(cell, sets)


def reference(op: str, s: Arrays) -> Arrays:
    """The outputs of an op in float32 from its closed formulas (no autodiff), by the names of ``OUTPUTS[op]``."""
    a = {k: v.astype(jnp.float32) for k, v in s.items()}
    w = a["weight"]
    n = a["x"] + a["residual"] if "residual" in a else a["x"]
    # The backward reads the sum as the forward stored it.
    if op == "add_rmsnorm_bwd":
        n = n.astype(s["x"].dtype).astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(n * n, axis=-1, keepdims=True) + EPS)
    xhat = n * rstd
    out = {"y": xhat * w, "residual_out": n}
    if op == "rmsnorm_valgrad":
        out["loss"] = 0.5 * jnp.sum(out["y"] ** 2)
        a["dy"] = out["y"]
    if "dy" in a:
        wdy = a["dy"] * w
        out["dx"] = rstd * (wdy - xhat * jnp.mean(wdy * xhat, axis=-1, keepdims=True)) + a.get("dresidual_out", 0.0)
        out["dweight"] = jnp.sum(a["dy"] * xhat, axis=0)
    return {name: out[name] for name in OUTPUTS[op]}


@functools.partial(jax.jit, static_argnums=0)
def _distances(op: str, outputs: Arrays, s: Arrays) -> Arrays:
    ref = reference(op, s)

    def distance(name: str) -> jax.Array:
        got = outputs[name].astype(jnp.float32)
        return jnp.sqrt(jnp.sum((got - ref[name]) ** 2) / jnp.sum(ref[name] ** 2))

    return {name: distance(name) for name in OUTPUTS[op]}


def distances(cell: Cell, outputs: Sequence[jax.Array], s: Arrays) -> dict[str, float]:
    """Relative error of each output, in the order of ``OUTPUTS[op]``.

    Raises:
      ValueError: an output is missing, or its shape is wrong.
    """
    names = OUTPUTS[cell.op]
    shapes = {"dweight": (cell.features,), "loss": ()}
    expected = [shapes.get(n, (cell.rows, cell.features)) for n in names]
    got = [tuple(o.shape) for o in outputs]
    if got != expected:
        raise ValueError(f"{cell.op}: outputs: got shapes {got}, expected {expected}")
    errors = _distances(cell.op, dict(zip(names, outputs, strict=True)), s)
    return {name: float(e) for name, e in errors.items()}


def is_right(cell: Cell, errors: dict[str, float]) -> bool:
    """Whether every error is within the dtype's tolerance; NaN is not.

    The gradient of sum(y * y) / 2 is a small difference of large terms, which multiplies the rounding of y.
    """
    factor = 4 if cell.op == "rmsnorm_valgrad" else 1
    return all(e <= factor * TOLERANCE[cell.dtype] for e in errors.values())
