"""Which device holds what: query heads, MLP rows and columns by rank; key/value heads where they divide; the rest everywhere.

A head count that the ranks do not divide stays whole: every rank then works out all of the attention, and one of them counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import KVCache

from ..gemma import model as gemma
from ..gemma.errors import DemoError
from ..gemma.model import Config, Layer, Params

AXIS = "tp"


@dataclass(frozen=True)
class Plan:
    """The model of one rank."""

    whole: Config
    ranks: int

    def __post_init__(self) -> None:
        if self.whole.mlp_width % self.ranks:
            raise DemoError(
                f"tensor_parallel: {self.ranks} devices do not divide the MLP's {self.whole.mlp_width} columns. Use another number."
            )

    @property
    def shards_heads(self) -> bool:
        """Whether each rank has query heads of its own, with the key/value heads that they read."""
        heads, kv = self.whole.heads, self.whole.kv_heads
        return heads % self.ranks == 0 and (kv % self.ranks == 0 or self.ranks % kv == 0)

    @property
    def copies(self) -> int:
        """Ranks that hold the same key/value head."""
        return max(1, self.ranks // self.whole.kv_heads) if self.shards_heads else 1

    @property
    def local(self) -> Config:
        """The configuration of one rank's shard."""
        if not self.shards_heads:
            return dataclasses.replace(self.whole, mlp_width=self.whole.mlp_width // self.ranks)
        return dataclasses.replace(
            self.whole,
            heads=self.whole.heads // self.ranks,
            kv_heads=self.whole.kv_heads * self.copies // self.ranks,
            mlp_width=self.whole.mlp_width // self.ranks,
        )


def specs(plan: Plan) -> Params:
    """A PartitionSpec for every weight; matrices are [L, out, in]."""
    columns, rows, everywhere = P(None, AXIS), P(None, None, AXIS), P()
    heads, out = (columns, rows) if plan.shards_heads else (everywhere, everywhere)
    layers = Layer(
        q=heads, k=heads, v=heads, q_norm=everywhere, k_norm=everywhere, out=out, post_attn_norm=everywhere, ffn_norm=everywhere,
        gate=columns, up=columns, down=rows, post_ffn_norm=everywhere, next_norm=everywhere,
    )  # fmt: skip
    return Params(everywhere, everywhere, layers)


def cache_spec(plan: Plan) -> P:
    """Of every array of the cache, which has its pages, the tokens of a page and the key/value heads in front."""
    return P(None, None, AXIS) if plan.shards_heads else P()


def put(params: Params, plan: Plan, mesh: Mesh) -> Params:
    """The weights on the mesh; a key/value head that several ranks read is there once for each of them."""

    def repeated(weight: jax.Array) -> jax.Array:
        layers, out, width = weight.shape
        heads = weight.reshape(layers, plan.whole.kv_heads, out // plan.whole.kv_heads, width)
        return jnp.repeat(heads, plan.copies, axis=1).reshape(layers, out * plan.copies, width)

    if plan.copies > 1:
        layers = params.layers._replace(k=repeated(params.layers.k), v=repeated(params.layers.v))
        params = params._replace(layers=layers)
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), params, specs(plan))


def empty_cache(plan: Plan, mesh: Mesh, batch: int, slots: int, kind: str) -> KVCache:
    """Room for `slots` tokens on every rank, a cache of `gemma.KV_CACHES`."""
    config = dataclasses.replace(plan.whole, kv_heads=plan.whole.kv_heads * plan.copies)
    return jax.device_put(gemma.init_cache(config, batch, slots, kind), NamedSharding(mesh, cache_spec(plan)))
