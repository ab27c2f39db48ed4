"""Rotary embedding: float32 arithmetic, a table of [cos | sin] rows looked up by position, one rounding by the caller.

With h = rotary_dim / 2, the pairs j < h are elements (j, j + h) in the style "neox" and (2j, 2j + 1) in "gptj":

    o_first = x_first * cos_j - x_second * sin_j;   o_second = x_second * cos_j + x_first * sin_j

Elements from rotary_dim on pass. All functions take any number of leading dims.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ._common import f32


def components(sections: tuple[int, int, int], interleaved: bool) -> tuple[int, ...]:
    """Which of the three positions (time, height, width) supplies the angle of each pair, by the pair's index."""
    s0, s1, s2 = sections
    if not interleaved:
        return (0,) * s0 + (1,) * s1 + (2,) * s2
    return tuple(j % 3 if j < 3 * sections[j % 3] and j % 3 else 0 for j in range(s0 + s1 + s2))


def _row(table: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) float32 ``[..., h]`` at ``positions [...]``; outside the table the identity, never another row."""
    rows, width = table.shape
    inside = ((positions >= 0) & (positions < rows))[..., None]
    row = f32(jnp.take(table, jnp.clip(positions, 0, rows - 1), axis=0, mode="clip"))
    return jnp.where(inside, row[..., : width // 2], 1.0), jnp.where(inside, row[..., width // 2 :], 0.0)


def lookup(
    table: jax.Array,
    positions: jax.Array,
    sections: tuple[int, int, int] | None = None,
    interleaved: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 ``[..., h]``.

    Args:
      table:     [P, 2h], any float dtype.
      positions: ``[...]``, or with ``sections`` ``[3, ...]``: then each pair takes cos and sin at the position of its component.
                 A position outside ``[0, P)`` drops the rotation of its pairs (cos 1, sin 0).
    """
    if sections is None:
        return _row(table, positions)
    cos, sin = _row(table, positions)  # [3, ..., h]
    pick = np.asarray(components(sections, interleaved))
    return (
        jnp.where(pick == 0, cos[0], jnp.where(pick == 1, cos[1], cos[2])),
        jnp.where(pick == 0, sin[0], jnp.where(pick == 1, sin[1], sin[2])),
    )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, style: str, inverse: bool = False) -> jax.Array:
    """float32 ``x [..., H, D]`` turned by ``cos, sin [..., h]``, the same for all heads; ``inverse`` turns back (sin -> -sin)."""
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], (-sin if inverse else sin)[..., None, :]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if style == "neox":
        first, second = turned[..., :half], turned[..., half:]
        out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        pairs = turned.reshape(*turned.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        out = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(turned.shape)
    return jnp.concatenate([out, rest], -1) if rest.shape[-1] else out


def rope(
    x: jax.Array,
    positions: jax.Array,
    table: jax.Array,
    *,
    style: str,
    sections: tuple[int, int, int] | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> jax.Array:
    """``cast(rotate(f32(x)))``; the elements that are not rotated keep their bits."""
    cos, sin = lookup(table, positions, sections, interleaved)
    width = table.shape[-1]
    out = rotate(f32(x[..., :width]), cos, sin, style, inverse).astype(x.dtype)
    return jnp.concatenate([out, x[..., width:]], -1) if width < x.shape[-1] else out
