"""KVCache: keys and values of past tokens in pages, quantised or not, as a pytree.

    layout    k                                   v                                   scales, one a token and head
    shuffled  [B, Hk, D/X, P, X]                  [B, Hk, P/X, D, X]                  [B, Hk, P]
    paged     [B, P, Hk, D]                       the same                            [B, P, Hk]
    slots     [S, Hk, D]                          the same                            [S, Hk]

B pages of P slots, S = B * P, X = 16 bytes of elements. Slot s is place s % P of page s // P.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ._compile import target as _target
from ._types import DTYPES as CODES
from ._types import FP8
from .errors import type_error, value_error

LAYOUTS = ("shuffled", "paged", "slots")
QUANTS = (None, "per_token", "per_tensor")
FLOATS = ("bfloat16", "float16", "float32")
EIGHT_BITS = ("int8", *FP8)
INTERLEAVED = "A pool that interleaves k and v, [B, 2, P, Hk, D], must be split first: pool[:, 0] and pool[:, 1]."
PACKED = "A pool that packs k and v, [B, Hk, P, 2 * D], must be split first: pool[..., :D] and pool[..., D:]."


@dataclass(frozen=True)
class Geometry:
    """What the arrays of a cache look like; hashable, fixed when tracing."""

    layout: str
    quant: str | None
    dtype: str
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def x(self) -> int:
        """X: the elements of 16 bytes."""
        return 16 // np.dtype(self.dtype).itemsize

    @property
    def k_shape(self) -> tuple[int, ...]:
        b, p, h, d, x = self.num_pages, self.page_size, self.num_kv_heads, self.head_dim, self.x
        return {"shuffled": (b, h, d // x, p, x), "paged": (b, p, h, d), "slots": (b * p, h, d)}[self.layout]

    @property
    def v_shape(self) -> tuple[int, ...]:
        b, p, h, d, x = self.num_pages, self.page_size, self.num_kv_heads, self.head_dim, self.x
        return (b, h, p // x, d, x) if self.layout == "shuffled" else self.k_shape

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """None: there are no scales."""
        b, p, h = self.num_pages, self.page_size, self.num_kv_heads
        if self.quant == "per_token":
            return {"shuffled": (b, h, p), "paged": (b, p, h), "slots": (b * p, h)}[self.layout]
        return () if self.quant == "per_tensor" else None


def expected(layout: str, dtype: str) -> tuple[str, str]:
    """The shapes of k and v, for messages."""
    x = 16 // np.dtype(dtype).itemsize
    if layout == "shuffled":
        return f"[B, Hk, D/{x}, P, {x}]", f"[B, Hk, P/{x}, D, {x}]"
    same = "[B, P, Hk, D]" if layout == "paged" else "[B * P, Hk, D]"
    return same, same


def positive(op: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(op, argument, type(value).__name__, "a positive integer")
    if value < 1:
        raise value_error(op, argument, value, "a positive integer")
    return int(value)


def _check_divisible(op: str, g: Geometry) -> None:
    for argument, value in (("head_dim", g.head_dim), ("page_size", g.page_size)):
        if g.layout == "shuffled" and value % g.x:
            raise value_error(
                op, argument, value, f"a multiple of {g.x}, 16 bytes of {g.dtype}, for layout='shuffled'",
                "Use another, or layout='paged'.",
            )  # fmt: skip


def _check_formats(op: str, layout: Any, quant: Any, dtype: str) -> None:
    if layout not in LAYOUTS:
        raise value_error(op, "layout", repr(layout), " or ".join(map(repr, LAYOUTS)))
    if quant not in QUANTS:
        raise value_error(op, "quant", repr(quant), "None or 'per_token' or 'per_tensor'")
    if dtype in EIGHT_BITS and quant is None:
        raise value_error(
            op, "quant", f"None with dtype {dtype}", "'per_token' or 'per_tensor'", "Codes of 8 bits need a scale."
        )
    if dtype not in EIGHT_BITS and quant is not None:
        raise value_error(
            op, "quant", f"{quant!r} with dtype {dtype}", "None", 'Quantised caches have dtype "fp8" or "int8".'
        )


def _dtype_name(op: str, dtype: Any) -> str:
    """A resolved name; "fp8" is the native e4m3 of what is being traced for."""
    if isinstance(dtype, str) and dtype == "fp8":
        targets = _target.in_force(_target.named())
        flavours = {_target.native_fp8(t) for t in targets}
        if len(flavours) > 1:
            got = " and ".join(f"{t} ({_target.native_fp8(t)})" for t in targets)
            raise value_error(op, "dtype", f"'fp8' for {got}", "one flavour", "Name float8_e4m3fn or float8_e4m3fnuz.")
        return flavours.pop()
    name = dtype if isinstance(dtype, str) and dtype in CODES else None
    if name is None:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    if name not in (*FLOATS, *EIGHT_BITS):
        raise value_error(op, "dtype", name, f"'fp8', 'int8', or a dtype among {', '.join((*FLOATS, *EIGHT_BITS))}")
    return name


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of past tokens, written by :func:`qk_norm_rope_cache` and read by :meth:`gather`.

    A pytree of arrays without shared buffers: donate it to the jitted function that updates it, or carry it through ``lax.scan``
    and ``while_loop``, and it is written in place.

    Attributes:
      k, v:             bfloat16, float16, float32; int8 or fp8 with ``quant``. With B pages of P slots, X = 16 bytes of elements:
                        "shuffled" k [B, Hk, D/X, P, X], v [B, Hk, P/X, D, X]; "paged" [B, P, Hk, D]; "slots" [B * P, Hk, D].
      k_scale, v_scale: what a code is multiplied with, float32: one a token and head ("per_token": [B, Hk, P], [B, P, Hk],
                        [B * P, Hk]), a scalar ("per_tensor"), or None.
      page_size:        P; read off the arrays when None ("slots": 1).
      layout, quant:    "shuffled", "paged" or "slots"; None, "per_token" or "per_tensor".

    Raises:
      ValueError: arrays that do not fit the layout or each other; pools that hold k and v in one array.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    page_size: int | None = None
    layout: str = "shuffled"
    quant: str | None = None

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  a frozen dataclass normalises itself
        for name in ("k", "v"):
            set_(name, _array(name, getattr(self, name)))
        if self.quant == "per_tensor":
            for name in ("k_scale", "v_scale"):
                set_(name, scalar("KVCache", name, getattr(self, name)))
        set_("page_size", geometry("KVCache", self).page_size)

    @classmethod
    def create(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: Any,
        quant: str | None = None,
        layout: str = "shuffled",
    ) -> KVCache:
        """An empty cache of ``num_pages * page_size`` slots: zeros, with scales of 1.

        Args:
          dtype:  bfloat16, float16 or float32; with quant int8, "fp8" (the target's native e4m3) or an fp8 dtype.
          quant:  None, "per_token" (a scale for each token and head) or "per_tensor" (one for k, one for v).
          layout: "shuffled" needs ``head_dim`` and ``page_size`` that are multiples of X, 16 bytes of elements.

        Raises:
          ValueError: unknown names, 8 bits without quant or more with it, sizes that the layout cannot hold.
        """
        op = "KVCache.create"
        name = _dtype_name(op, dtype)
        _check_formats(op, layout, quant, name)
        named = (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
        )
        sizes = [positive(op, *argument) for argument in named]
        g = Geometry(layout, quant, name, *sizes)
        _check_divisible(op, g)
        # each leaf a buffer of its own, or the cache could not be donated
        scales = [None if g.scale_shape is None else jnp.ones(g.scale_shape, jnp.float32) for _ in range(2)]
        return cls._of(jnp.zeros(g.k_shape, name), jnp.zeros(g.v_shape, name), *scales, g.page_size, layout, quant)

    @classmethod
    def _of(cls, *values: Any) -> KVCache:
        """Without checks: also for what JAX puts into a pytree instead of arrays."""
        cache = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(cache, field.name, value)
        return cache

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.k, self.v, self.k_scale, self.v_scale), (self.page_size, self.layout, self.quant)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: Any) -> KVCache:
        return cls._of(*children, *aux)

    def gather(self, slots: Any, *, backend: str | None = None) -> tuple[jax.Array, jax.Array]:
        """(k, v) at ``slots``, each ``slots.shape + (Hk, D)``: the cache's dtype, or float32 ``f32(code) * scale`` when quantised.

        Args:
          slots:   integers of any shape; a negative one gives zeros, as does one beyond the cache.
          backend: "xla", "triton", "hip", or None for the best.

        Raises:
          ValueError: slots beyond the cache, given as host values (NumPy, list).
        """
        from ._api import cache as api

        return api.gather(self, slots, backend)

    def replace(self, **changes: Any) -> KVCache:
        return dataclasses.replace(self, **changes)


def _array(name: str, value: Any) -> Any:
    if value is None or not hasattr(value, "shape"):
        raise type_error("KVCache", name, type(value).__name__, "an array", f"{INTERLEAVED} {PACKED}")
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def scalar(op: str, argument: str, value: Any) -> jax.Array:
    """A float32 scalar on the device; never read here."""
    if value is None:
        raise value_error(op, argument, None, "a float32 scalar with quant='per_tensor'")
    if not hasattr(value, "shape"):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise type_error(op, argument, type(value).__name__, "a float32 scalar")
        return jnp.asarray(float(value), jnp.float32)
    if value.shape not in ((), (1,)):
        raise value_error(
            op, argument, f"shape {value.shape}", "a scalar, () or (1,)", "Per token scales: quant='per_token'."
        )
    if np.dtype(value.dtype).name not in (*FLOATS, "float64"):
        raise type_error(op, argument, f"dtype {value.dtype}", "a float32 scalar")
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((), jnp.float32)  # type: ignore[return-value]
    return jnp.asarray(value).astype(jnp.float32).reshape(())


def geometry(op: str, cache: KVCache) -> Geometry:
    """The geometry that the arrays of a cache have, checked against each other and the layout.

    Raises:
      ValueError: they do not fit; the message names the layout.
    """
    k, layout, quant = cache.k, cache.layout, cache.quant
    argument = "" if op == "KVCache" else "cache."
    dtype = np.dtype(k.dtype).name
    if dtype not in (*FLOATS, *EIGHT_BITS):
        raise type_error(op, f"{argument}k", f"dtype {dtype}", f"one of {', '.join((*FLOATS, *EIGHT_BITS))}")
    _check_formats(op, layout, quant, dtype)
    found = _sizes(cache, dtype)
    if found is None or 0 in k.shape:
        raise _misfit(op, f"{argument}k", cache, dtype, 0)
    g = Geometry(layout, quant, dtype, *found)
    if k.shape != g.k_shape or (cache.page_size is not None and cache.page_size != g.page_size):
        raise _misfit(op, f"{argument}k", cache, dtype, 0)
    if tuple(cache.v.shape) != g.v_shape or np.dtype(cache.v.dtype).name != dtype:
        raise _misfit(op, f"{argument}v", cache, dtype, 1, g.v_shape)
    if cache.v is k:
        raise value_error(op, f"{argument}v", "the array that is k", "an array of its own", f"{INTERLEAVED} {PACKED}")
    for name in ("k_scale", "v_scale"):
        _check_scale(op, f"{argument}{name}", getattr(cache, name), g)
    return g


def _sizes(cache: KVCache, dtype: str) -> tuple[int, int, int, int] | None:
    """(pages, page size, kv heads, head dim) read off k; None if it has not the dims of the layout."""
    shape, page = tuple(cache.k.shape), cache.page_size
    if cache.layout == "shuffled":
        return (shape[0], shape[3], shape[1], shape[2] * (16 // np.dtype(dtype).itemsize)) if len(shape) == 5 else None
    if cache.layout == "paged":
        return shape if len(shape) == 4 else None  # type: ignore[return-value]
    page = 1 if page is None else page
    return (
        (shape[0] // page, page, shape[1], shape[2]) if len(shape) == 3 and page > 0 and shape[0] % page == 0 else None
    )


def _misfit(
    op: str, argument: str, cache: KVCache, dtype: str, which: int, shape: tuple[int, ...] | None = None
) -> ValueError:
    got = cache.v if which else cache.k
    want = expected(cache.layout, dtype)[which]
    page = "" if cache.page_size is None else f" with P = page_size={cache.page_size}"
    want = f"{want}{f' = {shape} as k' if shape else page} for layout={cache.layout!r} and {dtype}"
    remedy = "Dense arrays of k and of v, each on its own. "
    if len(got.shape) == 5 and got.shape[1] == 2:
        remedy += INTERLEAVED
    elif which and cache.layout == "shuffled" and len(got.shape) == 4:
        remedy += "v as [B, Hk, D, P] has the same bytes: reshape it."
    elif len(got.shape) == 4:
        remedy += PACKED
    return value_error(op, argument, f"shape {tuple(got.shape)} of {got.dtype}", want, remedy.strip())


def _check_scale(op: str, argument: str, scale: Any, g: Geometry) -> None:
    if (scale is None) != (g.scale_shape is None):
        raise value_error(op, argument, "None" if scale is None else f"shape {scale.shape}",
                          "None" if g.scale_shape is None else f"float32 {g.scale_shape}", f"quant is {g.quant!r}.")  # fmt: skip
    if scale is not None and (tuple(scale.shape) != g.scale_shape or np.dtype(scale.dtype).name != "float32"):
        want = f"float32 {g.scale_shape} for layout={g.layout!r}, quant={g.quant!r}"
        raise value_error(op, argument, f"{scale.dtype} {tuple(scale.shape)}", want)


export.register_pytree_node_serialization(  # a cache among the arguments or results of an exported program
    KVCache,
    serialized_name="jaxnorm.KVCache",
    serialize_auxdata=lambda aux: json.dumps(aux).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
)
