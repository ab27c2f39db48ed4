"""Rotary position embedding of one array of heads or of several at once, and the table of its angles."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import rope as ref
from .._ref import rope_table as ref_table
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from ..errors import type_error, value_error
from . import _checks as check
from . import _heads


def _reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    return {
        f"y{name[1:]}": ref.rope(x, a["positions"], a["cos_sin"], **dict(call.options))
        for name, x in a.items()
        if name[0] == "x"
    }


_PLANS = {"triton": "rope_triton", "hip": "rope_hip"}
FORWARD = register_stage(StageDef("rope_fwd", "rope", _reference, _PLANS))
BACKWARD = register_stage(StageDef("rope_bwd", "rope", _reference, _PLANS))


def _run(
    config: _heads.Config, stage: StageDef, xs: dict[int, jax.Array], positions: jax.Array, cos_sin: jax.Array
) -> dict[int, jax.Array]:
    """All arrays in one launch; the backward stage turns back."""
    operands = {f"x{i}": (x, config.heads(i)) for i, x in xs.items()}
    operands |= {"positions": (positions, config.positions), "cos_sin": (cos_sin, "p r")}
    call = config.call(
        stage,
        operands,
        [(f"y{i}", config.heads(i), x.dtype.name) for i, x in xs.items()],
        style=config.style,
        sections=config.sections,
        interleaved=config.interleaved,
        inverse=stage is BACKWARD,
    )
    out = _op.run(call, tuple(a for a, _ in operands.values()))
    return {i: out[f"y{i}"] for i in xs}


@functools.cache
def _differentiable(config: _heads.Config) -> Any:
    """``(xs, positions, cos_sin) -> ys`` with its reverse rule."""

    @jax.custom_vjp
    def turn(xs: tuple[jax.Array, ...], positions: jax.Array, cos_sin: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_run(config, FORWARD, dict(enumerate(xs)), positions, cos_sin).values())

    def forward(xs: Any, positions: Any, cos_sin: Any) -> Any:
        saved = positions.value, cos_sin.value
        return tuple(_run(config, FORWARD, {i: x.value for i, x in enumerate(xs)}, *saved).values()), saved

    def backward(saved: Any, cotangents: Any) -> Any:
        live = {i: c for i, c in enumerate(cotangents) if not isinstance(c, SymbolicZero)}
        dxs = _run(config, BACKWARD, live, *saved) if live else {}
        return tuple(dxs.get(i) for i in range(len(cotangents))), None, None

    turn.defvjp(forward, backward, symbolic_zeros=True)  # an array that nobody differentiates is not turned back
    return turn


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(xs: tuple[Any, ...], positions: Any, cos_sin: Any, config: _heads.Config) -> tuple[Any, ...]:
    with jax.named_scope(config.op):
        out: dict[int, Any] = {}
        for group in _heads.alike(xs):
            *mine, where, table = _compat.match_varying((*(xs[i] for i in group), positions, cos_sin))
            operands = {f"x{i}": (x, config.heads(i)) for i, x in enumerate(mine)}
            operands |= {"positions": (where, config.positions), "cos_sin": (table, "p r")}
            keep = {"t": 1, **{f"h{i}": 1 for i in range(len(mine))}}
            *mine, where, table = _sharding.conform(operands, keep=keep)
            out |= zip(group, _differentiable(config)(tuple(mine), where, table), strict=True)
        return tuple(out[i] for i in range(len(xs)))


def _call(
    op: str, x: Any, positions: Any, cos_sin: Any, style: Any, sections: Any, interleaved: bool, backend: Any
) -> Any:
    several = isinstance(x, tuple | list)
    if several and not x:
        raise value_error(op, "x", "an empty tuple", "an array or a tuple of arrays")
    names = [f"x[{i}]" for i in range(len(x))] if several else ["x"]
    xs = tuple(_heads.heads(op, n, a) for n, a in zip(names, x if several else (x,), strict=True))
    for name, a in zip(names, xs, strict=True):
        _heads.same_tokens(op, name, a, xs[0], names[0])
    table = _heads.table(op, "cos_sin", cos_sin, xs[0].shape[-1])
    if op == "mrope":
        sections = _heads.sections(op, "sections", sections, table.shape[1])
    where, shared = _heads.positions(op, positions, xs[0].shape[:-2], table.shape[0], op == "mrope")
    name, source = _dispatch.requested(op, backend)
    turning = (_heads.style(op, style), sections, bool(interleaved))
    out = _jitted(xs, where, table, _heads.Config(op, *turning, shared, name, source, target.named()))
    return out if several else out[0]


def rope(x: Any, positions: Any, cos_sin: Any, *, style: str = "neox", backend: str | None = None) -> Any:
    """``out_first = x_first * cos - x_second * sin;  out_second = x_second * cos + x_first * sin`` for each pair of a head.

    With h = rotary_dim / 2, pair j is elements (j, j + h) in the style ``"neox"`` and (2j, 2j + 1) in ``"gptj"``. Elements from
    rotary_dim on keep their bits. Several arrays, q and k as a rule, are turned in one launch; a row of the table is read once a
    token.

    Args:
      x:         [..., T, H, D] bfloat16, float16 or float32, D even; or a tuple of such arrays that share tokens and D, each with
                 its own number of heads and dtype.
      positions: [T] or [..., T], int32 or int64: the row of the table for each token.
      cos_sin:   [max_positions, rotary_dim], a row being [cos | sin], any float dtype (:func:`rope_table`). rotary_dim is even
                 and at most D.
      style:     ``"neox"`` or ``"gptj"``.
      backend:   ``"xla"``, ``"triton"`` or ``"hip"``; None = the best for op, D, dtypes, options and target.

    Returns:
      An array like x, or a tuple of them: computed in float32, rounded once.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a position given as a host value (NumPy, list) beyond the table.
      UnsupportedError: the named backend cannot serve the call here.

    A position of a device array beyond the table drops that token's rotation (cos 1, sin 0).
    Gradients: x, turned back. ``cos_sin`` is taken through ``stop_gradient``.
    Sharding: tokens and heads without any collective.
    Source: Su et al. 2021, "RoFormer".
    """
    return _call("rope", x, positions, cos_sin, style, None, False, backend)


def mrope(
    x: Any,
    positions: Any,
    cos_sin: Any,
    *,
    sections: Any,
    interleaved: bool = False,
    style: str = "neox",
    backend: str | None = None,
) -> Any:
    """:func:`rope` with three positions a token (time, height, width), each of which turns a share of the pairs.

    Args:
      x:           as in :func:`rope`.
      positions:   [3, T] or [3, ..., T].
      sections:    three numbers of pairs, together rotary_dim / 2.
      interleaved: False: the first ``sections[0]`` pairs turn by time, the next by height, the rest by width (Qwen2-VL). True:
                   pair j turns by height if ``j % 3 == 1`` and ``j < 3 * sections[1]``, by width if ``j % 3 == 2`` and
                   ``j < 3 * sections[2]``, else by time (Qwen3-VL).
      cos_sin, style, backend: as in :func:`rope`.

    Returns, raises, gradients and sharding as :func:`rope`; with three equal positions the same bits.
    """
    return _call("mrope", x, positions, cos_sin, style, sections, interleaved, backend)


def rope_table(
    max_positions: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """``[cos(p * f_i) | sin(p * f_i)]`` for each position p, ``f_i = base**(-2i / rotary_dim)``, in float32, then cast.

    Args:
      max_positions: rows of the table.
      rotary_dim:    how many elements of a head are turned; even.
      base:          ``rope_theta`` of Hugging Face's configurations.
      scaling:       None, or a mapping with the keys of Hugging Face's ``rope_scaling``; ``rope_type`` is ``"linear"``,
                     ``"dynamic"`` (NTK, for a sequence of max_positions), ``"yarn"`` (its attention factor is multiplied into the
                     table) or ``"llama3"``. Where ``original_max_position_embeddings`` may be left out, it is max_positions.
      dtype:         a float dtype of 16 or 32 bits.

    Returns:
      cos_sin [max_positions, rotary_dim].
    """
    op = "rope_table"
    length, width = _size(op, "max_positions", max_positions), _size(op, "rotary_dim", rotary_dim)
    if width % 2:
        raise value_error(op, "rotary_dim", width, "an even number")
    theta = check.number(op, "base", base)
    if theta <= 1:
        raise value_error(op, "base", theta, "a number above 1")
    out = check.out_dtype(op, dtype, jnp.zeros((), jnp.float32))
    inverse, factor = _scaled(op, width, theta, length, scaling)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * jnp.asarray(inverse, jnp.float32)[None]
    return (jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) * jnp.float32(factor)).astype(out)


def _size(op: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(op, argument, type(value).__name__, "a positive integer")
    if value < 1:
        raise value_error(op, argument, value, "a positive integer")
    return int(value)


# In Hugging Face's mappings too, without a meaning for the angles of this table.
_IGNORED = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def _scaled(op: str, width: int, base: float, length: int, scaling: Mapping[str, Any] | None) -> tuple[Any, float]:
    """(frequencies float64 [width / 2], what cos and sin are multiplied with)."""
    if scaling is None:
        return ref_table.frequencies(width, base), 1.0
    if not isinstance(scaling, Mapping):
        raise type_error(op, "scaling", type(scaling).__name__, "a mapping or None")
    theta = scaling.get("rope_theta", base)
    if theta != base:
        raise value_error(op, "scaling['rope_theta']", theta, f"base={base:g}", "Pass it as base.")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("default", "mrope"):
        return ref_table.frequencies(width, base), 1.0
    if kind not in ref_table.SCALINGS:
        raise value_error(
            op, "scaling['rope_type']", repr(kind), " or ".join(map(repr, ("default", *ref_table.SCALINGS)))
        )
    function, required, optional = ref_table.SCALINGS[kind]
    missing = [k for k in required if scaling.get(k) is None]
    unknown = [k for k in scaling if k not in (*required, *optional, *_IGNORED)]
    if missing or unknown:
        expected = f"{', '.join(required)}" + (f" and perhaps {', '.join(optional)}" if optional else "")
        raise value_error(op, f"scaling (rope_type {kind!r})", f"keys {', '.join(map(str, scaling))}", expected)
    values = {
        k: v if isinstance(v, bool) else check.number(op, f"scaling[{k!r}]", v)
        for k, v in scaling.items()
        if k not in _IGNORED and v is not None
    }
    for k, v in values.items():
        if k != "truncate" and v <= 0:
            raise value_error(op, f"scaling[{k!r}]", v, "a positive number")
    return function(width, base, length, values)


register_op(OpDef("rope", rope, FORWARD, BACKWARD))
register_op(OpDef("mrope", mrope, FORWARD, BACKWARD))
