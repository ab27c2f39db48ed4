"""Sharded heads and tokens on a 4 x 2 mesh: values, shardings of the results and collectives of the compiled programs."""

from __future__ import annotations

import functools

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import oracle_rope
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle_rope import BF16, F32, Case, TwoStream

KINDS = ("Auto", "Explicit")


def make_mesh(kind: str):
    needs.need_devices(8)
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(getattr(AxisType, kind),) * 2)


def both(case, a):
    """Results and gradients in one program; the cotangents are a's g0, g1 (gq, gk)."""
    two = isinstance(case, TwoStream)
    names = [n for n in a if n[0] in ("qk" if two else "xw")]
    results, pull = jax.vjp(lambda *v: case.call(a | dict(zip(names, v, strict=True))), *(a[n] for n in names))
    grads = [a[f"g{n}"] for n in ("qk" if two else "01"[: len(results)])]
    return results, dict(zip(names, pull(tuple(grads)), strict=True))


def place(a, specs, mesh):
    return {n: jax.device_put(v, NamedSharding(mesh, specs(n, v))) for n, v in a.items()}


def compiled(f, mesh, a):
    with jax.set_mesh(mesh):
        c = jax.jit(f).lower(a).compile()
        return c(a), c.as_text()


def kinds(text: str) -> dict[str, int]:
    return hlo.kinds(text)


# name -> (case, spec of q and its cotangent, of k, of positions)
TP = P("dp", "tp", None)
SHARDINGS = {
    "tokens-and-heads": (Case((4, 2), 32, (8,), 16, weights=(BF16, F32), outside=False), TP, TP, P("dp")),
    "kv-heads-whole": (Case((4, 3), 32, (8,), weights=(F32, F32)), TP, P("dp", None, None), P("dp")),
    "rope": (Case((4, 2), 32, (8,)), TP, TP, P("dp")),
    "batch-shared-positions": (
        Case((4, 2), 32, (4, 6), weights=(BF16, BF16), shared=True),
        P("dp", None, "tp", None), P("dp", None, "tp", None), P(None)),
    "sequence": (
        Case((2, 2), 32, (3, 8), shared=True, sections=(4, 6, 6)),
        P(None, "dp", "tp", None), P(None, "dp", "tp", None), P(None, "dp")),
}  # fmt: skip


ON_EXPLICIT = ("tokens-and-heads", "batch-shared-positions")


@pytest.mark.parametrize(("name", "kind"), [*((n, "Auto") for n in SHARDINGS), *((n, "Explicit") for n in ON_EXPLICIT)])
def test_no_collective_forward_and_one_backward(name, kind):
    case, q, k, positions = SHARDINGS[name]
    mesh, a = make_mesh(kind), case.arrays()
    specs = {"x0": q, "g0": q, "x1": k, "g1": k, "positions": positions}
    placed = place(a, lambda n, v: specs.get(n, P()), mesh)
    results, text = compiled(case.call, mesh, placed)
    assert hlo.collectives(text) == []
    case.check(a, jax.tree.map(np.asarray, results))
    for got, spec in zip(results, (q, k), strict=True):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), got.ndim), got.sharding
    (results, gradients), text = compiled(functools.partial(both, case), mesh, placed)
    case.check_gradients(a, jax.tree.map(np.asarray, gradients))
    reduced = kinds(text)
    if case.weights is None:
        assert reduced == {}
    elif name == "kv-heads-whole":  # the sums of k are over dp alone
        assert reduced == {"all-reduce": 2}
    else:
        assert reduced == {"all-reduce": 1}, text
        (one,) = hlo.collectives(text)
        assert one.bytes == 4 * 2 * case.features


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams(kind):
    """Batch over dp, heads over tp; the tokens of a stream stay together."""
    case = TwoStream(4, (3, 5), (4, 2), 32)
    mesh, a = make_mesh(kind), case.arrays()
    spec = P("dp", None, "tp", None)
    placed = place(a, lambda n, v: spec if v.ndim == 4 else P(), mesh)
    (q, k), text = compiled(case.call, mesh, placed)
    assert hlo.collectives(text) == []
    case.check(a, q, k)
    assert q.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    (_, gradients), text = compiled(functools.partial(both, case), mesh, placed)
    case.check_gradients(a, jax.tree.map(np.asarray, gradients))
    assert kinds(text) == {"all-reduce": 1}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("whole_k", [False, True])
def test_shard_map(check_vma, whole_k):
    """The kv heads may be the same on all devices of the tensor-parallel axis: their result is, too, and may leave as such."""
    case = Case((4, 2), 32, (8,), weights=(F32, F32))
    mesh, a = make_mesh("Auto"), jax.tree.map(jnp.asarray, case.arrays())
    specs = {
        "x0": TP,
        "x1": P("dp", None, None) if whole_k else TP,
        "w0": P(),
        "w1": P(),
        "positions": P("dp"),
        "cos_sin": P(),
    }
    names = list(specs)
    f = jax.shard_map(
        lambda *v: case.call(dict(zip(names, v, strict=True))), mesh=mesh, in_specs=tuple(specs.values()),
        out_specs=(specs["x0"], specs["x1"]), check_vma=check_vma)  # fmt: skip

    def run(a):
        diff = [n for n in names if n[0] in "xw"]

        def g(*v):
            mine = a | dict(zip(diff, v, strict=True))
            return f(*[mine[n] for n in names])

        results, pull = jax.vjp(g, *(a[n] for n in diff))
        return results, dict(zip(diff, pull((a["g0"], a["g1"])), strict=True))

    results, gradients = jax.jit(run)(a)
    case.check(case.arrays(), results)
    case.check_gradients(case.arrays(), gradients)
    assert hlo.collectives(jax.jit(lambda a: f(*[a[n] for n in names])).lower(a).compile().as_text()) == []


def test_rows_keep_their_bits():
    case = oracle_rope.QK_CASES[2]
    a = jax.tree.map(jnp.asarray, case.arrays())
    mesh = make_mesh("Auto")
    spec = P(None, None, "tp", None)
    placed = place(a, lambda n, v: spec if n in ("x0", "x1") else P(), mesh)
    for one, other in zip(jax.jit(case.call)(a), jax.jit(case.call)(placed), strict=True):
        tolerances.assert_same_bits(one, other)
