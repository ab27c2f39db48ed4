"""The KV cache: ``qk_norm_rope_cache`` writes it, ``KVCache.gather`` reads it. One stage, hence one kernel launch, each.

The cache's arrays are operands and results of the stage, and a kernel writes the results in place of the operands: the program
copies a cache that its caller did not donate. All tokens of a call meet in one cache, so sharded tokens are gathered; kv heads are
not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _compat, _dispatch, _op
from .._cache import Geometry, KVCache, geometry, scalar
from .._cache import positive as check_positive
from .._compile import target
from .._ref import cache as ref
from .._ref import qk as ref_qk
from .._ref import rope as ref_rope
from .._stage import Arrays, OpDef, StageCall, StageDef, register_op, register_stage
from ..errors import type_error, value_error
from . import _checks as check
from . import _heads
from .qk import _forward as norm_rope

OP, GATHER = "qk_norm_rope_cache", "KVCache.gather"
NO_GRADIENT = (
    f"{OP}: gradients do not flow into a cache. Train with qk_norm_rope, which is the same without one; or take stop_gradient of "
    "what goes in."
)
# k, v and the scales of each layout, as dims: b pages of p slots, j kv heads, pieces of x elements (e of a head, f of a page)
DIMS = {
    "shuffled": ("b j e p x", "b j f d x", "b j p"),
    "paged": ("b p j d", "b p j d", "b p j"),
    "slots": ("s j d", "s j d", "s j"),
}
BUFFERS = ("k_cache", "v_cache", "k_scale", "v_scale")
ONE_PER_RANK = (
    "Packed qkv holds q, k and v of all heads: shard it inside shard_map, packed per rank, or pass a tuple (q, k, v) whose heads "
    "are sharded."
)


def _local_geometry(call: StageCall) -> Geometry:
    """That of a shard, which may hold some of the kv heads."""
    return dataclasses.replace(call.option("geometry"), num_kv_heads=call.size("j"))


def _split(call: StageCall, a: Arrays) -> Arrays:
    """q, k, v as ``[T, H, D]``; q may be computed apart."""
    if "qkv" not in a:
        return {n: a[n] for n in "qkv" if n in a}
    hq, hk, d = (call.size(dim) for dim in "hjd")
    parts = jnp.split(a["qkv"], [hq * d, (hq + hk) * d], axis=-1)
    return {n: p.reshape(*p.shape[:-1], h, d) for n, p, h in zip("qkv", parts, (hq, hk, hk), strict=True)}


def _write_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    g = _local_geometry(call)
    heads = _split(call, a)
    cos, sin = ref_rope.lookup(a["cos_sin"], a["positions"], call.option("sections"), call.option("interleaved"))
    norm = {name: call.option(name) for name in ("eps", "weight_offset", "style")}
    heads |= {n: ref_qk.norm_rope(heads[n], a.get(f"{n}_weight"), cos, sin, **norm) for n in "qk" if n in heads}
    out = {f"{n}_out": x for n, x in heads.items()}
    for name in "kv":
        stored, scales = ref.codes(heads[name], g, a.get(f"{name}_scale"))
        out[f"{name}_cache_out"] = ref.store(a[f"{name}_cache"], name, stored, a["slots"], g)
        if scales is not None:
            out[f"{name}_scale_out"] = ref.store(a[f"{name}_scale"], "scale", scales, a["slots"], g)
    return out


def _gather_reference(call: StageCall, a: Arrays, axes: tuple[str, ...]) -> Arrays:
    slots, lead = a["slots"].reshape(-1), a["slots"].shape
    scales = a.get("k_scale"), a.get("v_scale")
    found = ref.gather(a["k_cache"], a["v_cache"], *scales, slots, _local_geometry(call))
    return {f"{n}_out": x.reshape(*lead, *x.shape[1:]) for n, x in zip("kv", found, strict=True)}


_PLANS = {"triton": "qk_cache_triton", "hip": "qk_cache_hip"}
WRITE = register_stage(StageDef("qk_norm_rope_cache_fwd", OP, _write_reference, _PLANS))
READ = register_stage(StageDef("kv_cache_gather", GATHER, _gather_reference, _PLANS))


@dataclass(frozen=True)
class _Config:
    """Everything static about one call."""

    geometry: Geometry
    backend: str | None
    backend_source: str
    targets: tuple[tuple[str, str], ...]
    q_heads: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    return_kv: bool = False

    def call(self, stage: StageDef, operands: Mapping[str, Any], results: Any, **more: Any) -> StageCall:
        """``operands``: name -> (array, dims)."""
        sizes = {"d": self.geometry.head_dim, "h": self.q_heads, "j": self.geometry.num_kv_heads}
        for a, dims in operands.values():
            named = dims.split()
            sizes |= {d: a.shape[i - len(named)] for i, d in enumerate(named) if d != "..."}  # "..." stands first
        return StageCall(
            stage=stage.name,
            op=stage.op,
            operands=tuple((name, dims) for name, (_, dims) in operands.items()),
            results=tuple(results),
            sizes=tuple(sizes.items()),
            options=(*self.options, ("geometry", self.geometry)),
            backend=self.backend,
            backend_source=self.backend_source,
            targets=self.targets,
            feature_dims=(),
            **more,
        )

    def cache_dims(self) -> dict[str, str]:
        """Of the buffers that there are."""
        k, v, scale = DIMS[self.geometry.layout]
        found = {"k_cache": k, "v_cache": v}
        if self.geometry.quant is not None:
            scale = "" if self.geometry.quant == "per_tensor" else scale
            found |= {"k_scale": scale, "v_scale": scale}
        return found


def _stage(config: _Config, arrays: Arrays) -> Arrays:
    g, dims = config.geometry, config.cache_dims()
    packed, apart = "qkv" in arrays, not {"qkv", "q"} & arrays.keys()
    rows = {"qkv": "... w", "q": "... h d", "k": "... j d", "v": "... j d", "slots": "...", "cos_sin": "t r",
            "positions": "c ..." if dict(config.options)["sections"] else "...", "q_weight": "d", "k_weight": "d"}  # fmt: skip
    operands = {name: (arrays[name], (rows | dims)[name]) for name in (*rows, *dims) if name in arrays}
    dtypes = {n: arrays["qkv" if packed else n].dtype.name for n in "qkv" if packed or n in arrays}
    results = [] if apart else [("q_out", "... h d", dtypes["q"])]
    if config.return_kv:
        results += [("k_out", "... j d", dtypes["k"]), ("v_out", "... j d", dtypes["v"])]
    results += [(f"{n}_out", d, g.dtype if "cache" in n else "float32") for n, d in dims.items() if d]
    parallel = () if packed else (("h", 1), ("j", 1))
    refused = tuple((d, ONE_PER_RANK) for d in ("w", "j")) if packed else ()
    call = config.call(WRITE, operands, results, row_block=0, parallel_dims=parallel, refused_dims=refused)
    return _op.run(call, tuple(_compat.match_varying([a for a, _ in operands.values()])))


@functools.cache
def _without_gradient(config: _Config) -> Any:
    @jax.custom_vjp
    def op(arrays: Arrays) -> Any:
        return _write(config, arrays)

    def backward(_: Any, __: Any) -> Any:
        raise TypeError(NO_GRADIENT)

    op.defvjp(lambda arrays: (_write(config, arrays), None), backward)
    return op


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted(arrays: Arrays, config: _Config) -> Any:
    with jax.named_scope(OP):
        return _without_gradient(config)(arrays)


def _write(config: _Config, arrays: Arrays) -> Arrays:
    """Results by name. One call, unless q alone differs between the devices of a mesh axis inside ``shard_map``: kv heads that are
    replicated leave a cache that is, and the results of one call all differ alike."""
    rest = {n: a for n, a in arrays.items() if n not in ("q", "q_weight")}
    axes = frozenset[str]().union(*(_compat.varying(jax.typeof(a)) for a in rest.values()))
    if "q" not in arrays or _compat.varying(jax.typeof(arrays["q"])) <= axes:
        return _stage(config, arrays)
    options = dict(config.options)
    turning = options["style"], options["sections"], options["interleaved"]
    by = config.backend, config.backend_source, config.targets
    heads = _heads.Config(OP, *turning, False, *by, options["eps"], options["weight_offset"])
    q, weight, *where = _compat.match_varying([arrays.get(n) for n in ("q", "q_weight", "positions", "cos_sin")])
    return {"q_out": norm_rope(heads, (q,), (weight,), *where)[0], **_stage(config, rest)}


@functools.partial(jax.jit, static_argnames=("config",), inline=True)
def _jitted_gather(arrays: Arrays, config: _Config) -> Any:
    with jax.named_scope("kv_cache_gather"):
        g, single = config.geometry, arrays["slots"].ndim == 0
        dims = {"slots": "..."} | config.cache_dims()  # a dict that went through a pytree comes back sorted
        slots = arrays["slots"].reshape(1) if single else arrays["slots"]
        found = _compat.match_varying([slots if name == "slots" else arrays[name] for name in dims])
        operands = {name: (a, dims[name]) for name, a in zip(dims, found, strict=True)}
        dtype = g.dtype if g.quant is None else "float32"
        results = [(f"{n}_out", "... j d", dtype) for n in "kv"]
        call = config.call(READ, operands, results, parallel_dims=(("j", 1),))
        out = _op.run(call, tuple(found))
        return tuple(out[f"{n}_out"][0] if single else out[f"{n}_out"] for n in "kv")


def gather(cache: KVCache, slots: Any, backend: str | None) -> tuple[jax.Array, jax.Array]:
    """:meth:`KVCache.gather`."""
    g = geometry(GATHER, cache)
    where = _slots(GATHER, slots, g)
    arrays = {"slots": where, **_buffers(cache)}
    return _jitted_gather(arrays, _Config(g, *_dispatch.requested(GATHER, backend), target.named()))


def _buffers(cache: KVCache) -> Arrays:
    values = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return {name: a for name, a in zip(BUFFERS, values, strict=True) if a is not None}


def _slots(op: str, value: Any, g: Geometry) -> jax.Array:
    """Host values beyond the cache are an error; in arrays such a slot is dropped. Negative ones are for the caller to use."""
    if isinstance(value, jax.Array):
        if value.dtype.name not in ("int32", "int64"):
            raise type_error(op, "slots", f"dtype {value.dtype.name}", "int32 or int64", "Cast them first.")
        return value
    try:
        a = np.asarray(value)
    except (TypeError, ValueError) as e:
        raise type_error(op, "slots", type(value).__name__, "an array of integers", str(e)) from None
    if a.size and a.dtype.kind not in "iu":
        raise type_error(op, "slots", f"dtype {a.dtype.name}", "int32 or int64")
    if a.size and a.max() >= g.slots:
        want = f"at most {g.slots - 1}: the cache has {g.num_pages} pages of {g.page_size} slots"
        raise value_error(op, "slots", int(a.max()), want, "Negative slots skip a token.")
    return jnp.asarray(np.maximum(a.astype(np.int64), -1).astype(np.int32))


def _heads_of(argument: str, value: Any, heads: int, g: Geometry) -> jax.Array:
    """``[T, H, D]`` from that or ``[T, H * D]``."""
    a = check.array(OP, argument, value)
    d = g.head_dim
    if a.shape[1:] == (heads, d) and a.ndim == 3:
        return a
    if a.ndim != 2 or a.shape[1] != heads * d:
        want = f"[T, {heads}, {d}] or [T, {heads * d}]"
        raise value_error(OP, argument, f"shape {a.shape}", want, "D is the head_dim of the cache.")
    mesh = _compat.explicit_mesh(jax.typeof(a))
    if mesh is None:
        return a.reshape(a.shape[0], heads, d)
    spec = (*jax.typeof(a).sharding.spec, None, None)[:2]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec, None))
    return jax.lax.reshape(a, (a.shape[0], heads, d), out_sharding=sharding)


def _inputs(qkv: Any, q_heads: int, kv_heads: int, g: Geometry) -> Arrays:
    heads = (q_heads, kv_heads, kv_heads)
    if isinstance(qkv, tuple | list):
        if len(qkv) != 3:
            raise value_error(OP, "qkv", f"a tuple of {len(qkv)}", "an array or a tuple (q, k, v)")
        found = {n: _heads_of(f"qkv[{i}]", a, h, g) for i, (n, a, h) in enumerate(zip("qkv", qkv, heads, strict=True))}
        for i, n in ((1, "k"), (2, "v")):
            if found[n].shape[0] != found["q"].shape[0]:
                want = f"{found['q'].shape[0]} tokens as qkv[0]"
                raise value_error(OP, f"qkv[{i}]", f"{found[n].shape[0]} tokens", want)
        return found
    a = check.array(OP, "qkv", qkv)
    if a.ndim != 2 or a.shape[1] != sum(heads) * g.head_dim:
        want = f"[T, {sum(heads) * g.head_dim}]: {q_heads} q heads and twice {kv_heads} kv heads of D={g.head_dim}"
        raise value_error(OP, "qkv", f"shape {a.shape}", want, "D is the head_dim of the cache.")
    return {"qkv": a}


def _scales(cache: KVCache, k_scale: Any, v_scale: Any) -> KVCache:
    given = {n: v for n, v in (("k_scale", k_scale), ("v_scale", v_scale)) if v is not None}
    if given and cache.quant != "per_tensor":
        got = f"a scale for a cache with quant={cache.quant!r}"
        raise value_error(
            OP, next(iter(given)), got, "None unless quant='per_tensor'", "The op finds scales per token itself."
        )
    return cache.replace(**{n: scalar(OP, n, v) for n, v in given.items()}) if given else cache


def _check_cache(cache: Any, num_kv_heads: int) -> Geometry:
    if not isinstance(cache, KVCache):
        raise type_error(OP, "cache", type(cache).__name__, "a KVCache", "jaxnorm.KVCache.create makes one.")
    g = geometry(OP, cache)
    if g.num_kv_heads != num_kv_heads:
        got = f"{g.num_kv_heads} kv heads in layout {g.layout!r}, k of shape {tuple(cache.k.shape)}"
        raise value_error(OP, "cache", got, f"num_kv_heads={num_kv_heads}")
    if g.head_dim % 2:
        raise value_error(OP, "cache", f"head_dim {g.head_dim}", "an even head_dim")
    return g


def qk_norm_rope_cache(
    qkv: Any,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    positions: Any,
    cos_sin: jax.Array,
    cache: KVCache,
    slots: Any,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
    style: str = "neox",
    weight_offset: float = 0.0,
    k_scale: Any = None,
    v_scale: Any = None,
    return_kv: bool = False,
    mrope_sections: Any = None,
    mrope_interleaved: bool = False,
    backend: str | None = None,
) -> Any:
    """q and k as :func:`qk_norm_rope` gives them, k and the raw v written into the cache at ``slots``: one launch.

    Without quant the cache holds ``cast(k)`` and ``cast(v)``; per token and head ``scale = max|k| / dtype_max`` (1 for a vector of
    zeros) and codes of ``k / scale``; per tensor codes of ``k / k_scale``. Both of the rounded k, as it is returned.

    Donate the cache (``jax.jit(..., donate_argnums=...)``) and it is updated in place; else the whole cache is copied.

    Args:
      qkv:           [T, (Hq + 2 * Hk) * D], all q heads, then all k heads, then all v heads; or a tuple (q, k, v) of [T, H * D] or
                     [T, H, D], each bfloat16, float16 or float32. D is even and that of the cache.
      q_weight, k_weight: [D], shared by all heads; any float dtype, or None.
      positions:     [T] int32 or int64, the row of the table for each token; [3, T] with ``mrope_sections``.
      cos_sin:       [max_positions, rotary_dim], see :func:`rope`.
      cache:         a :class:`KVCache` of ``num_kv_heads`` heads.
      slots:         [T] int32 or int64. A token with a negative slot is not written. Two tokens with the same slot leave that slot,
                     and no other, undefined.
      eps, weight_offset: of the norm, over all D; the weight is ``weight + weight_offset``.
      style:         "neox" or "gptj", see :func:`rope`.
      k_scale, v_scale: with quant "per_tensor", scales that replace those of the cache, now and in the cache that comes back.
      return_kv:     also return k and v.
      mrope_sections, mrope_interleaved: see :func:`mrope`.
      backend:       "xla", "triton" or "hip"; None = the best for op, D, dtypes, options and target.

    Returns:
      (q, cache), or (q, k, v, cache) with ``return_kv``: q [T, Hq, D], k and v [T, Hk, D] of every token, in the dtypes of qkv.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or option; a cache of another shape; a slot beyond the cache or a position beyond
        the table, given as host values (NumPy, list). In device arrays such a slot is not written, such a position not turned.
      UnsupportedError: the named backend cannot serve the call here.

    Gradients: none; differentiating raises a TypeError that names :func:`qk_norm_rope`.
    Sharding: heads without any collective (a tuple whose heads are sharded, a cache sharded by kv head). Tokens inside
    ``shard_map`` without any; outside, tokens that are sharded are gathered, for every one of them goes into the cache.
    """
    kv_heads, q_heads = (
        check_positive(OP, n, v) for n, v in (("num_kv_heads", num_kv_heads), ("num_q_heads", num_q_heads))
    )
    g = _check_cache(cache, kv_heads)
    arrays = _inputs(qkv, q_heads, kv_heads, g)
    tokens = next(iter(arrays.values())).shape[0]
    table = _heads.table(OP, "cos_sin", cos_sin, g.head_dim)
    sections = None if mrope_sections is None else _heads.sections(OP, "mrope_sections", mrope_sections, table.shape[1])
    where, _ = _heads.positions(OP, positions, (tokens,), table.shape[0], sections is not None)
    places = _slots(OP, slots, g)
    if places.shape != (tokens,):
        raise value_error(OP, "slots", f"shape {places.shape}", f"({tokens},), one for each token")
    weights = {n: check.vector(OP, n, w, g.head_dim) for n, w in (("q_weight", q_weight), ("k_weight", k_weight))}
    offsets = [check.offset(OP, weight_offset, w) for w in weights.values()]
    if not isinstance(return_kv, bool):
        raise type_error(OP, "return_kv", type(return_kv).__name__, "a bool")
    options = (
        ("eps", check.eps(OP, eps)),
        ("weight_offset", offsets[0]),
        ("style", _heads.style(OP, style)),
        ("sections", sections),
        ("interleaved", bool(mrope_interleaved)),
    )
    cache = _scales(cache, k_scale, v_scale)
    arrays |= {n: w for n, w in weights.items() if w is not None}
    arrays |= {"positions": where, "cos_sin": table, "slots": places, **_buffers(cache)}
    config = _Config(g, *_dispatch.requested(OP, backend), target.named(), q_heads, options, return_kv)
    out = _jitted(arrays, config)
    new = KVCache.tree_unflatten(cache.tree_flatten()[1], [out.get(f"{n}_out", a) for n, a in _leaves(cache)])
    return (out["q_out"], out["k_out"], out["v_out"], new) if return_kv else (out["q_out"], new)


def _leaves(cache: KVCache) -> list[tuple[str, Any]]:
    return list(zip(BUFFERS, (cache.k, cache.v, cache.k_scale, cache.v_scale), strict=True))


register_op(OpDef(OP, qk_norm_rope_cache, WRITE))
