"""RMSNorm of the heads of q and k, then rotary embedding, in one launch: one stream of tokens, or two that are joined."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .. import _compat, _dispatch, _op, _sharding
from .._compile import target
from .._ref import qk as ref
from .._ref._common import f32
from .._ref.rope import lookup
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from ..errors import type_error, value_error
from . import _checks as check
from . import _heads


def _norm(call: StageCall) -> dict[str, Any]:
    return {k: call.option(k) for k in ("eps", "weight_offset", "style")}


def _reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    cos, sin = lookup(a["cos_sin"], a["positions"], call.option("sections"), call.option("interleaved"))
    return {
        f"y{n[1:]}": ref.norm_rope(x, a.get(f"w{n[1:]}"), cos, sin, **_norm(call)) for n, x in a.items() if n[0] == "x"
    }


def _backward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    cos, sin = lookup(a["cos_sin"], a["positions"], call.option("sections"), call.option("interleaved"))
    out: Arrays = {}
    for i in (n[1:] for n in a if n[0] == "x"):
        dx, terms = ref.norm_rope_backward(a[f"x{i}"], a.get(f"w{i}"), cos, sin, a[f"dy{i}"], **_norm(call))
        out[f"dx{i}"] = dx
        if f"w{i}" in a:
            out[f"dw{i}"] = ref.weight_sum(terms).astype(call.dtype(f"dw{i}"))
    return out


def _two_stream_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    out: Arrays = {}
    for n in "qk":
        parts = [
            ref.norm_rope(a[n + i], a.get(f"{n}_weight{i}"), *_halves(a[f"cos_sin{i}"]), **_norm(call)) for i in "01"
        ]
        out[n] = jnp.concatenate(parts, axis=-3)
    return out


def _two_stream_backward_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    out: Arrays = {}
    for n in "qk":
        first = a[f"{n}0"].shape[-3]
        grads = {"0": a[f"d{n}"][..., :first, :, :], "1": a[f"d{n}"][..., first:, :, :]}
        for i, dy in grads.items():
            cos_sin = _halves(a[f"cos_sin{i}"])
            dx, terms = ref.norm_rope_backward(a[n + i], a.get(f"{n}_weight{i}"), *cos_sin, dy, **_norm(call))
            out[f"d{n}{i}"] = dx
            if (weight := f"{n}_weight{i}") in a:
                out[f"d{weight}"] = ref.weight_sum(terms).astype(call.dtype(f"d{weight}"))
    return out


def _halves(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = table.shape[-1] // 2
    return f32(table[:, :half]), f32(table[:, half:])


_PLANS = {"triton": "qk_triton", "hip": "qk_hip"}
FORWARD = register_stage(StageDef("qk_norm_rope_fwd", "qk_norm_rope", _reference, _PLANS))
BACKWARD = register_stage(StageDef("qk_norm_rope_bwd", "qk_norm_rope", _backward_reference, _PLANS))
TWO_STREAM = register_stage(
    StageDef("qk_norm_rope_two_stream_fwd", "qk_norm_rope_two_stream", _two_stream_reference, _PLANS)
)
TWO_STREAM_BACKWARD = register_stage(
    StageDef("qk_norm_rope_two_stream_bwd", "qk_norm_rope_two_stream", _two_stream_backward_reference, _PLANS)
)

Many = tuple[Any, ...]


def _options(config: _heads.Config) -> dict[str, Any]:
    return {
        "eps": config.eps,
        "weight_offset": config.weight_offset,
        "style": config.style,
        "sections": config.sections,
        "interleaved": config.interleaved,
    }


def _there(operands: dict[str, tuple[Any, str]]) -> dict[str, tuple[jax.Array, str]]:
    return {n: (a, dims) for n, (a, dims) in operands.items() if a is not None}


def _filled(cotangent: Any) -> jax.Array:
    """A cotangent that may be a symbolic zero."""
    if isinstance(cotangent, SymbolicZero):
        zero: Any = cotangent.aval
        return jnp.zeros(zero.shape, zero.dtype)
    return cotangent


# ---- one stream


def _operands(config: _heads.Config, xs: Many, ws: Many, positions: Any, cos_sin: Any) -> dict[str, tuple[Any, str]]:
    operands = {f"x{i}": (x, config.heads(i)) for i, x in enumerate(xs)}
    operands |= {f"w{i}": (w, "d") for i, w in enumerate(ws)}
    return operands | {"positions": (positions, config.positions), "cos_sin": (cos_sin, "p r")}


def _forward(config: _heads.Config, xs: Many, ws: Many, positions: Any, cos_sin: Any) -> Many:
    operands = _there(_operands(config, xs, ws, positions, cos_sin))
    results = [(f"y{i}", config.heads(i), x.dtype.name) for i, x in enumerate(xs)]
    call = config.call(FORWARD, operands, results, **_options(config))
    return tuple(_op.run(call, tuple(a for a, _ in operands.values())).values())


def _backward(config: _heads.Config, saved: Any, cotangents: Many) -> Many:
    xs, ws, positions, cos_sin = saved
    operands = _operands(config, xs, ws, positions, cos_sin)
    operands |= {f"dy{i}": (_filled(c), config.heads(i)) for i, c in enumerate(cotangents)}
    operands = _there(operands)
    results = [(f"dx{i}", config.heads(i), x.dtype.name) for i, x in enumerate(xs)]
    weights = [(i, w) for i, w in enumerate(ws) if w is not None]
    results += [(f"dw{i}", "d", w.dtype.name) for i, w in weights]
    sums = tuple((f"dw{i}", f"{config.tokens} h{i}") for i, _ in weights)
    call = config.call(BACKWARD, operands, results, sums, **_options(config))
    out = _op.run(call, tuple(a for a, _ in operands.values()))
    dws = tuple(out.get(f"dw{i}") for i in range(len(ws)))
    return tuple(out[f"dx{i}"] for i in range(len(xs))), dws, None, None


@functools.cache
def _differentiable(config: _heads.Config) -> Any:
    """``(xs, ws, positions, cos_sin) -> ys`` with its reverse rule."""

    @jax.custom_vjp
    def norm_rope(xs: Many, ws: Many, positions: jax.Array, cos_sin: jax.Array) -> Many:
        return _forward(config, xs, ws, positions, cos_sin)

    def forward(*primals: Any) -> Any:
        values = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
        return _forward(config, *values), values

    norm_rope.defvjp(forward, functools.partial(_backward, config), symbolic_zeros=True)
    return norm_rope


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(xs: Many, ws: Many, positions: Any, cos_sin: Any, config: _heads.Config) -> Many:
    with jax.named_scope(config.op):
        out: dict[int, Any] = {}
        for group in _heads.alike(xs):
            size = len(group)
            arrays = _compat.match_varying((*(xs[i] for i in group), *(ws[i] for i in group), positions, cos_sin))
            operands = _operands(config, arrays[:size], arrays[size : 2 * size], *arrays[2 * size :])  # type: ignore[arg-type]
            keep = {"t": 1, **{f"h{i}": 1 for i in range(size)}}
            arrays = _sharding.conform(operands, keep=keep)
            mine, weights = tuple(arrays[:size]), tuple(arrays[size : 2 * size])
            out |= zip(group, _differentiable(config)(mine, weights, *arrays[2 * size :]), strict=True)
        return out[0], out[1]


def qk_norm_rope(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    positions: Any,
    cos_sin: jax.Array,
    *,
    eps: float = 1e-6,
    style: str = "neox",
    weight_offset: float = 0.0,
    mrope_sections: Any = None,
    mrope_interleaved: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``xn = cast(x * rsqrt(mean(x**2) + eps) * (weight + weight_offset));  out = cast(rope(xn))`` for each head of q and k.

    Two norms and two rotations in one launch: q and k are read once and written once. The mean is over all D elements of a head,
    also where the table turns fewer; xn is rounded to the dtype of x, as models do that norm and rotate apart.

    Args:
      q:                 [..., T, Hq, D] bfloat16, float16 or float32, D even.
      k:                 [..., T, Hk, D], any of these dtypes; Hk need not divide Hq.
      q_weight, k_weight: [D], any of these dtypes, shared by the heads; None = no multiply.
      positions:         [T] or [..., T], int32 or int64; with ``mrope_sections`` [3, T] or [3, ..., T].
      cos_sin:           [max_positions, rotary_dim], a row being [cos | sin] (:func:`rope_table`); rotary_dim is at most D.
      eps:               added to the mean square, not to its root.
      style:             ``"neox"`` or ``"gptj"``, as in :func:`rope`.
      weight_offset:     1.0 for weights stored around zero (Gemma).
      mrope_sections, mrope_interleaved: as ``sections`` and ``interleaved`` of :func:`mrope`; None = :func:`rope`.
      backend:           ``"xla"``, ``"triton"`` or ``"hip"``; None = the best for op, D, dtypes, options and target.

    Returns:
      (q, k), shapes and dtypes as given.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a position given as a host value beyond the table.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: q, k and the weights (float32 sums over tokens and heads in a fixed order, cast to the weight's dtype); ``cos_sin``
    is taken through ``stop_gradient``.
    Sharding: tokens and heads without any collective; one all-reduce in the backward.
    """
    op = "qk_norm_rope"
    q, k = _heads.heads(op, "q", q), _heads.heads(op, "k", k)
    _heads.same_tokens(op, "k", k, q, "q")
    weights = _weights(op, (("q_weight", q_weight), ("k_weight", k_weight)), q.shape[-1])
    table = _heads.table(op, "cos_sin", cos_sin, q.shape[-1])
    sections = None
    if mrope_sections is not None:
        sections = _heads.sections(op, "mrope_sections", mrope_sections, table.shape[1])
    where, shared = _heads.positions(op, positions, q.shape[:-2], table.shape[0], sections is not None)
    name, source = _dispatch.requested(op, backend)
    config = _heads.Config(
        op,
        _heads.style(op, style),
        sections,
        bool(mrope_interleaved),
        shared,
        name,
        source,
        target.named(),
        check.eps(op, eps),
        _offset(op, weight_offset, weights),
    )
    return _jitted((q, k), weights, where, table, config)  # type: ignore[return-value]


def _weights(op: str, given: tuple[tuple[str, Any], ...], features: int) -> Many:
    return tuple(check.vector(op, name, w, features) for name, w in given)


def _offset(op: str, value: Any, weights: Many) -> float:
    return check.offset(op, value, None if any(w is None for w in weights) else weights[0])


# ---- two streams

_PARTS = ("q0", "k0", "q1", "k1")
_TOKENS = {"q0": "... s h d", "k0": "... s j d", "q1": "... u h d", "k1": "... u j d"}
_JOINED = {"q": "... v h d", "k": "... v j d"}


def _weight_of(part: str) -> str:
    return f"{part[0]}_weight{part[1]}"


def _two_operands(parts: Many, weights: Many, tables: Many) -> dict[str, tuple[Any, str]]:
    operands = {n: (a, _TOKENS[n]) for n, a in zip(_PARTS, parts, strict=True)}
    operands |= {_weight_of(n): (w, "d") for n, w in zip(_PARTS, weights, strict=True)}
    return operands | {"cos_sin0": (tables[0], "s r"), "cos_sin1": (tables[1], "u z")}


def _two_forward(config: _heads.Config, parts: Many, weights: Many, tables: Many) -> Many:
    operands = _there(_two_operands(parts, weights, tables))
    results = [(n, dims, parts["qk".index(n)].dtype.name) for n, dims in _JOINED.items()]
    call = _two_call(config, TWO_STREAM, operands, results, parts)
    out = _op.run(call, tuple(a for a, _ in operands.values()))
    return out["q"], out["k"]


def _two_call(
    config: _heads.Config, stage: StageDef, operands: dict, results: list, parts: Many, sums: tuple = ()
) -> StageCall:
    call = config.call(stage, operands, results, sums, **_norm_options(config))
    sizes = dict(call.sizes) | {"v": parts[0].shape[-3] + parts[2].shape[-3]}
    # the streams are joined along their tokens, which therefore stay together; heads may be sharded
    return dataclasses.replace(call, sizes=tuple(sizes.items()), parallel_dims=(("h", 1), ("j", 1)))


def _norm_options(config: _heads.Config) -> dict[str, Any]:
    return {"eps": config.eps, "weight_offset": config.weight_offset, "style": config.style}


def _two_backward(config: _heads.Config, saved: Any, cotangents: Many) -> Many:
    parts, weights, tables = saved
    operands = _two_operands(parts, weights, tables)
    operands |= {f"d{n}": (_filled(c), dims) for (n, dims), c in zip(_JOINED.items(), cotangents, strict=True)}
    operands = _there(operands)
    results = [(f"d{n}", _TOKENS[n], a.dtype.name) for n, a in zip(_PARTS, parts, strict=True)]
    with_weight = [(n, w) for n, w in zip(_PARTS, weights, strict=True) if w is not None]
    results += [(f"d{_weight_of(n)}", "d", w.dtype.name) for n, w in with_weight]
    sums = tuple((f"d{_weight_of(n)}", f"... {'h' if n[0] == 'q' else 'j'}") for n, _ in with_weight)
    call = _two_call(config, TWO_STREAM_BACKWARD, operands, results, parts, sums)
    out = _op.run(call, tuple(a for a, _ in operands.values()))
    dws = tuple(out.get(f"d{_weight_of(n)}") for n in _PARTS)
    return tuple(out[f"d{n}"] for n in _PARTS), dws, (None, None)


@functools.cache
def _two_differentiable(config: _heads.Config) -> Any:
    """``(parts, weights, tables) -> (q, k)`` with its reverse rule."""

    @jax.custom_vjp
    def norm_rope(parts: Many, weights: Many, tables: Many) -> Many:
        return _two_forward(config, parts, weights, tables)

    def forward(*primals: Any) -> Any:
        values = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
        return _two_forward(config, *values), values

    norm_rope.defvjp(forward, functools.partial(_two_backward, config), symbolic_zeros=True)
    return norm_rope


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _two_jitted(parts: Many, weights: Many, tables: Many, config: _heads.Config) -> Many:
    with jax.named_scope(config.op):
        arrays = _compat.match_varying((*parts, *weights, *tables))
        operands = _two_operands(tuple(arrays[:4]), tuple(arrays[4:8]), tuple(arrays[8:]))
        arrays = _sharding.conform(operands, keep={"h": 1, "j": 1})
        return _two_differentiable(config)(tuple(arrays[:4]), tuple(arrays[4:8]), tuple(arrays[8:]))


def qk_norm_rope_two_stream(
    q0: jax.Array,
    k0: jax.Array,
    q1: jax.Array,
    k1: jax.Array,
    q_weight0: jax.Array | None,
    k_weight0: jax.Array | None,
    q_weight1: jax.Array | None,
    k_weight1: jax.Array | None,
    cos_sin0: jax.Array,
    cos_sin1: jax.Array,
    *,
    eps: float = 1e-6,
    style: str = "neox",
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`qk_norm_rope` of two streams of tokens (text and image), written one behind the other, in one launch.

    Args:
      q0, k0, q1, k1: [B, Ti, Hq, D] and [B, Ti, Hk, D]; q0 and q1 share Hq and dtype, k0 and k1 share Hk and dtype. A Ti may be 0.
      q_weight0, k_weight0, q_weight1, k_weight1: [D] or None, each stream's own.
      cos_sin0, cos_sin1: [Ti, rotary_dim], a row for each token, the same for the whole batch.
      eps, style, weight_offset, backend: as in :func:`qk_norm_rope`.

    Returns:
      (q [B, T0 + T1, Hq, D], k [B, T0 + T1, Hk, D]), stream 0 first.

    Raises, gradients and sharding as :func:`qk_norm_rope`; the batch and the heads may be sharded, the tokens are gathered.
    Source: same results as AITER's ``fused_qk_norm_rope_2way``.
    """
    op = "qk_norm_rope_two_stream"
    given = zip(_PARTS, (q0, k0, q1, k1), strict=True)
    parts = {n: _heads.heads(op, n, a) for n, a in given}
    _same_streams(op, parts)
    features = parts["q0"].shape[-1]
    weights = _weights(
        op,
        (("q_weight0", q_weight0), ("k_weight0", k_weight0), ("q_weight1", q_weight1), ("k_weight1", k_weight1)),
        features,
    )
    tables = tuple(
        _stream_table(op, f"cos_sin{i}", t, features, parts[f"q{i}"].shape[1])
        for i, t in enumerate((cos_sin0, cos_sin1))
    )
    name, source = _dispatch.requested(op, backend)
    static = (name, source, target.named(), check.eps(op, eps), _offset(op, weight_offset, weights))
    config = _heads.Config(op, _heads.style(op, style), None, False, False, *static)
    return _two_jitted(tuple(parts.values()), weights, tables, config)  # type: ignore[return-value]


def _stream_table(op: str, argument: str, value: Any, features: int, tokens: int) -> jax.Array:
    """A row for each token of a stream, which may have none."""
    a = check.array(op, argument, value)
    if a.ndim == 2 and a.shape[0] != tokens:
        raise value_error(op, argument, f"{a.shape[0]} rows", f"{tokens}, one for each token of its stream")
    if tokens == 0 and a.ndim == 2:
        _heads.table(op, argument, jnp.zeros((1, a.shape[1])), features)
        return jax.lax.stop_gradient(a)
    return _heads.table(op, argument, a, features)


def _same_streams(op: str, parts: dict[str, jax.Array]) -> None:
    first = parts["q0"]
    for n, a in parts.items():
        if a.ndim != 4 or a.shape[0] != first.shape[0] or a.shape[-1] != first.shape[-1]:
            want = f"[B, T, H, D] with B and D of q0, which is {first.shape}"
            raise value_error(op, n, f"shape {a.shape}", want)
    for i in "01":
        q, k = parts[f"q{i}"], parts[f"k{i}"]
        if k.shape[1] != q.shape[1]:
            raise value_error(op, f"k{i}", f"{k.shape[1]} tokens", f"{q.shape[1]} as q{i}")
    for n in "qk":
        a, b = parts[f"{n}0"], parts[f"{n}1"]
        if a.shape[2] != b.shape[2]:
            raise value_error(op, f"{n}1", f"{b.shape[2]} heads", f"{a.shape[2]} as {n}0")
        if a.dtype != b.dtype:
            raise type_error(op, f"{n}1", f"dtype {b.dtype.name}", f"{a.dtype.name} as {n}0", "Cast one of them.")


register_op(OpDef("qk_norm_rope", qk_norm_rope, FORWARD, BACKWARD))
register_op(OpDef("qk_norm_rope_two_stream", qk_norm_rope_two_stream, TWO_STREAM, TWO_STREAM_BACKWARD))
