"""One rank's part of examples/gemma's model, inside shard_map.

A half block is a product that leaves partial sums, a norm of their sum, and the residual add in the norm that follows. With many
rows, as in a prompt, the residual stream lives in row shards, a W-th of the tokens on each rank:

    x    = reduce_scatter(attention(h)) -> rmsnorm     jaxnorm.distributed, on this rank's rows
    h, r = add_rmsnorm(x, r)                           the same rows
    h    = all_gather(h)                               for the next product

With few, as in a step of one token, a second collective would cost more than it saves: every rank has all rows.

    x    = reduce_scatter(attention(h)) -> rmsnorm -> all_gather       jaxnorm.distributed, one call
    h, r = add_rmsnorm(x, r)                                           all rows

`plain` is what they are compared with: psum, and every norm on every rank for all rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jaxnorm
from jaxnorm import KVCache

from ..gemma import model as gemma
from ..gemma.model import Config, Params
from .sharding import AXIS, Plan

# Up to so many rows every rank norms all of them. 512 tokens of Gemma 3 270M (width 640), medians: over four H200s 5.3 ms whole,
# 7.2 in shards, over two 3.7 and 7.0 (benchmarks/results/h200/tensor-parallel.json); more rows were not measured.
FEW_ROWS = 512


class Shards:
    """Norms on this rank's rows."""

    def __init__(self, rows: int, eps: float) -> None:
        self.rows, self.eps = rows, eps
        self.share = -(-rows // jax.lax.axis_size(AXIS))

    def own(self, a: jax.Array) -> jax.Array:
        """This rank's rows of [rows, E], zeros behind the last."""
        padded = jnp.pad(a, ((0, self.share * jax.lax.axis_size(AXIS) - self.rows), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(AXIS) * self.share, self.share)

    def whole(self, a: jax.Array) -> jax.Array:
        return jax.lax.all_gather(a, AXIS, tiled=True)[: self.rows]

    def reduced(self, partial: jax.Array, weight: jax.Array) -> jax.Array:
        """rmsnorm of the sum over ranks."""
        return jaxnorm.distributed.reduce_scatter_rmsnorm_quant_all_gather(
            partial, weight, axis_name=AXIS, eps=self.eps, gather=False
        )


class Whole:
    """Norms on all rows."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def own(self, a: jax.Array) -> jax.Array:
        return a

    def whole(self, a: jax.Array) -> jax.Array:
        return a

    def reduced(self, partial: jax.Array, weight: jax.Array) -> jax.Array:
        return jaxnorm.distributed.reduce_scatter_rmsnorm_quant_all_gather(
            partial, weight, axis_name=AXIS, eps=self.eps
        )


class Plain(Whole):
    """The same with XLA's collectives alone."""

    def reduced(self, partial: jax.Array, weight: jax.Array) -> jax.Array:
        return jaxnorm.rmsnorm(jax.lax.psum(partial, AXIS), weight, eps=self.eps)


def norms_of(rows: int, eps: float, plain: bool) -> Shards | Whole:
    if plain:
        return Plain(eps)
    return Shards(rows, eps) if rows > FEW_ROWS else Whole(eps)


def forward(
    params: Params,
    plan: Plan,
    table: jax.Array,
    tokens: jax.Array,
    cache: KVCache,
    start: jax.Array,
    plain: bool = False,
) -> tuple[jax.Array, KVCache]:
    """`gemma.forward` on one rank: tokens [B, T] -> hidden [B, T, E], the same on all ranks, and this rank's cache."""
    config: Config = plan.local
    batch, length = tokens.shape
    norms = norms_of(batch * length, config.eps, plain)
    embedded = params.embedding[tokens.reshape(-1)]
    residual = norms.own(embedded * jnp.asarray(config.width**0.5, embedded.dtype))

    def spread(rows: jax.Array) -> jax.Array:
        return norms.whole(rows).reshape(batch, length, config.width)

    def block(carry, item):  # type: ignore[no-untyped-def]
        h, residual, cache = carry
        index, layer = item
        attended, cache = gemma.attention(config, index, layer, h, table, cache, start)
        if not plan.shards_heads:  # every rank has the whole of it: one counts
            attended = jnp.where(jax.lax.axis_index(AXIS) == 0, attended, jnp.zeros((), attended.dtype))
        x = norms.reduced(attended.reshape(-1, config.width), layer.post_attn_norm)
        h, residual = jaxnorm.add_rmsnorm(x, residual, layer.ffn_norm, eps=config.eps)
        x = gemma.mlp(layer, spread(h), residual.dtype)
        x = norms.reduced(x.reshape(-1, config.width), layer.post_ffn_norm)
        h, residual = jaxnorm.add_rmsnorm(x, residual, layer.next_norm, eps=config.eps)
        return (spread(h), residual, cache), None

    h = spread(jaxnorm.rmsnorm(residual, params.first_norm, eps=config.eps))
    items = (jnp.arange(config.layers), params.layers)
    (h, _, cache), _ = jax.lax.scan(block, (h, residual, cache), items)
    return h, cache
