"""Shardings of a stage, derived from its dims: the Shardy rule, the partition callback, shard_map specs, the psum of row sums.

Rows may be sharded over any axes and cost nothing in the forward direction; a result that is a sum over rows is summed over those
axes in float32 (the one all-reduce of a backward). Sharded features stay sharded: the reference runs on each shard and sums its
row statistics over the axis, one float a row. A padded result has a width of its own, so there the features are gathered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from . import _compat
from ._stage import StageCall

Entry = Any  # an entry of a PartitionSpec: None, an axis, or a tuple of axes
Local = Callable[..., tuple[jax.Array, ...]]


def rule(call: StageCall, leading: int) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The Shardy rule of a stage, the factors that must be replicated, and the sizes of factors that have no dim of their own."""
    # a group of features is a factor of its own where scales per group follow the features
    grouped = "g" in call.feature_dims

    names = {"...": " ".join(f"b{i}" for i in range(leading)), **({"n": "(g k)"} if grouped else {})}

    def side(entries: Sequence[str]) -> str:
        return ", ".join(" ".join(names.get(d, d) for d in e.split()) for e in entries)

    text = f"{side([d for _, d in call.operands])} -> {side([d for _, d, _ in call.results])}"
    whole = {d for d, _ in call.sizes if d not in call.feature_dims} | ({"k"} if grouped else set())
    order = list(dict.fromkeys(re.findall(r"\w+", text)))  # Shardy wants them in the order of their first appearance
    return text, tuple(d for d in order if d in whole), {"k": call.group} if grouped else {}


def _axes(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(a for e in entries if e is not None for a in (e if isinstance(e, tuple) else (e,)))


def _layout(call: StageCall, sharding: Any, shape: tuple[int, ...]) -> tuple[tuple[Entry, ...], Entry]:
    """(entries of the leading dims, entry of the features), read from the first operand, which always has both.

    What the stage cannot split becomes None: the compiler then gathers it.
    """
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    lead, feature = spec[:-1], spec[-1] if call.feature_dims else None
    ways = math.prod(sharding.mesh.shape[a] for a in _axes((feature,)))
    if shape[-1] % (ways * call.group):
        feature = None
    last = math.prod(sharding.mesh.shape[a] for a in _axes(lead[-1:]))
    if call.row_block == 0 or (call.row_block > 1 and shape[-2] % (last * call.row_block)):
        lead = (None,) * len(lead)
    return lead, feature


def _specs(call: StageCall, lead: tuple[Entry, ...], feature: Entry) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
    def spec(dims: str) -> PartitionSpec:
        entries: tuple[Entry, ...] = ()
        for d in dims.split():
            entries += lead if d == "..." else (feature if d in call.feature_dims else None,)
        return PartitionSpec(*entries)

    return [spec(d) for _, d in call.operands], [spec(d) for _, d, _ in call.results]


def _shard_function(call: StageCall, local: Local, row_axes: tuple[str, ...], feature_axes: tuple[str, ...]) -> Local:
    """What one shard runs: the kernel on whole rows, or the reference on parts of rows; then the psum of the row sums."""

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        operands = tuple(_compat.match_varying(operands))
        out = call.compute(operands, feature_axes) if feature_axes else local(*operands)
        if not row_axes:
            return out
        summed = [
            jax.lax.psum(o, row_axes) if r[0] in call.row_sums else o for o, r in zip(out, call.results, strict=True)
        ]
        return tuple(summed)

    return run


def by_type(call: StageCall, local: Local, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Explicit mesh: the sharding is in the type of the first operand, so a shard_map can be written from it."""
    x = operands[0]
    sharding = jax.typeof(x).sharding
    lead, feature = _layout(call, sharding, x.shape)
    ins, outs = _specs(call, lead, feature)
    row_axes, feature_axes = _axes(lead), _axes((feature,))
    operands = tuple(_reshard(a, sharding.mesh, s) for a, s in zip(operands, ins, strict=True))
    shard = _shard_function(call, local, row_axes, feature_axes)
    return tuple(jax.shard_map(shard, mesh=sharding.mesh, in_specs=tuple(ins), out_specs=tuple(outs))(*operands))


def conform(operands: dict[str, tuple[Any, str]], *, gather_features: bool = False) -> list[Any]:
    """Explicit mesh: reshard the operands (name -> array, dims) of a public call to fit the first one.

    Done outside the custom_vjp, so that each gradient comes back in the type of its argument.
    """
    x, _ = next(iter(operands.values()))
    if _compat.explicit_mesh(jax.typeof(x)) is None or _compat.manual_axes():
        return [a for a, _ in operands.values()]
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    feature = None if gather_features else spec[-1]
    entries = {"... n": (*spec[:-1], feature), "...": spec[:-1], "n": (feature,), "": ()}
    return [
        None if a is None else _reshard(a, sharding.mesh, PartitionSpec(*entries[dims]))
        for a, dims in operands.values()
    ]


def _reshard(a: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    now = tuple(jax.typeof(a).sharding.spec)
    return (
        a if now + (None,) * (a.ndim - len(now)) == tuple(spec) else jax.sharding.reshard(a, NamedSharding(mesh, spec))
    )


def partition(call: StageCall, local: Local) -> Callable[..., Any]:
    """The callback of custom_partitioning: shardings of operands and results, and the function of a shard."""

    def callback(mesh: Any, arguments: Any, result: Any) -> Any:
        x = arguments[0]
        lead, feature = _layout(call, x.sharding, x.shape)
        ins, outs = _specs(call, lead, feature)
        mesh = x.sharding.mesh
        shard = _shard_function(call, local, _axes(lead), _axes((feature,)))
        named = [tuple(NamedSharding(mesh, s) for s in specs) for specs in (outs, ins)]
        return mesh, shard, named[0], named[1]

    return callback


def infer(call: StageCall) -> Callable[..., Any]:
    """Result shardings from operand shardings, for the partitioner that predates Shardy."""

    def callback(mesh: Any, arguments: Any, result: Any) -> Any:
        x = arguments[0]
        lead, feature = _layout(call, x.sharding, x.shape)
        return tuple(NamedSharding(x.sharding.mesh, s) for s in _specs(call, lead, feature)[1])

    return callback
