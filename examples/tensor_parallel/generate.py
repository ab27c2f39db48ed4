"""Greedy generation over a mesh: the prompt in one step, then a jitted step a token."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import KVCache

from ..gemma import model as gemma
from ..gemma.generate import check_length, round_up
from ..gemma.model import Params
from . import model, sharding
from .sharding import Plan


@dataclass
class Run:
    tokens: list[int]
    prefill_seconds: float
    seconds_per_token: float
    """Of the steps behind the first, which may still compile."""


class Generator:
    """The model on a mesh. ``plain``: with XLA's collectives alone."""

    def __init__(self, params: Params, plan: Plan, mesh: Mesh, *, plain: bool = False) -> None:
        self.plan, self.mesh, self.plain = plan, mesh, plain
        self.params = sharding.put(params, plan, mesh)
        self.kind = {"float32": "float32", "bfloat16": "bf16"}[params.embedding.dtype.name]
        caches = sharding.cache_spec(plan)

        def step(
            params: Params, table: jax.Array, tokens: jax.Array, cache: KVCache, start: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            hidden, cache = model.forward(params, plan, table, tokens, cache, start, plain)
            return jnp.argmax(gemma.logits(params, hidden[:, -1]), axis=-1), cache

        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(sharding.specs(plan), P(), P(), caches, P()), out_specs=(P(), caches),
            check_vma=False,
        )  # fmt: skip
        self.step = jax.jit(sharded, donate_argnums=3)

    def __call__(self, prompt: list[int], max_tokens: int, stop: int | None = None) -> Run:
        """The most likely continuation of `prompt`, `stop` not included."""
        check_length(self.plan.whole, len(prompt), max_tokens)
        slots = round_up(len(prompt) + max_tokens, gemma.PAGE)
        cache = sharding.empty_cache(self.plan, self.mesh, 1, slots, self.kind)
        table = gemma.rope_tables(self.plan.whole, slots)
        found: list[int] = []
        tokens, at, times = jnp.asarray([prompt], jnp.int32), 0, []
        while len(found) < max_tokens:
            began = time.perf_counter()
            token, cache = self.step(self.params, table, tokens, cache, jnp.int32(at))
            found.append(int(token[0]))
            times.append(time.perf_counter() - began)
            if found[-1] == stop:
                found.pop()
                break
            at += tokens.shape[1]
            tokens = token[:, None].astype(jnp.int32)
        rest = times[2:] or times[-1:]
        return Run(found, times[0], sum(rest) / len(rest))
