"""GroupNorm: float32 arithmetic, the mean-corrected two-pass variance, an optional SiLU, one rounding at the end.

    m0 = sum(a) / N;  d = a - m0;  e = sum(d) / N;  var = sum(d * d) / N - e * e        over (spatial, channels of the group)
    v = ((d - e) * rstd) * f32(weight) + f32(bias);  y = cast(v), or cast(v / (1 + exp(-v)))

All functions take any number of leading dims, then the spatial dims with the channels behind them (``last``) or in front. ``axes``
names the mesh axes over which the spatial dims are sharded: two sums of one float or two for each group cross the wire.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ._common import Axes, f32, tree_sum


@dataclass(frozen=True)
class Layout:
    """How an array ``[..., *spatial, C]`` or ``[..., C, *spatial]`` falls into groups."""

    spatial: int
    """Number of spatial dims."""
    last: bool
    """The channels are the last dim, not the first behind the leading ones."""
    group: int
    """Channels of a group."""
    count: int
    """Elements of a whole group, all shards together."""

    def split(self, a: jax.Array) -> jax.Array:
        """``[..., S, G, channels of a group]``, or ``[..., G, channels of a group, S]``."""
        lead = a.shape[: a.ndim - self.spatial - 1]
        if self.last:
            return a.reshape(*lead, math.prod(a.shape[len(lead) : -1]), a.shape[-1] // self.group, self.group)
        return a.reshape(*lead, a.shape[len(lead)] // self.group, self.group, math.prod(a.shape[len(lead) + 1 :]))

    def channels(self, a: jax.Array) -> jax.Array:
        """``[..., C]`` in a shape that broadcasts over :meth:`split`."""
        a = f32(a).reshape(*a.shape[:-1], a.shape[-1] // self.group, self.group)
        return a[..., None, :, :] if self.last else a[..., None]

    def mean(self, *values: jax.Array, axes: Axes = ()) -> list[jax.Array]:
        """Means over each group, in shapes that broadcast over :meth:`split`; all in one sum over ``axes``."""
        space, channel = (-3, -1) if self.last else (-1, -2)
        total = jnp.stack([tree_sum(tree_sum(v, v.ndim + space), v.ndim + channel) for v in values])
        if axes:
            total = jax.lax.psum(total, axes)
        # A division that stays one. As a product with 1 / N, m0 would be multiplied and subtracted with one rounding in one place
        # and with two in another, and e would belong to neither.
        means = jax.lax.div(total, jax.lax.optimization_barrier(jnp.full_like(total, float(self.count))))
        return [means[i] for i in range(len(values))]

    def of_channels(self, per_group: jax.Array) -> jax.Array:
        """A value of each group, as :meth:`mean` has it, repeated for every channel: ``[..., C]``."""
        return jnp.repeat(per_group[..., 0, :, 0] if self.last else per_group[..., 0, 0], self.group, axis=-1)


def _affine(xh: jax.Array, weight: jax.Array | None, bias: jax.Array | None, layout: Layout) -> jax.Array:
    if weight is not None:
        xh = xh * layout.channels(weight)
    return xh if bias is None else xh + layout.channels(bias)


def forward(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    *,
    layout: Layout,
    eps: float,
    silu: bool,
    out_dtype: str,
    axes: Axes = (),
) -> dict[str, jax.Array]:
    """``{"y": shape of x, "stats": float32 [..., 3, C]}``; stats are m0, e and rstd of each channel's group.

    m0 and e are kept apart: their sum, rounded to float32, would lose what ``x - mean`` needs where the mean is large.
    """
    a = f32(layout.split(x))
    (center,) = layout.mean(a, axes=axes)
    d = a - center
    e, square = layout.mean(d, d * d, axes=axes)
    rstd = jax.lax.rsqrt(jnp.maximum(square - e * e, 0.0) + eps)  # rounding may leave a constant group just below zero
    v = _affine((d - e) * rstd, weight, bias, layout)
    if silu:
        v = v / (1.0 + jnp.exp(-v))
    stats = jnp.stack([layout.of_channels(s) for s in (center, e, rstd)], axis=-2)
    return {"y": v.astype(out_dtype).reshape(x.shape), "stats": stats}


def backward(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    stats: jax.Array,
    dy: jax.Array,
    *,
    layout: Layout,
    silu: bool,
    dtypes: dict[str, str],
    axes: Axes = (),
) -> dict[str, jax.Array]:
    """``gw = g * w;  dx = rstd * (gw - xh * mean(gw * xh) - mean(gw))``; roundings count as identity.

    With SiLU ``g = dy * sg * (1 + v * (1 - sg))``, ``sg = sigmoid(v)``. ``dweight`` and ``dbias`` [C] are ``sum(g * xh)`` and
    ``sum(g)`` over the leading and spatial dims. ``dtypes`` names the results wanted.
    """
    center, e, rstd = (layout.channels(stats[..., i, :]) for i in range(3))
    xh = ((f32(layout.split(x)) - center) - e) * rstd
    g = f32(layout.split(dy))
    if silu:
        v = _affine(xh, weight, bias, layout)
        sg = 1.0 / (1.0 + jnp.exp(-v))
        g = g * (sg * (1.0 + v * (1.0 - sg)))
    gw = g if weight is None else g * layout.channels(weight)
    along, plain = layout.mean(gw * xh, gw, axes=axes)
    dx = rstd * ((gw - plain) - xh * along)
    rows = (*range(g.ndim - 3), g.ndim - 3 if layout.last else g.ndim - 1)  # all but group and channel of the group
    sums = {n: jnp.sum(t, axis=rows).reshape(-1) for n, t in (("dweight", g * xh), ("dbias", g)) if n in dtypes}
    return {n: a.astype(dtypes[n]) for n, a in {"dx": dx.reshape(x.shape), **sums}.items()}
