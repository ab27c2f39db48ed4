"""The quantising ops under JAX's transformations, and the refusal of gradients."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec as P
from oracle_quant import Case

import jaxnorm
from jaxnorm import QuantSpec, _stage

MX = {"group_size": 32, "scale_dtype": "e8m0"}
CASES = (
    Case("quantize", QuantSpec("int8"), 64, smooth="float32"),
    Case("rmsnorm_quant", QuantSpec("fp8", group_size=32, scale_layout="column"), 64, weight_dtype="float32"),
    Case("rmsnorm_quant", QuantSpec("fp4", scale_layout="shuffled", **MX), 64),
    Case("add_rmsnorm_quant", QuantSpec("float8_e4m3fnuz", **MX), 64, residual_dtype="float32", keep=True,
         options={"weight_offset": 1.0}),
    Case("add_rmsnorm_quant", QuantSpec("int8"), 64, static=0.03),
)  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
ROWS = ("x", "residual")


def axes_of(arrays, axis=0):
    """in_axes for a dict of arguments: rows mapped, the rest shared."""
    return {k: axis if k in ROWS else None for k in arrays}


def part(arrays, *index):
    return {k: a[index] if k in ROWS else a for k, a in arrays.items()}


def check_batch(case, arrays, out, batch, what):
    """Every example of a batched result against the oracle; results that are shared by all stay per example, too."""
    inner = replace(case, lead=case.lead[len(batch) :])
    for index in np.ndindex(*batch):
        inner.check(part(arrays, *index), jax.tree.map(lambda a, i=index: a[i], out), f"{what} {index}")


def test_every_quantising_op_is_here():
    assert jaxnorm.quantize and jaxnorm.rmsnorm_quant  # the package is lazy: this fills the registry
    named = {n for n in _stage.OPS if n == "quantize" or n.endswith("rmsnorm_quant")}
    assert named == {c.op for c in CASES}


@each
def test_vmap(case):
    """Over the first and over the second-last axis of the mapped arrays; a batched smooth or static scale below."""
    case = replace(case, lead=(3, 4))
    arrays = case.arrays()

    @jax.jit
    def both(arrays):
        moved = {k: jnp.moveaxis(a, 0, -2) if k in ROWS else a for k, a in arrays.items()}
        return [jax.vmap(case.call, (axes_of(a, axis),))(a) for a, axis in ((arrays, 0), (moved, -2))]

    for out in both(arrays):
        check_batch(case, arrays, out, (3,), "vmap")


@each
def test_vmap_of_vmap(case):
    case = replace(case, lead=(2, 3, 2))
    arrays = case.arrays()
    f = jax.vmap(jax.vmap(case.call, (axes_of(arrays),)), (axes_of(arrays),))
    check_batch(case, arrays, jax.jit(f)(arrays), (2, 3), "vmap(vmap)")


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda c: c.id)
def test_vmap_over_scales_and_weights(case):
    """Every argument has the batch, and then only the vectors and scalars have it."""
    case = replace(case, lead=(4,))
    sets = [case.arrays(seed) for seed in range(3)]
    for i, s in enumerate(sets):
        if "static_scale" in s:
            s["static_scale"] = s["static_scale"] * np.float32(1 + i)
    stacked = {k: np.stack([s[k] for s in sets]) for k in sets[0]}
    out = jax.jit(jax.vmap(case.call))(stacked)
    for i, s in enumerate(sets):
        case.check(s, jax.tree.map(lambda a, i=i: a[i], out), f"example {i}")
    shared = {k: sets[0][k] if k in ROWS else a for k, a in stacked.items()}
    out = jax.jit(jax.vmap(case.call, ({k: None if k in ROWS else 0 for k in shared},)))(shared)
    for i in range(3):
        mine = {k: a if k in ROWS else a[i] for k, a in shared.items()}
        case.check(mine, jax.tree.map(lambda a, i=i: a[i], out), f"shared x, example {i}")


@each
def test_scan(case):
    case = replace(case, lead=(3, 4))
    arrays = case.arrays()
    rows, rest = ({k: a for k, a in arrays.items() if (k in ROWS) == w} for w in (True, False))
    out = jax.jit(lambda rows, rest: jax.lax.scan(lambda c, r: (c, case.call(r | rest)), 0, rows)[1])(rows, rest)
    check_batch(case, arrays, out, (3,), "scan")


def test_loops_and_cond():
    """A Quantized as the carry of a while_loop around the op."""
    case = CASES[3]
    arrays = case.arrays()

    def loop(arrays):
        step = lambda s: (s[0] + 1, case.call(arrays | {"residual": s[1]["residual_out"]}))  # noqa: E731
        return jax.lax.while_loop(lambda s: s[0] < 2, step, (0, case.call(arrays)))[1]

    first = case.run(arrays)
    second = case.run(arrays | {"residual": first["residual_out"]})
    third = case.run(arrays | {"residual": second["residual_out"]})
    for a, b in zip(jax.tree.leaves(jax.jit(loop)(arrays)), jax.tree.leaves(third), strict=True):
        tolerances.assert_same_bits(a, b)


def mesh():
    needs.need_devices(8)
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@each
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(case, check_vma):
    """Eight shards of two rows: each gives the result of its own rows, in the layout of its own rows."""
    case = replace(case, lead=(8, 2))
    arrays = case.arrays()
    rows = P(("dp", "tp"))
    specs = {k: rows if k in ROWS else P() for k in arrays}

    def local(arrays):
        out = case.call({k: a[0] if k in ROWS else a for k, a in arrays.items()})
        return jax.tree.map(lambda a: a[None], out)

    f = jax.shard_map(local, mesh=mesh(), in_specs=(specs,), out_specs=rows, check_vma=check_vma)
    check_batch(case, arrays, jax.jit(f)(arrays), (8,), f"shard_map check_vma={check_vma}")


def test_check_vma_sees_what_varies():
    """Codes and scales of sharded rows do not pass as replicated."""
    case = replace(CASES[1], lead=(8,))
    arrays = case.arrays()
    for values, scale in ((P(), P(None, "dp")), (P("dp"), P())):
        specs = ({k: P("dp") if k in ROWS else P() for k in arrays},)
        out = {"q": jaxnorm.Quantized(values, scale, case.spec)}  # type: ignore[arg-type]
        out["q"] = out["q"].replace(spec=replace(case.spec, dtype=case.name))
        with pytest.raises(ValueError, match="out_specs"):
            jax.eval_shape(jax.shard_map(case.call, mesh=mesh(), in_specs=specs, out_specs=out), arrays)


@each
def test_pmap(case):
    needs.need_devices(8)
    case = replace(case, lead=(8, 3))
    arrays = case.arrays()
    out = jax.pmap(case.call, in_axes=(axes_of(arrays),))(arrays)
    check_batch(case, arrays, jax.tree.map(np.asarray, out), (8,), "pmap")


@each
def test_export_round_trip(case):
    """Through bytes and back, and the result is a Quantized with its spec again."""
    arrays = case.arrays()
    exported = jax.export.deserialize(jax.export.export(jax.jit(case.call))(arrays).serialize())
    case.check(arrays, exported.call(arrays), "exported")


@pytest.mark.parametrize("case", [CASES[3]], ids=lambda c: c.id)
def test_donation(case):
    """The residual becomes residual_out; x keeps its value."""
    case = replace(case, lead=(64,))
    arrays = {k: jnp.asarray(a) for k, a in case.arrays().items()}
    residual = arrays.pop("residual")
    f = jax.jit(lambda rest, residual: case.call(rest | {"residual": residual}), donate_argnums=1)
    compiled = f.lower(arrays, residual).compile()
    assert hlo.output_aliases(compiled.as_text()) == 1
    given = jnp.array(residual, copy=True)
    out = compiled(arrays, given)
    assert given.is_deleted() and not arrays["x"].is_deleted()
    case.check(case.arrays(), out)


def test_threads():
    """Several threads trace and run different specs at once."""
    made = [replace(c, lead=(2 + i % 2,)) for i, c in enumerate(CASES)]
    with ThreadPoolExecutor(5) as pool:
        for case, out in zip(made, pool.map(lambda c: c.run(c.arrays()), made), strict=True):
            case.check(case.arrays(), out)


@each
def test_named_scope(case):
    assert case.op in hlo.scopes(jax.jit(case.call).lower(case.arrays()).compile().as_text())


STRICT = (
    replace(CASES[0], spec=QuantSpec("float8_e5m2", scale_ub=1.0)),
    CASES[2],
    replace(
        CASES[3], spec=QuantSpec("fp8", e8m0_rounding="even", **MX), options={"cast": "before_weight"}, static=None
    ),
)


@pytest.mark.parametrize("case", STRICT, ids=lambda c: c.id)
def test_strict_promotion_and_x64(case):
    """Neither changes a dtype or a bit."""
    arrays = case.arrays()

    def run():
        return jax.jit(lambda a: (out := case.call(a), out["q"].dequantize(), out["q"].dequantize(jnp.bfloat16)))(
            arrays
        )

    want = run()
    with jax.numpy_dtype_promotion("strict"):
        strict = run()
    with jax.enable_x64(True):
        wide = run()
    for a, b, c in zip(*map(jax.tree.leaves, (want, strict, wide)), strict=True):
        tolerances.assert_same_bits(b, a, "strict promotion")
        tolerances.assert_same_bits(c, a, "jax_enable_x64")


# Gradients

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
W = np.ones(32, np.float32)
# name -> (a scalar of some result, for float arguments)
LOSSES = {
    "quantize-scale": ("quantize", lambda x, r, w, s: jaxnorm.quantize(x, s).scale.sum()),
    "quantize-codes": ("quantize", lambda x, r, w, s: jaxnorm.quantize(x, s).values.astype(jnp.float32).sum()),
    "quantize-dequantize": ("quantize", lambda x, r, w, s: jaxnorm.quantize(x, s).dequantize().sum()),
    "rmsnorm_quant": ("rmsnorm_quant", lambda x, r, w, s: jaxnorm.rmsnorm_quant(x, w, s).dequantize().sum()),
    "rmsnorm_quant-y": ("rmsnorm_quant", lambda x, r, w, s: jaxnorm.rmsnorm_quant(x, w, s, keep_unquantized=True)[1].sum()),
    "add_rmsnorm_quant": ("add_rmsnorm_quant", lambda x, r, w, s: jaxnorm.add_rmsnorm_quant(x, r, w, s)[0].dequantize().sum()),
    "residual_out": ("add_rmsnorm_quant", lambda x, r, w, s: jaxnorm.add_rmsnorm_quant(x, r, w, s)[1].sum()),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, jitted", [*((n, True) for n in LOSSES), ("quantize-scale", False), ("residual_out", False)]
)
def test_gradients_are_refused(name, jitted):
    """A TypeError that names the op and the alternative, for every float argument and every result."""
    op, loss = LOSSES[name]
    f = functools.partial(loss, s=QuantSpec("float8_e4m3fn"))
    for argument in (0, *((2,) if "rmsnorm" in op else ()), *((1,) if "add" in op else ())):
        g = jax.grad(f, argument)
        with pytest.raises(TypeError, match=op) as raised:
            (jax.jit(g) if jitted else g)(X, X, W)
        text = str(raised.value)
        assert "quantize(stop_gradient(" in text, text
        assert {"quantize": "x", "rmsnorm_quant": "rmsnorm(...)"}.get(op, "add_rmsnorm(...)[0]") in text, text


def test_gradients_of_a_vmapped_and_scanned_op_are_refused():
    spec = QuantSpec("float8_e4m3fn")
    one = lambda x: jaxnorm.quantize(x, spec).dequantize()  # noqa: E731
    for f in (jax.vmap(one), lambda x: jax.lax.scan(lambda c, r: (c, one(r)), 0, x)[1], jax.checkpoint(one)):
        with pytest.raises(TypeError, match="quantize"):
            jax.grad(lambda x, f=f: f(x).sum())(X)


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match=r"custom_vjp|forward"):
        jax.jvp(lambda x: jaxnorm.quantize(x, QuantSpec("float8_e4m3fn")).scale, (X,), (X,))


@pytest.mark.parametrize("spec", [QuantSpec("int8"), QuantSpec("float8_e4m3fn")], ids=lambda s: s.dtype)
def test_stop_gradient_of_the_result_is_enough(spec):
    """The rest of the function is differentiated as if the quantised branch were a constant; residual_out included."""

    def loss(x, r, w):
        q, s = jax.lax.stop_gradient(jaxnorm.add_rmsnorm_quant(x, r, w, spec))
        return (x * q.dequantize()).sum() + (s * w).sum() + (r**2).sum()

    gx, gr, gw = jax.jit(jax.grad(loss, (0, 1, 2)))(X, X, W)
    q, s = jaxnorm.add_rmsnorm_quant(X, X, W, spec)
    np.testing.assert_array_equal(gx, q.dequantize())
    np.testing.assert_array_equal(gr, 2 * X)
    np.testing.assert_allclose(gw, np.asarray(s).sum(0), rtol=1e-6)


def test_the_alternative_of_the_message_works():
    """The norm is differentiated, the quantisation is not."""
    spec = QuantSpec("int8")

    def loss(x, r, w):
        y, s = jaxnorm.add_rmsnorm(x, r, w)
        q = jaxnorm.quantize(jax.lax.stop_gradient(y), spec)
        return (y * q.dequantize()).sum() + s.sum()

    for g in jax.grad(loss, (0, 1, 2))(X, X, W):
        assert np.isfinite(np.asarray(g)).all() and np.abs(np.asarray(g)).max() > 0


def test_an_unused_result_does_not_stand_in_the_way():
    """Only what is differentiated raises: the op beside it may stay in the function."""

    def loss(x, w):
        jaxnorm.rmsnorm_quant(x, w, QuantSpec("fp8"))
        return jaxnorm.rmsnorm(x, w).sum()

    assert np.isfinite(np.asarray(jax.grad(loss)(X, W))).all()
