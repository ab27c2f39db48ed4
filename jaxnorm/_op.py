"""The one place where batching, sharding, higher derivatives and the kernel call of a stage are composed.

custom_vjp (in the family)        reverse mode; outermost, so that what is inside is never asked for a jvp
  custom_jvp                      derivatives of the forward and backward stages themselves: those of the reference
    custom_vmap                   one more leading dim while the vectors are shared, else a loop over the examples
      shard_map from the type     the first operand lives on an Explicit mesh
      | the local function        axes already manual (shard_map, pmap)
      | custom_partitioning       everything else
        local function            folds the leading dims to rows, only here
          primitive               lowered per platform in _launch
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from . import _compat, _launch, _sharding
from ._stage import StageCall


def run(call: StageCall, operands: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    """A stage on operands with at least one leading dim; results by name."""
    operands = tuple(_compat.match_varying(operands))  # type: ignore[assignment]
    out = _composed(call)(*operands)
    return {name: o for (name, _, _), o in zip(call.results, out, strict=True)}


@functools.cache
def _composed(call: StageCall) -> Callable[..., tuple[jax.Array, ...]]:
    @jax.custom_jvp
    def stage(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _batched(call)(*operands)

    @stage.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return stage(*primals), jax.jvp(lambda *a: call.compute(a), primals, tangents)[1]

    return stage


@functools.cache
def _batched(call: StageCall) -> Callable[..., tuple[jax.Array, ...]]:
    @custom_vmap
    def stage(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _sharded(call, operands)

    @stage.def_vmap
    def _(size: int, batched: list[bool], *operands: jax.Array) -> Any:
        whole = (True,) * len(call.results)
        has_rows = ["..." in call.dims(name) for name in call.names]
        shared = all(rows or not b for rows, b in zip(has_rows, batched, strict=True))
        if shared and not call.sums and call.row_block == 1:
            spread = [
                _batch_behind(call, name, a if b else jnp.broadcast_to(a, (size, *a.shape))) if rows else a
                for name, a, b, rows in zip(call.names, operands, batched, has_rows, strict=True)
            ]
            return tuple(_batch_first(call, r[0], o) for r, o in zip(call.results, stage(*spread), strict=True)), whole
        if call.backend in (None, "xla") and jax.device_count() > 1 and not _compat.manual_axes():
            # A loop over a sharded batch would gather it; the reference is batched and partitioned by JAX itself.
            axes = tuple(0 if b else None for b in batched)
            return jax.vmap(lambda *a: call.compute(a), axes)(*operands), whole
        loop = [a for a, b in zip(operands, batched, strict=True) if b]

        def example(mine: list[jax.Array]) -> tuple[jax.Array, ...]:
            rest = iter(mine)
            return stage(*[next(rest) if b else a for a, b in zip(operands, batched, strict=True)])

        return jax.lax.map(example, loop), whole

    return stage


def _batch_behind(call: StageCall, name: str, operand: jax.Array) -> jax.Array:
    """The new leading dim of an operand behind whatever precedes ``...``."""
    return jnp.moveaxis(operand, 0, call.dims(name).index("..."))


def _batch_first(call: StageCall, name: str, result: jax.Array) -> jax.Array:
    """The new leading dim of a result in front; it stands behind whatever precedes ``...``."""
    return jnp.moveaxis(result, call.dims(name).index("..."), 0)


def _sharded(call: StageCall, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    if any(d == 0 for a in operands for d in a.shape):
        return call.compute(operands)
    if _compat.explicit_mesh(jax.typeof(operands[0])) is not None:  # also what a partly manual mesh leaves Explicit
        return _sharding.by_type(call, _local, operands)
    if _compat.manual_axes():  # custom_partitioning cannot split what a partly manual mesh leaves Auto: it is gathered
        return _local(call, *operands)
    return tuple(_partitioned(call, len(call.lead(operands[0].shape)), _compat.context_mesh())(*operands))


@functools.cache
def _partitioned(call: StageCall, leading: int, context: Any) -> Callable[..., Any]:
    rule, replicated, factors = _sharding.rule(call, leading)
    f = custom_partitioning(lambda *operands: _local(call, *operands))
    f.def_partition(
        partition=_sharding.partition(call, _local, context),
        infer_sharding_from_operands=_sharding.infer(call, context),
        sharding_rule=rule,
        need_replication_factors=replicated,
        **factors,
    )
    return f


def _local(call: StageCall, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """One shard: leading dims folded to rows, one primitive, leading dims restored."""
    call = call.on_shard(operands)
    lead = call.lead(operands[0].shape)
    rows = math.prod(lead)
    flat = []
    for name, a in zip(call.names, operands, strict=True):
        if "..." in call.dims(name):
            at = call.dims(name).index("...")
            a = a.reshape(*a.shape[:at], rows, *a.shape[at + len(lead) :])
        flat.append(a)
    out = _launch.stage_p.bind(*flat, call=call)
    return tuple(o.reshape(call.result_shape(name, lead)) for (name, _, _), o in zip(call.results, out, strict=True))
