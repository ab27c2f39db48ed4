"""The composite of jaxnorm.distributed on 8 host devices: values, bits of all ranks, collectives, gradients, errors."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import oracle
import pytest
import tolerances
from cases_distributed import Call, mesh_of, same_on_all, stacked
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import QuantSpec, distributed

MX = {"group_size": 32, "scale_dtype": "e8m0"}
CALLS = {
    "plain": Call(12),
    "residual": Call(16, ranks=8, x="float32", residual="float32", options={"weight_offset": 1.0, "eps": 1e-3}),
    "ragged-16bit-residual": Call(13, residual="bfloat16", x="float16"),
    "few-rows": Call(3, 96, ranks=8, x="float32", weight=None),
    "fewer-rows-than-ranks": Call(3, ranks=8, spec=QuantSpec("int8"), residual="bfloat16"),
    "before-weight": Call(
        9, 256, spec=QuantSpec("float8_e4m3fn"), residual="float32", options={"cast": "before_weight"}
    ),
    "token": Call(10, 96, ranks=2, spec=QuantSpec("int8")),
    "column": Call(10, spec=QuantSpec("float8_e5m2", group_size=32, scale_layout="column"), residual="float16"),
    "tiles": Call(37, 128, spec=QuantSpec("float8_e4m3fn", scale_layout="shuffled", **MX)),
    "fp4": Call(6, ranks=2, spec=QuantSpec("fp4", **MX)),
    "allreduce": Call(7, kind="allreduce", residual="bfloat16", options={"weight_offset": 1.0}),
    "allreduce-few": Call(5, kind="allreduce", ranks=8, residual="float32"),
    "allreduce-quant": Call(9, kind="allreduce", residual="float32", spec=QuantSpec("float8_e4m3fn", **MX)),
    "one-rank": Call(5, ranks=1, residual="bfloat16", spec=QuantSpec("int8", group_size=16)),
    "layernorm": Call(6, ranks=2, residual="float32", options={"norm": "layernorm", "eps": 1e-5}),
}
if not hasattr(jaxnorm, "layernorm"):
    del CALLS["layernorm"]


@pytest.mark.parametrize("name", CALLS)
def test_values(name):
    """Against the oracle, typed as equal on all ranks (out_specs P() under check_vma), and bitwise equal there."""
    needs.need_devices(8)
    call = CALLS[name]
    arrays, mesh = call.inputs(), mesh_of((call.ranks,), ("tp",))
    result, residual_out = call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp"))
    call.check(arrays, result, residual_out, name)
    jax.tree.map(same_on_all, result)


def test_other_meshes_and_pmap_give_the_same_bits():
    """One axis of a mesh with permuted devices, both axes together, check_vma off, pmap."""
    needs.need_devices(8)
    call = Call(13, residual="float32", spec=QuantSpec("int8", group_size=32, scale_layout="column"))
    arrays = call.inputs()
    line = mesh_of((4,), ("tp",))
    want = call.sharded(line, "tp")(call.place(arrays, line, "tp"))
    call.check(arrays, *want)
    grid = mesh_of((2, 4), ("dp", "tp"), (5, 0, 3, 6, 1, 2, 7, 4))
    square = mesh_of((2, 2), ("a", "b"), (3, 0, 1, 2))
    others = {
        "axis of a grid": call.sharded(grid, "tp")(call.place(arrays, grid, "tp")),
        "two axes": call.sharded(square, ("a", "b"))(call.place(arrays, square, ("a", "b"))),
        "no check_vma": call.sharded(line, "tp", check_vma=False)(call.place(arrays, line, "tp")),
    }
    mapped = jax.pmap(call.local("i"), axis_name="i", devices=jax.devices()[:4])(stacked(call, arrays))
    others["pmap"] = jax.tree.map(lambda a: a[2], mapped[0]), mapped[1].reshape(-1, call.features)
    for what, got in others.items():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            tolerances.assert_same_bits(a, b, what)


def test_each_group_of_a_grid_has_its_own_rows():
    """Data parallel x tensor parallel: the sum runs over one axis only."""
    needs.need_devices(8)
    call = Call(6, ranks=2)
    grid = mesh_of((4, 2), ("dp", "tp"))
    x = np.random.default_rng(1).normal(size=(4, 2, 6, 64)).astype(jnp.bfloat16)
    w = call.inputs()["weight"]
    f = lambda x, w: call.local("tp")({"x": x[0, 0], "weight": w})[0]  # noqa: E731
    y = jax.jit(jax.shard_map(f, mesh=grid, in_specs=(P("dp", "tp"), P()), out_specs=P("dp")))(x, w)
    for i in range(4):
        call.check({"x": x[i], "weight": w}, np.asarray(y)[6 * i : 6 * i + 6], None)


def test_without_gather_rows_stay_and_missing_ones_are_zeros():
    needs.need_devices(8)
    for spec in (None, QuantSpec("int8", group_size=32)):
        call = Call(13, residual="float32", spec=spec, options={"gather": False})
        arrays, mesh = call.inputs(), mesh_of((4,), ("tp",))
        arrays["residual"][13:] = np.nan
        result, residual_out = call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp"))
        values, scale = (result, None) if spec is None else (result.values, np.asarray(result.scale))
        assert values.shape == (16, 64) and not np.asarray(values, np.float32)[13:].any()
        assert scale is None or (scale[13:] == 1.0).all()
        first = (lambda a: a[:13]) if spec is None else (lambda q: q.replace(values=q.values[:13], scale=q.scale[:13]))
        call.check(arrays, first(result), residual_out)


def _backward(call, mesh, check_vma):
    """(results, gradients) of a loss that weighs every element of y and residual_out."""
    ins, outs = call.specs("tp")
    names = call.inputs_names()
    step = jax.shard_map(
        call.local("tp"), mesh=mesh, in_specs=({n: ins[n] for n in names},), out_specs=outs, check_vma=check_vma
    )

    @jax.jit
    def both(arrays, cotangents):
        out, vjp = jax.vjp(lambda a: [o for o in step(a) if o is not None], arrays)
        return out, vjp(cotangents)[0]

    return both


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
@pytest.mark.parametrize("name", ["residual", "ragged", "few", "allreduce", "allreduce-few"])
def test_gradients(name, check_vma):
    """Every partial gets the gradient of the sum; the weight's is summed once."""
    needs.need_devices(8)
    call = {
        "residual": Call(8, residual="float32"),
        "ragged": Call(7, residual="bfloat16", options={"weight_offset": 1.0}),
        "few": Call(3, weight="bfloat16"),
        "allreduce": Call(9, kind="allreduce", residual="float32"),
        "allreduce-few": Call(2, kind="allreduce", residual="bfloat16"),
    }[name]
    mesh, arrays = mesh_of((4,), ("tp",)), call.inputs(3)
    if call.residual:
        arrays["residual"] = np.nan_to_num(arrays["residual"])
    want = call.forward(arrays)
    rng = np.random.default_rng(4)
    dy = rng.normal(size=(call.rows, call.features)).astype(call.x if call.x == "float32" else jnp.bfloat16)
    cts = [dy]
    if call.residual:
        dr = np.zeros(arrays["residual"].shape, arrays["residual"].dtype)
        dr[: call.rows] = rng.normal(size=dy.shape)
        cts.append(dr)
    _, got = _backward(call, mesh, check_vma)(call.place(arrays, mesh, "tp"), [jnp.asarray(c) for c in cts])

    back = oracle.rmsnorm_backward(want, arrays["weight"], dy, cts[1][: call.rows] if call.residual else None,
                                   weight_offset=call.options.get("weight_offset", 0.0))  # fmt: skip
    for p in range(call.ranks):
        tolerances.assert_dx(np.asarray(got["x"])[p], back, f"dx of rank {p}")
    if call.residual:
        rows = np.asarray(got["residual"])
        tolerances.assert_dx(rows[: call.rows], back, "dresidual")
        assert not np.asarray(rows[call.rows :], np.float32).any()
    tolerances.assert_dweight(got["weight"], back)


def test_collectives():
    """Exactly what the schedule says, and the bytes of a reduce-scatter and a gather."""
    needs.need_devices(8)
    mesh, w = mesh_of((8,), ("tp",)), 8
    m, n = 64, 256

    def seen(call, **more):
        text = call.sharded(mesh, "tp", **more).lower(call.place(call.inputs(), mesh, "tp")).compile().as_text()
        return hlo.kinds(text), hlo.traffic(text)

    q = Call(m, n, w, spec=QuantSpec("float8_e4m3fn"), residual="bfloat16", x="float32")
    kinds, traffic = seen(q)
    assert kinds == {"all-to-all": 1, "all-gather": 2} and traffic <= m * n * 4 + m * n + m * 4, (kinds, traffic)
    kinds, traffic = seen(q, reduce="native")
    assert kinds == {"reduce-scatter": 1, "all-gather": 2}, kinds
    kinds, traffic = seen(Call(m, n, w, x="float32", options={"gather": False}))
    assert kinds == {"all-to-all": 1} and traffic == m * n * 4, (kinds, traffic)
    kinds, _ = seen(Call(m, n, w, x="float32"))
    assert kinds == {"all-to-all": 1, "all-gather": 1}, kinds
    kinds, traffic = seen(Call(5, n, w, x="float32"))  # fewer rows than ranks: one gather of the partials is all
    assert kinds == {"all-gather": 1} and traffic == w * 5 * n * 4, (kinds, traffic)
    kinds, _ = seen(Call(5, n, w, x="float32", residual="float32", kind="allreduce"))
    assert kinds == {"all-gather": 1}, kinds
    kinds, _ = seen(Call(m, n, w, x="float32", residual="float32", kind="allreduce"), reduce="native")
    assert kinds == {"all-reduce": 1}, kinds


def test_schedules_give_the_same_bits(monkeypatch):
    """A row's bits do not depend on how many rows come with it, nor on which schedule they choose."""
    needs.need_devices(8)
    from jaxnorm.distributed import schedule

    call = Call(24, residual=None, spec=QuantSpec("int8"), ranks=8)
    arrays, mesh = call.inputs(), mesh_of((8,), ("tp",))
    many = call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp"))[0]
    monkeypatch.setitem(schedule.OTHERS, "cpu", 1 << 30)
    few = call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp"))[0]
    part = {k: a[:, :5] if k == "x" else a for k, a in arrays.items()}
    short = Call(5, spec=call.spec, ranks=8).sharded(mesh, "tp")(call.place(part, mesh, "tp"))[0]
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        tolerances.assert_same_bits(a, b, "few against many")
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(many), strict=True):
        tolerances.assert_same_bits(a, np.asarray(b)[:5], "five rows")


def test_native_sums_in_the_dtype_of_x():
    needs.need_devices(8)
    call = Call(8, ranks=2, x="float32", options={"reduce": "native"})
    arrays, mesh = call.inputs(), mesh_of((2,), ("tp",))
    call.check(arrays, *call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp")))


def test_no_rows():
    mesh = mesh_of((2,), ("tp",))
    for call in (Call(0, ranks=2, residual="float32", spec=QuantSpec("int8", group_size=32, scale_layout="column")),
                 Call(0, ranks=2, kind="allreduce", residual="float32")):  # fmt: skip
        arrays = call.inputs()
        result, residual_out = call.sharded(mesh, "tp")(call.place(arrays, mesh, "tp"))
        assert residual_out.shape == (0, 64)
        assert (result.values if call.spec else result).shape == (0, 64)
        assert call.spec is None or result.scale.shape == (2, 0)


def test_quantised_results_refuse_gradients():
    mesh = mesh_of((2,), ("tp",))
    call = Call(4, ranks=2, residual="float32", spec=QuantSpec("float8_e4m3fn"))
    for pick in (lambda q, r: r.sum(), lambda q, r: q.values.astype(jnp.float32).sum(), lambda q, r: q.scale.sum()):
        f = call.sharded(mesh, "tp")
        with pytest.raises(TypeError, match=r"do not flow through quantisation.*spec=None"):
            jax.grad(lambda a, pick=pick, f=f: pick(*f(a)).astype(jnp.float32))(call.inputs())


def test_signatures():
    """The page's block is the code's signatures."""
    page = (Path(__file__).parents[1] / "docs/ops/distributed.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python signatures\n(.*?)```", page, re.DOTALL)[1], scope)
    known = [n for n in distributed.__all__ if n != "FusedCallError"]
    for name in known:
        of = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(distributed, name)).parameters.values()]
        assert of == [(p.name, p.kind, p.default) for p in inspect.signature(scope[name]).parameters.values()], name


def test_errors():
    mesh = mesh_of((2,), ("tp",))
    rs = functools.partial(distributed.reduce_scatter_rmsnorm_quant_all_gather, axis_name="tp")
    ar = functools.partial(distributed.allreduce_add_rmsnorm, axis_name="tp")
    x, w = jnp.ones((5, 64)), jnp.ones(64)

    def message(f):
        with pytest.raises((ValueError, TypeError)) as e:
            jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(x)
        return str(e.value)

    for f, parts in [
        (lambda x: rs(x, w, axis_name="dp"), ("axis_name", "'dp'", "'tp'", "shard_map")),
        (lambda x: rs(x, w, residual=x), ("residual", "(5, 64)", "(3, 64)", "ceil(5 / 2)")),
        (lambda x: ar(x, x[:3], w), ("residual", "(3, 64)", "(5, 64)")),
        (lambda x: rs(x[None], w), ("x", "(1, 5, 64)", "[M, N]")),
        (lambda x: rs(x, w[:8]), ("weight", "(8,)", "(64,)")),
        (lambda x: rs(x, w, bias=w), ("bias", "layernorm")),
        (lambda x: rs(x, w, norm="groupnorm"), ("norm", "'rmsnorm' or 'layernorm'")),
        (lambda x: rs(x, w, reduce="fast"), ("reduce", "'exact' or 'native'")),
        (lambda x: rs(x, w, impl="triton"), ("impl", "'auto' or 'composite' or 'fused'")),
        (lambda x: rs(x, w, QuantSpec("int8", group_size=24)), ("spec.group_size", "24", "N=64")),
        (lambda x: rs(x, w, "int8"), ("spec", "str", "QuantSpec")),
        (lambda x: rs(x, w, timeout_s=0), ("timeout_s", "positive")),
        (lambda x: rs(x.astype(jnp.int32), w), ("x", "int32")),
    ]:
        text = message(f)
        assert all(p in text for p in parts), text
    with pytest.raises(ValueError, match=r"axis_name.*shard_map"):
        rs(x, w)
