"""Writing a KV cache and reading it (operator: ``qk_norm_rope_cache``, ``KVCache.gather``).

Slot s is place ``s % P`` of page ``s // P``. A slot below zero or beyond the cache is mapped behind the last page first: JAX would
take a negative index from the end, and only an index that is too large is dropped.

bfloat16 and fp8 move as integers. XLA has no such scatter on a CPU, and would take the whole cache through another format, which
does not keep the bits of every NaN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._cache import Geometry
from .._types import QuantSpec
from ._common import f32, rounded
from .quant import divide, encode, quantize

Pair = tuple[jax.Array, jax.Array]


def place(slots: jax.Array, g: Geometry) -> Pair:
    """(page, place in it) of each slot; page B for one that is in no page."""
    inside = (slots >= 0) & (slots < g.slots)
    return jnp.where(inside, slots // g.page_size, g.num_pages), jnp.where(inside, slots % g.page_size, 0)


def codes(v: jax.Array, g: Geometry, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """``v [T, H, D]`` as it is stored, and its scales ``[T, H]`` if it has its own. ``scale``: the one of all (per_tensor)."""
    if v.dtype == g.dtype:
        return v, None
    exact = rounded(
        f32(v), v.dtype
    )  # of the values as they are returned, whatever the compiler makes of the cast before
    if g.quant is None:
        return exact.astype(g.dtype), None
    spec = QuantSpec(g.dtype)
    if g.quant == "per_tensor":
        assert scale is not None
        return encode(divide(exact, scale), spec), None
    stored, scales = quantize(exact, spec)
    return stored, scales[..., 0]


def _bits(a: jax.Array) -> jax.Array:
    if a.dtype == jnp.bfloat16 or a.dtype.name.startswith("float8"):
        return jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
    return a


def _unbits(a: jax.Array, dtype: Any) -> jax.Array:
    return a if a.dtype == dtype else jax.lax.bitcast_convert_type(a, dtype)


def _pieces(v: jax.Array, g: Geometry) -> jax.Array:
    """``[..., Hk, D] -> [..., Hk, D/X, X]``"""
    return v.reshape(*v.shape[:-1], g.head_dim // g.x, g.x)


def _at(array: jax.Array, which: str, page: jax.Array, offset: jax.Array, g: Geometry) -> Any:
    """The elements of the slots in k, v or the scales, as an index of ``array.at``."""
    if g.layout == "slots":
        return array.at[page * g.page_size + offset]
    if g.layout == "paged":
        return array.at[page, offset]
    if which == "v":
        return array.at[page, :, offset // g.x, :, offset % g.x]
    return array.at[page, :, :, offset] if which == "k" else array.at[page, :, offset]


def store(array: jax.Array, which: str, values: jax.Array, slots: jax.Array, g: Geometry) -> jax.Array:
    """``array`` with ``values`` ([T, Hk, D], scales [T, Hk]) in the slots; ``which`` is "k", "v" or "scale"."""
    page, offset = place(slots, g)
    if which == "k" and g.layout == "shuffled":
        values = _pieces(values, g)
    found = _at(_bits(array), which, page, offset, g)
    return _unbits(found.set(_bits(values), mode="drop"), array.dtype)


def load(array: jax.Array, which: str, slots: jax.Array, g: Geometry) -> jax.Array:
    """The inverse of :func:`store`, zeros where there is no such slot."""
    page, offset = place(slots, g)
    values = _at(_bits(array), which, page, offset, g).get(mode="fill", fill_value=0)
    if which == "k" and g.layout == "shuffled":
        values = values.reshape(*values.shape[:-2], g.head_dim)
    return _unbits(values, array.dtype)


def gather(k: jax.Array, v: jax.Array, k_scale: Any, v_scale: Any, slots: jax.Array, g: Geometry) -> Pair:
    """(k, v) ``[T, Hk, D]`` of slots ``[T]``: as stored, or float32 ``f32(code) * scale``."""

    def one(which: str, array: jax.Array, scale: Any) -> jax.Array:
        stored = load(array, which, slots, g)
        if g.quant is None:
            return stored
        if g.quant == "per_tensor":
            return jnp.where(_known(slots, g)[:, None, None], f32(stored) * scale, 0.0)
        return f32(stored) * load(scale, "scale", slots, g)[..., None]

    return one("k", k, k_scale), one("v", v, v_scale)


def _known(slots: jax.Array, g: Geometry) -> jax.Array:
    """Zero times a scale that is no number would be no zero."""
    return (slots >= 0) & (slots < g.slots)
