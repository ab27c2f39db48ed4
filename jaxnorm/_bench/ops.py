"""What ``jaxnorm bench`` and ``jaxnorm cache prewarm`` can run: each op with its inputs, its usual shapes and its plain form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn

from . import plain

EPS = plain.EPS
GROUPS = 32
DTYPES = ("bfloat16", "float16", "float32")
SPECS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "fp8": {"dtype": "fp8"},
    "fp8-g128": {"dtype": "fp8", "group_size": 128},
    "mxfp8": {"dtype": "float8_e4m3fn", "group_size": 32, "scale_dtype": "e8m0"},
    "mxfp4": {"dtype": "fp4", "group_size": 32, "scale_dtype": "e8m0"},
}
ROWS = ("8192x4096", "16x4096", "1x4096", "8192x8192", "1024x8192", "131072x1024")
SMALL_ROWS = ("256x1024", "16x4096")
"""For a CPU, where the large ones would take minutes and tell nothing about the kernels."""
IMAGES, SMALL_IMAGES = ("8x64x64x320", "8x32x32x640", "2x128x128x512"), ("1x16x16x64",)
HEADS, SMALL_HEADS = ("8192x32x128", "16x32x128", "8192x8x128"), ("64x8x64",)
QK, SMALL_QK = ("8192x32x8x128", "16x32x8x128", "1x32x8x128"), ("64x8x2x64",)


@dataclass(frozen=True)
class Op:
    """One thing to measure. ``call`` and ``plain`` take the inputs in order; quantising ones take the spec last."""

    name: str
    function: str
    """The public function."""
    dims: str
    """What a shape means: ``ROWSxFEATURES``."""
    shapes: tuple[str, ...]
    small: tuple[str, ...]
    make: Callable[[jax.Array, tuple[int, ...], Any], tuple[Any, ...]]
    call: Callable[..., Any]
    plain: Callable[..., Any]
    quantises: bool = False
    gradients: tuple[int, ...] = ()
    """Inputs whose gradients are timed: this is a backward."""

    def ours(self, backend: str | None, spec: Any) -> Callable[..., Any]:
        """jaxnorm's function on a backend; None is what a user gets who names no backend."""
        tail = (spec,) if self.quantises else ()
        return lambda *arrays: self.call(*arrays, *tail, backend=backend)

    def usual(self, spec: Any) -> Callable[..., Any]:
        """The op as written in jax.numpy."""
        return (lambda *arrays: self.plain(*arrays, spec)) if self.quantises else self.plain


@dataclass(frozen=True)
class Case:
    """An op at a shape, a dtype and, for quantising ones, a format of codes."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    spec: str = ""

    @property
    def key(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.dtype, self.spec]
        return " ".join(p for p in parts if p)

    def quant_spec(self) -> Any:
        return jn.QuantSpec(**SPECS[self.spec]) if self.spec else None


def _normal(key: jax.Array, i: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, i), shape, dtype)


def _weight(key: jax.Array, i: int, n: int, dtype: Any) -> jax.Array:
    return (1.0 + 0.1 * _normal(key, i, (n,), jnp.float32)).astype(dtype)


def _rows(key: jax.Array, shape: tuple[int, ...], dtype: Any, wide: int = 1, bias: bool = False) -> tuple[Any, ...]:
    x = [_normal(key, i, shape, dtype) for i in range(wide)]
    return (*x, _weight(key, 8, shape[-1], dtype), *([_normal(key, 9, shape[-1:], dtype)] if bias else []))


def _quantize_rows(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    return (_normal(key, 0, shape, dtype),)


def _rope(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    tokens, _, d = shape
    return _normal(key, 0, shape, dtype), jnp.arange(tokens), jn.rope_table(tokens, d)  # pyright: ignore


def _qk(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    tokens, q_heads, k_heads, d = shape
    q, k = _normal(key, 0, (tokens, q_heads, d), dtype), _normal(key, 1, (tokens, k_heads, d), dtype)
    weights = _weight(key, 2, d, dtype), _weight(key, 3, d, dtype)
    return q, k, *weights, jnp.arange(tokens), jn.rope_table(tokens, d)  # pyright: ignore


def _function(name: str, **options: Any) -> Callable[..., Any]:
    return lambda *arrays, backend: getattr(jn, name)(*arrays, **options, backend=backend)


def _plain_quantize(x: jax.Array, spec: Any) -> Any:
    return plain.quantize(x.astype(jnp.float32), spec)


def _norms(name: str, wide: int, bias: bool, written: Any) -> list[Op]:
    make, call = functools.partial(_rows, wide=wide, bias=bias), _function(name, eps=EPS)
    common = (name, "ROWSxFEATURES", ROWS, SMALL_ROWS, make, call, written)
    gradients = (0, *range(wide, wide + 1 + bias))
    return [Op(name, *common), Op(f"{name}_bwd", *common, gradients=gradients)]


def _quant(name: str, make: Any, written: Any, **options: Any) -> Op:
    return Op(name, name, "ROWSxFEATURES", ROWS, SMALL_ROWS, make, _function(name, **options), written, quantises=True)


def _all() -> list[Op]:
    rows = functools.partial
    groups = functools.partial(plain.groupnorm_silu, num_groups=GROUPS)
    group = ("groupnorm", "BATCHxHEIGHTxWIDTHxCHANNELS", IMAGES, SMALL_IMAGES, rows(_rows, bias=True))
    group_call = _function("groupnorm", num_groups=GROUPS, activation="silu", eps=EPS)
    return [
        *_norms("rmsnorm", 1, False, plain.rmsnorm),
        *_norms("add_rmsnorm", 2, False, plain.add_rmsnorm),
        _quant("quantize", _quantize_rows, _plain_quantize),
        _quant("rmsnorm_quant", _rows, plain.rmsnorm_quant, eps=EPS),
        _quant("add_rmsnorm_quant", rows(_rows, wide=2), plain.add_rmsnorm_quant, eps=EPS),
        *_norms("layernorm", 1, True, plain.layernorm),
        *_norms("add_layernorm", 2, True, plain.add_layernorm),
        _quant("layernorm_quant", rows(_rows, bias=True), plain.layernorm_quant, eps=EPS),
        _quant("add_layernorm_quant", rows(_rows, wide=2, bias=True), plain.add_layernorm_quant, eps=EPS),
        Op("groupnorm", *group, group_call, groups),
        Op("groupnorm_bwd", *group, group_call, groups, gradients=(0, 1, 2)),
        Op("rope", "rope", "TOKENSxHEADSxDIM", HEADS, SMALL_HEADS, _rope, _function("rope"), plain.rope),
        Op("qk_norm_rope", "qk_norm_rope", "TOKENSxQ_HEADSxK_HEADSxDIM", QK, SMALL_QK, _qk,
           _function("qk_norm_rope", eps=EPS), plain.qk_norm_rope),
    ]  # fmt: skip


OPS: dict[str, Op] = {op.name: op for op in _all() if op.function in jn.__all__}


def parse_shape(text: str) -> tuple[int, ...]:
    """``8192x4096`` -> (8192, 4096).

    Raises:
      ValueError: anything but positive whole numbers with ``x`` between them.
    """
    parts = text.strip().split("x")
    if not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f"shapes: got {text!r}, expected numbers with x between them, such as 8192x4096")
    return tuple(map(int, parts))


def _for_op(text: str) -> tuple[str, tuple[int, ...]]:
    """``rope:8192x32x128`` -> ("rope", (8192, 32, 128)); without an op the first is empty."""
    name, _, shape = text.strip().rpartition(":")
    if name and name not in OPS:
        raise ValueError(f"shapes: got {text!r}, expected OP:SHAPE with one of {', '.join(OPS)}")
    return name, parse_shape(shape)


def select(
    ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], specs: Sequence[str], small: bool
) -> list[Case]:
    """The cases of a run: the first shape of every op before the second of any.

    Args:
      shapes: each is taken by the ops that have as many dims, or by the one it names (``rope:8192x32x128``, its backward included);
        empty = the usual ones of each op.
      small:  the usual shapes for a CPU.

    Raises:
      ValueError: an op that none of the shapes fits, a shape that fits none, or one that a format cannot divide.
    """
    wanted = [_for_op(s) for s in shapes]
    ranked: list[tuple[int, Case]] = []
    used = set()
    for name in ops:
        op = OPS[name]
        usual = [parse_shape(s) for s in (op.small if small else op.shapes)]
        fitting = [(o, s) for o, s in wanted if len(s) == len(usual[0]) and o in ("", name, op.function)]
        if wanted and not fitting:
            raise ValueError(
                f"shapes: got {', '.join(shapes)}, expected one for {name}: {op.dims}, such as {op.shapes[0]}"
            )
        used.update(fitting)
        formats = specs if op.quantises else [""]
        mine = [s for _, s in fitting] or usual
        ranked += [(i, Case(name, s, d, f)) for i, s in enumerate(mine) for d in dtypes for f in formats]
    if unused := [text for text, parsed in zip(shapes, wanted, strict=True) if parsed not in used]:
        raise ValueError(f"shapes: got {unused[0]}, expected the number of dims of one of the ops")
    for _, case in ranked:
        _check(case)
    return [case for _, case in sorted(ranked, key=lambda e: e[0])]


def _check(case: Case) -> None:
    width = case.shape[-1]
    group = SPECS[case.spec].get("group_size") if case.spec else None
    if group and width % group:
        raise ValueError(f"shapes: got {width} features for {case.spec}, expected a multiple of its group_size={group}")
    if OPS[case.op].function == "groupnorm" and width % GROUPS:
        raise ValueError(f"shapes: got {width} channels, expected a multiple of the {GROUPS} groups")


def inputs(case: Case, count: int) -> list[tuple[Any, ...]]:
    """So many input sets, different from each other, as they lie in device memory."""
    make = jax.jit(lambda key: OPS[case.op].make(key, case.shape, jnp.dtype(case.dtype)))
    key = jax.random.key(0, impl="rbg")  # threefry takes longer than the ops at 2 GB
    sets = [make(jax.random.fold_in(key, i)) for i in range(count)]
    return jax.block_until_ready(sets)


def input_types(case: Case) -> tuple[Any, ...]:
    """Shapes and dtypes of an input set."""
    op, dtype = OPS[case.op], jnp.dtype(case.dtype)
    return jax.eval_shape(
        lambda key: op.make(key, case.shape, dtype), jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    )
