"""``qk_norm_rope_cache`` under JAX's transformations: donation, loops, vmap, export, meshes, and the refusal of gradients."""

from __future__ import annotations

import re

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import tolerances
from cases_cache import FN, Case, bytes_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

BUFFERS = ("k", "v", "k_scale", "v_scale")


def split(arrays):
    """(qkv, other arrays, device arrays all)."""
    rest = {n: jnp.asarray(a) for n, a in arrays.items() if not n.startswith("cache.") and n not in ("q", "k", "v")}
    return tuple(jnp.asarray(arrays[n]) for n in "qkv"), rest


def assert_same(case, got, want, what=""):
    for name, value in want.items():
        tolerances.assert_same_bits(bytes_of(got[name]), bytes_of(value), f"{what} {case} {name}")


def cache_shapes(case) -> str:
    return "|".join(re.escape(",".join(map(str, s))) for s in {case.shapes()[n] for n in "kv"})


@pytest.mark.parametrize(("dtype", "quant"), [("float16", None), ("int8", "per_token"), (FN, "per_tensor")])
def test_donation(dtype, quant):
    """Every buffer of the cache becomes that of a result. Nothing of a cache's shape is computed but by the scatter itself, and no
    program copies one; fp8, which XLA's CPU compiler cannot scatter, is seen as integers and back."""
    case = Case("shuffled", dtype, quant, pages=7)
    qkv, rest = split(case.arrays())
    cache = jax.tree.map(jnp.asarray, case.cache(case.arrays()))
    compiled = jax.jit(lambda q, a, c: case.op(q, a, c), donate_argnums=2).lower(qkv, rest, cache).compile()
    text = compiled.as_text()
    assert hlo.output_aliases(text) == len(jax.tree.leaves(cache))
    made = re.findall(rf" = \w+\[(?:{cache_shapes(case)})\]\S* ([\w-]+)\(", text)
    assert "copy" not in made and "scatter" in made
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast", "while"} | (
        {"bitcast-convert"} if dtype == FN else set()
    )
    kept = case.cache(case.arrays())
    plain = jax.jit(lambda q, a, c: case.op(q, a, c))
    assert hlo.output_aliases(plain.lower(qkv, rest, kept).compile().as_text()) == 0
    want = case.named(plain(qkv, rest, kept))
    for n in "kv":
        np.testing.assert_array_equal(bytes_of(getattr(kept, n)), bytes_of(case.arrays()[f"cache.{n}"]))
    assert_same(case, case.named(compiled(qkv, rest, cache)), want)
    assert cache.k.is_deleted() and cache.v.is_deleted()


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_the_lowered_call_aliases_the_cache(platform):
    """What XLA is told about the kernel: each buffer of the cache is operand and result of the one custom call."""
    case = Case("shuffled", FN, "per_token", pages=7, features=128, tokens=16, return_kv=False)
    qkv, rest = split(case.arrays())
    f = jax.jit(lambda q, a, c: case.op(q, a, c, "triton"), donate_argnums=2)
    exported = jax.export.export(f, platforms=[platform], disabled_checks=jaxnorm.export_checks())(
        qkv, rest, case.cache(case.arrays())
    )
    calls = [line for line in exported.mlir_module().splitlines() if "stablehlo.custom_call" in line]
    assert len(calls) == 1, "one launch"
    assert calls[0].count("output_operand_alias<") == 4


def test_while_loop_and_scan_carry():
    case = Case("paged", "int8", "per_token", tokens=12, skip=0)
    a = case.arrays()
    whole = case.run_op(a)
    qkv, rest = split(a)

    def step(i, cache):
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, 3 * i, 3)  # noqa: E731
        one = rest | {n: take(rest[n]) for n in ("positions", "slots")}
        return case.op(tuple(take(x) for x in qkv), one, cache)[-1]

    def loop(cache):
        return jax.lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, step(*s)), (0, cache))[1]

    compiled = jax.jit(loop, donate_argnums=0).lower(case.cache(a)).compile()
    made = re.findall(rf" = \w+\[(?:{cache_shapes(case)})\]\S* ([\w-]+)\(", compiled.as_text())
    assert "copy" not in made
    cache = compiled(jax.tree.map(jnp.asarray, case.cache(a)))
    for n in BUFFERS:
        np.testing.assert_array_equal(bytes_of(getattr(cache, n)), bytes_of(whole[f"cache.{n}"]), n)


def test_vmap():
    """Over caches and tokens; over tokens alone, each example then having its own cache; gather over slots."""
    case = Case("shuffled", FN, "per_token")
    sets = [case.arrays(seed) for seed in range(2)]
    want = [case.run_op(a) for a in sets]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[(*split(a), case.cache(a)) for a in sets])
    out = jax.jit(jax.vmap(case.op))(*stacked)
    shared = jax.jit(jax.vmap(case.op, (0, 0, None)))(*stacked[:2], case.cache(sets[0]))
    for i in range(2):
        assert_same(case, case.named(jax.tree.map(lambda x, i=i: x[i], out)), want[i])
    assert_same(case, case.named(jax.tree.map(lambda x: x[0], shared)), want[0], "shared cache")
    cache = case.cache(want[0])
    k, _ = jax.vmap(cache.gather)(jnp.arange(6).reshape(2, 3))
    tolerances.assert_same_bits(np.asarray(k).reshape(6, 2, 32), cache.gather(jnp.arange(6))[0])


def test_export_round_trip():
    """Through bytes and back, the cache among arguments and results."""
    case = Case("shuffled", "int8", "per_tensor")
    a = case.arrays()
    arguments = (*split(a), case.cache(a))
    exported = jax.export.deserialize(jax.export.export(jax.jit(case.op))(*arguments).serialize())
    out = exported.call(*arguments)
    assert isinstance(out[-1], jaxnorm.KVCache) and out[-1].quant == "per_tensor"
    assert_same(case, case.named(out), case.run_op(a))


def test_gradients_are_refused():
    case = Case(tokens=3, skip=0, x_dtype="float32")
    a = case.arrays()
    qkv, rest = split(a)

    def loss(q, w, cache, pick):
        *heads, cache = case.op((q, *qkv[1:]), rest | {"q_weight": w}, cache)
        return {"q": heads[0], "k": heads[1], "cache": cache.k}[pick].astype(jnp.float32).sum()

    for pick in ("q", "k", "cache"):
        for f in (jax.grad(loss), jax.jit(jax.grad(loss, 1), static_argnums=3)):
            with pytest.raises(TypeError, match=r"gradients do not flow into a cache\. Train with qk_norm_rope,"):
                f(qkv[0], rest["q_weight"], case.cache(a), pick)
    stopped = jax.grad(lambda q: (jax.lax.stop_gradient(case.op((q, *qkv[1:]), rest, case.cache(a))[0]) * q).sum())(
        qkv[0]
    )
    np.testing.assert_array_equal(stopped, case.run_op(a)["q"])


def test_strict_promotion_and_name():
    for case in (Case("shuffled", FN, "per_token"), Case("slots", "int8", "per_tensor", packed=True)):
        a = case.arrays()
        want = case.run_op(a)
        with jax.numpy_dtype_promotion("strict"):
            assert_same(case, case.run_op(a), want)
            case.cache(a).gather(jnp.arange(3))
    text = jax.jit(case.op).lower(jnp.asarray(case.qkv(a)), split(a)[1], case.cache(a)).compile().as_text()
    assert "qk_norm_rope_cache" in hlo.scopes(text)


# ---- meshes


def make_mesh(kind: str):
    needs.need_devices(8)
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(getattr(AxisType, kind),) * 2)


def run_sharded(case, kind, tokens, kv):
    """(results, text) of the op with tokens and heads sharded as said, the cache by kv head or replicated."""
    mesh, a = make_mesh(kind), case.arrays()
    qkv, rest = split(a)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        qkv = put(qkv[0], P(tokens, "tp")), *(put(x, P(tokens, kv)) for x in qkv[1:])
        rest = {n: put(x, P(tokens) if n in ("positions", "slots") else P()) for n, x in rest.items()}
        where = P() if kv is None else P(None, None, kv) if case.layout == "paged" else P(None, kv)
        cache = jax.tree.map(lambda x: put(x, where if x.ndim else P()), case.cache(a))
        compiled = jax.jit(lambda q, r, c: case.op(q, r, c)).lower(qkv, rest, cache).compile()
        out = compiled(qkv, rest, cache)
    return case.named(out), compiled.as_text(), a, out


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_over_a_tensor_parallel_axis(kind):
    """No collective; the cache stays sharded by kv head. Also where the kv heads are replicated, being fewer than the devices."""
    for case, kv in ((Case("shuffled", FN, "per_token"), "tp"), (Case("paged", "bfloat16", kv_heads=1), None)):
        got, text, a, out = run_sharded(case, kind, None, kv)
        assert not hlo.collectives(text), hlo.collectives(text)
        assert_same(case, got, case.run_op(a), kind)
        spec = out[-1].k.sharding.spec
        assert ("tp" in str(spec)) == (kv is not None)
        assert "tp" in str(out[0].sharding.spec)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_tokens_over_a_data_axis(kind):
    """Outside shard_map all of them go into the one cache: right, with what gathers them."""
    case = Case("paged", "int8", "per_token", tokens=8)
    got, text, a, _ = run_sharded(case, kind, "dp", "tp")
    assert_same(case, got, case.run_op(a), kind)
    assert set(hlo.kinds(text)) == {"all-gather"}


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """A cache for each data rank, packed qkv for each tensor rank: no collective, and each shard is the op on its own part."""
    case = Case("paged", "int8", "per_token", tokens=2, q_heads=2, kv_heads=1, packed=True, skip=0)
    sets = {(i, j): case.arrays(2 * i + j) for i in range(4) for j in range(2)}
    rows, both = P("dp"), P("dp", "tp")
    shared = {n: a for n, a in sets[0, 0].items() if n in ("q_weight", "k_weight", "cos_sin")}
    tokens = {n: np.stack([sets[i, 0][n] for i in range(4)]) for n in ("positions", "slots")}
    stack = lambda f: jax.tree.map(lambda *x: np.stack(x).reshape(4, 2, *x[0].shape), *[f(a) for a in sets.values()])  # noqa: E731
    qkv, cache = stack(case.qkv), stack(case.cache)

    def local(qkv, tokens, cache):
        tokens, (qkv, cache) = (jax.tree.map(lambda x: x[0], tokens), jax.tree.map(lambda x: x[0, 0], (qkv, cache)))
        return jax.tree.map(lambda x: x[None, None], case.op(qkv, shared | tokens, cache))

    f = jax.shard_map(local, mesh=make_mesh("Auto"), in_specs=(both, rows, both), out_specs=both, check_vma=check_vma)
    compiled = jax.jit(f).lower(qkv, tokens, cache).compile()
    assert not hlo.collectives(compiled.as_text())
    # to the host first: an index into a sharded array sums over the devices, and sums know no subnormal numbers
    out = jax.tree.map(np.asarray, compiled(*jax.device_put((qkv, tokens, cache), compiled.input_shardings[0])))
    for (i, j), a in sets.items():
        a = a | shared | {n: t[i] for n, t in tokens.items()}
        assert_same(case, case.named(jax.tree.map(lambda x, i=i, j=j: x[i, j], out)), case.run_op(a), f"{i},{j}")


def test_shard_map_with_replicated_kv_heads():
    """q differs over tp, k and v do not: with check_vma the cache comes back as something that does not."""
    case = Case("shuffled", FN, "per_token", kv_heads=1)
    a = case.arrays()
    qkv, rest = split(a)
    f = jax.shard_map(
        lambda q, kv, r, c: case.with_(q_heads=2).op((q, *kv), r, c),
        mesh=make_mesh("Auto"), in_specs=(P(None, "tp"), P(), P(), P()), out_specs=(P(None, "tp"), P(), P(), P()),
    )  # fmt: skip
    compiled = jax.jit(f).lower(qkv[0], qkv[1:], rest, case.cache(a)).compile()
    assert not hlo.collectives(compiled.as_text())
    got = jax.jit(f)(qkv[0], qkv[1:], rest, case.cache(a))
    assert_same(case, case.named(got), case.run_op(a))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_packed_qkv_that_a_sharding_would_cut(kind):
    case = Case(packed=True)
    mesh, a = make_mesh(kind), case.arrays()
    _, rest = split(a)
    with jax.set_mesh(mesh):
        for spec in (P(None, "tp"), P(None, ("dp", "tp"))):
            qkv = jax.device_put(case.qkv(a), NamedSharding(mesh, spec))
            with pytest.raises(Exception, match=r"qkv: got a sharding of dim[\s\S]*packed per rank, or pass a tuple"):
                jax.jit(lambda q, r, c: case.op(q, r, c)).lower(qkv, rest, case.cache(a)).compile()
        rows = jax.device_put(case.qkv(a), NamedSharding(mesh, P(None, None)))
        out = jax.jit(lambda q, r, c: case.op(q, r, c))(rows, rest, case.cache(a))
        assert_same(case, case.named(out), case.run_op(a))
