"""Shardings of a stage, derived from its dims: the Shardy rule, the partition callback, shard_map specs, the psum of sums.

Rows may be sharded over any axes and cost nothing in the forward direction; a result that is a sum over rows is summed over those
axes in float32 (the one all-reduce of a backward). Parallel dims (heads, whole groups of channels) are as free as rows. Sharded
features stay sharded: the reference runs on each shard and sums its row statistics over the axis, one float a row. A padded result
has a width of its own, so there the features are gathered.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from . import _compat
from ._stage import StageCall
from .errors import value_error

Entry = Any  # an entry of a PartitionSpec: None, an axis, or a tuple of axes
Local = Callable[..., tuple[jax.Array, ...]]
"""``(call, *operands) -> results``"""


def rule(call: StageCall, leading: int) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The Shardy rule of a stage, the factors that must be replicated, and the sizes of factors that have no dim of their own."""
    # Where scales per group (g) or packed codes (v) follow the features, shards hold whole groups or whole bytes.
    base = next((d for d in ("g", "v") if d in call.feature_dims), "")
    each = {"g": call.group, "v": 2}.get(base, 1)  # features to one of the base
    names = {"...": " ".join(f"b{i}" for i in range(leading))}
    factors: dict[str, int] = {}
    if base:
        names["n"], factors["k"] = f"({base} k)", each
    if base == "g" and "v" in call.feature_dims:
        names["v"], factors["h"] = "(g h)", each // 2

    def side(entries: Sequence[str]) -> str:
        return ", ".join(" ".join(names.get(d, d) for d in e.split()) for e in entries)

    text = f"{side([d for _, d in call.operands])} -> {side([d for _, d, _ in call.results])}"
    free = {*call.feature_dims, *(d for d, _ in (*call.parallel_dims, *call.refused_dims))}
    whole = {d for d, _ in call.sizes if d not in free} | set(factors)
    order = list(dict.fromkeys(re.findall(r"\w+", text)))  # Shardy wants them in the order of their first appearance
    return text, tuple(d for d in order if d in whole), factors


def _axes(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(a for e in entries if e is not None for a in (e if isinstance(e, tuple) else (e,)))


@dataclass(frozen=True)
class _Layout:
    """What of a stage stays sharded, and over which mesh axes."""

    lead: tuple[Entry, ...]
    named: dict[str, Entry]

    def entries(self, dims: str) -> tuple[Entry, ...]:
        out: tuple[Entry, ...] = ()
        for d in dims.split():
            out += self.lead if d == "..." else (self.named.get(d),)
        return out

    def axes(self, dims: str) -> tuple[str, ...]:
        """The mesh axes that shard these dims, each once."""
        return tuple(dict.fromkeys(_axes(self.entries(dims))))

    def specs(self, call: StageCall) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
        return (
            [PartitionSpec(*self.entries(d)) for _, d in call.operands],
            [PartitionSpec(*self.entries(d)) for _, d, _ in call.results],
        )


def _spec(sharding: Any, ndim: int) -> tuple[Entry, ...]:
    return tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))


def _layout(call: StageCall, mesh: Any, shardings: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> _Layout:
    """Read from the first operand that has each dim. What the stage cannot split becomes None: the compiler then gathers it."""

    def ways(entry: Entry) -> int:
        return math.prod(mesh.shape[a] for a in _axes((entry,)))

    lead = call.lead(_spec(shardings[0], len(shapes[0])))
    last = ways(lead[-1]) if lead else 1
    if call.row_block == 0 or (call.row_block > 1 and call.lead(shapes[0])[-1] % (last * call.row_block)):
        lead = (None,) * len(lead)
    granules = {d: call.group if i == 0 else 1 for i, d in enumerate(call.feature_dims)} | dict(call.parallel_dims)
    named: dict[str, Entry] = {}
    for name, sharding, shape in zip(call.names, shardings, shapes, strict=True):
        for dim in call.dims(name):
            if (remedy := dict(call.refused_dims).get(dim)) is not None:
                entry = _spec(sharding, len(shape))[call.position(name, dim, len(shape))]
                if ways(entry) > 1:
                    got = f"a sharding of dim {dim!r} (of {call.dims(name)}) over {entry!r}"
                    raise value_error(call.op, name, got, "one that leaves the dim whole", remedy)
            if dim not in granules or dim in named:
                continue
            at = call.position(name, dim, len(shape))
            entry = _spec(sharding, len(shape))[at]
            split = shape[at] % (ways(entry) * granules[dim]) == 0 and not set(_axes((entry,))) & set(_axes(lead))
            named[dim] = entry if split else None
    for dim in call.feature_dims:
        named.setdefault(dim, named.get(call.feature_dims[0]))
    return _Layout(lead, named)


def _shard_function(call: StageCall, local: Local, layout: _Layout) -> Callable[..., tuple[jax.Array, ...]]:
    """What one shard runs: the kernel on whole rows, or the reference on parts of rows; then the psum of the sums."""
    feature_axes = layout.axes(" ".join(call.feature_dims))
    summed = {name: layout.axes(dims) for name, dims in call.sums}
    # sums of shards stay in float32 until they are added up, whatever the dtype of the result
    wide = replace(
        call, results=tuple((name, dims, "float32" if summed.get(name) else t) for name, dims, t in call.results)
    )

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        operands = tuple(_compat.match_varying(operands))
        got = wide.on_shard(operands).compute(operands, feature_axes) if feature_axes else local(wide, *operands)
        out = {name: o for (name, _, _), o in zip(call.results, got, strict=True)}
        for axes in dict.fromkeys(filter(None, summed.values())):
            together = [name for name in out if summed.get(name) == axes]
            out |= zip(together, _sum_over(axes, [out[name] for name in together]), strict=True)
        return tuple(out[name].astype(dtype) for name, _, dtype in call.results)

    return run


def _sum_over(axes: tuple[str, ...], arrays: list[jax.Array]) -> list[jax.Array]:
    """Sums over mesh axes, by one all-reduce."""
    if len(arrays) == 1:
        return [jax.lax.psum(arrays[0], axes)]
    whole = jax.lax.psum(jnp.concatenate([a.ravel() for a in arrays]), axes)
    ends = itertools.accumulate(a.size for a in arrays)
    parts = jnp.split(whole, list(ends)[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def by_type(call: StageCall, local: Local, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Explicit mesh: the shardings are in the types of the operands, so a shard_map can be written from them."""
    mesh = _compat.explicit_mesh(jax.typeof(operands[0]))
    layout = _layout(call, mesh, [jax.typeof(a).sharding for a in operands], [a.shape for a in operands])
    ins, outs = layout.specs(call)
    operands = tuple(_reshard(a, mesh, s) for a, s in zip(operands, ins, strict=True))
    shard = _shard_function(call, local, layout)
    # A result without a parallel dim that is sharded (the kv heads beside the q heads) is the same on all shards, which the
    # type of the one primitive behind all results cannot say.
    checked = not call.parallel_dims
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=tuple(ins), out_specs=tuple(outs), check_vma=checked)
    return tuple(mapped(*operands))


def conform(
    operands: Mapping[str, tuple[Any, str]], *, gather_features: bool = False, keep: Mapping[str, int] | None = None
) -> list[Any]:
    """Explicit mesh: reshard the operands (name -> array, dims) of a public call to fit the first that has each dim.

    Done outside the custom_vjp, so that each gradient comes back in the type of its argument. ``keep`` names the dims that may stay
    sharded, each with how many of it must stay together; without it, the features ``n`` unless ``gather_features``.
    """
    x, _ = next(iter(operands.values()))
    mesh = _compat.explicit_mesh(jax.typeof(x))
    if mesh is None or _compat.manual_axes():
        return [a for a, _ in operands.values()]
    granules = {} if gather_features else {"n": 1}
    call = StageCall(
        stage="",
        op="",
        operands=tuple((name, dims) for name, (a, dims) in operands.items() if a is not None),
        results=(),
        sizes=(),
        feature_dims=(),
        parallel_dims=tuple((granules if keep is None else keep).items()),
    )
    there = [a for a, _ in operands.values() if a is not None]
    layout = _layout(call, mesh, [jax.typeof(a).sharding for a in there], [a.shape for a in there])
    return [
        None if a is None else _reshard(a, mesh, PartitionSpec(*layout.entries(dims))) for a, dims in operands.values()
    ]


def _reshard(a: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    now = _spec(jax.typeof(a).sharding, a.ndim)
    return a if now == tuple(spec) else jax.sharding.reshard(a, NamedSharding(mesh, spec))


def partition(call: StageCall, local: Local, context: Any) -> Callable[..., Any]:
    """The callback of custom_partitioning: shardings of operands and results, and the function of a shard.

    ``context``: the mesh of ``jax.set_mesh`` at the call.
    """

    def callback(_: Any, arguments: Any, result: Any) -> Any:
        shardings = _compat.named_shardings(arguments, context)
        mesh = shardings[0].mesh
        layout = _layout(call, mesh, shardings, [a.shape for a in arguments])
        ins, outs = (tuple(NamedSharding(mesh, s) for s in specs) for specs in layout.specs(call))
        return mesh, _shard_function(call, local, layout), outs, ins

    return callback


def infer(call: StageCall, context: Any) -> Callable[..., Any]:
    """Result shardings from operand shardings, for the partitioner that predates Shardy."""

    def callback(_: Any, arguments: Any, result: Any) -> Any:
        shardings = _compat.named_shardings(arguments, context)
        mesh = shardings[0].mesh
        layout = _layout(call, mesh, shardings, [a.shape for a in arguments])
        return tuple(NamedSharding(mesh, s) for s in layout.specs(call)[1])

    return callback
