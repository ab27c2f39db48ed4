"""Sharded operands on a 4 x 2 mesh: values, bits, shardings of the results, and the collectives of the compiled programs."""

from __future__ import annotations

from dataclasses import dataclass, field

import hlo
import jax
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import OPS, Op, device_arrays, with_gradients

FEATURES = 256
AXES = {"dp": 4, "tp": 2}


@dataclass(frozen=True)
class Layout:
    """A sharding of x and of the weight, and the collectives that it may cost."""

    name: str
    lead: tuple[int, ...]
    x: P
    weight: P = field(default_factory=lambda: P(None))

    @property
    def row_shards(self) -> int:
        return _size(self.x[:-1])

    @property
    def feature_shards(self) -> int:
        return _size(self.x[-1:])

    @property
    def rows_on_a_device(self) -> int:
        return int(np.prod(self.lead)) // self.row_shards


def _size(entries) -> int:
    names = [a for e in entries if e is not None for a in (e if isinstance(e, tuple) else (e,))]
    return int(np.prod([AXES[a] for a in names], dtype=int))


ROWS = (
    Layout("rows-dp", (16,), P("dp", None)),
    Layout("rows-dp-tp-one-dim", (16,), P(("dp", "tp"), None)),
    Layout("3d-dp", (8, 6), P("dp", None, None)),
    Layout("3d-dp-tp", (8, 6), P("dp", "tp", None)),
    Layout("3d-second-dim", (3, 16), P(None, ("dp", "tp"), None)),
)
REPLICATED = (Layout("replicated", (4, 6), P(None, None, None)),)
FEATURE = (
    Layout("features-tp", (4, 6), P(None, None, "tp"), P("tp")),
    Layout("rows-dp-features-tp", (8, 6), P("dp", None, "tp"), P("tp")),
    Layout("features-dp-tp", (6,), P(None, ("dp", "tp")), P(("dp", "tp"))),
)
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
meshes = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def layouts(group):
    return pytest.mark.parametrize("layout", group, ids=lambda g: g.name)


def make_mesh(kind: str):
    needs.need_devices(8)
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(getattr(AxisType, kind),) * 2)


def run(op: Op, layout: Layout, kind: str):
    """Compiled forward and backward on sharded operands, checked for values; returns both programs' text and the results."""
    mesh = make_mesh(kind)
    args = op.make(layout.lead, FEATURES)
    cts = op.cotangents(args)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, layout.x if rows else layout.weight))
            for a, rows in zip(args, op.per_row, strict=True)
        ]
        cotangents = tuple(jax.device_put(c, NamedSharding(mesh, layout.x)) for c in cts)
        f = op.function()
        forward = jax.jit(f).lower(*placed).compile()
        # x need not be kept as an output: results of the forward are dropped, so the backward's own collectives are counted with
        # those of the forward that it needs
        backward = jax.jit(lambda a, c: with_gradients(f)(a, c)[1]).lower(tuple(placed), cotangents).compile()
        results, gradients = forward(*placed), backward(tuple(placed), cotangents)
    op.check(args, [np.asarray(r) for r in results], layout.name)
    op.check_gradients(args, cts, [np.asarray(g) for g in gradients], layout.name)
    return forward.as_text(), backward.as_text(), results, gradients, args, cts


def assert_sharded_like(array, spec: P, mesh, what: str) -> None:
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), (
        f"{what} came back as {array.sharding}, expected {spec}"
    )


def assert_shardings(op: Op, layout: Layout, kind: str, results, gradients) -> None:
    mesh = make_mesh(kind)
    for i, r in enumerate(results):
        assert_sharded_like(r, layout.x, mesh, f"result {i}")
    for name, rows, g in zip(op.arguments, op.per_row, gradients, strict=True):
        assert_sharded_like(g, layout.x if rows else layout.weight, mesh, f"d{name}")


@ops
@meshes
@layouts(ROWS)
def test_rows_sharded(op, kind, layout):
    """Forward without a collective, backward with one all-reduce of N float32; same bits as on one device."""
    forward, backward, results, gradients, args, cts = run(op, layout, kind)
    assert hlo.collectives(forward) == []
    assert [(c.kind, c.bytes, c.dtypes) for c in hlo.collectives(backward)] == [("all-reduce", 4 * FEATURES, ("f32",))]
    assert_shardings(op, layout, kind, results, gradients)
    alone, alone_gradients = jax.jit(with_gradients(op.function()))(device_arrays(args), device_arrays(cts))
    for a, b in zip(results, alone, strict=True):
        tolerances.assert_same_bits(a, b, "forward, sharded against not")
    for a, b, rows in zip(gradients, alone_gradients, op.per_row, strict=True):
        if rows:
            tolerances.assert_same_bits(a, b, "dx, sharded against not")


@ops
@meshes
@layouts(REPLICATED)
def test_replicated(op, kind, layout):
    forward, backward, results, gradients, _, _ = run(op, layout, kind)
    assert hlo.collectives(forward) == [] == hlo.collectives(backward)
    assert_shardings(op, layout, kind, results, gradients)


@ops
@meshes
@layouts(FEATURE)
def test_features_sharded(op, kind, layout):
    """One float a row for the mean square, one more in the backward, and dweight's part: never x itself."""
    forward, backward, results, gradients, _, _ = run(op, layout, kind)
    statistics = 4 * layout.rows_on_a_device
    assert set(hlo.kinds(forward)) == {"all-reduce"}, hlo.collectives(forward)
    assert hlo.traffic(forward) <= statistics, hlo.collectives(forward)
    assert set(hlo.kinds(backward)) == {"all-reduce"}, hlo.collectives(backward)
    own_weight = 4 * FEATURES // layout.feature_shards if layout.row_shards > 1 else 0
    assert hlo.traffic(backward) <= 2 * statistics + own_weight, hlo.collectives(backward)
    assert_shardings(op, layout, kind, results, gradients)


@ops
def test_features_sharded_with_a_replicated_weight(op):
    """Right values, and no gather of x; the weight's gradient is as the weight."""
    layout = Layout("weight-replicated", (8, 6), P("dp", None, "tp"))
    forward, backward, results, _, args, _ = run(op, layout, "Auto")
    assert hlo.traffic(forward) <= 4 * layout.rows_on_a_device, hlo.collectives(forward)
    row_bytes = args[0].nbytes // layout.row_shards // layout.feature_shards
    assert all(c.bytes < row_bytes or c.kind != "all-gather" for c in hlo.collectives(backward)), hlo.collectives(
        backward
    )
    assert_sharded_like(results[0], layout.x, make_mesh("Auto"), "y")


@meshes
@layouts([ROWS[3], FEATURE[1]])
def test_padded_result(kind, layout):
    """pad_to_multiple under sharding: rows cost nothing; sharded features are right whatever they cost."""
    import oracle

    import jaxnorm

    mesh = make_mesh(kind)
    x, w = OPS[0].make(layout.lead, FEATURES)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, layout.x)), jax.device_put(w, NamedSharding(mesh, layout.weight))
        compiled = jax.jit(lambda x, w: jaxnorm.rmsnorm(x, w, pad_to_multiple=96)).lower(*placed).compile()
        y = compiled(*placed)
    tolerances.assert_y(np.asarray(y), oracle.rmsnorm(x, w, pad_to_multiple=96))
    if layout.feature_shards == 1:
        assert hlo.collectives(compiled.as_text()) == []
        assert_sharded_like(y, layout.x, mesh, "y")


@ops
def test_operands_sharded_differently(op):
    """x by rows, everything else replicated: nothing is gathered, the result follows x."""
    mesh = make_mesh("Auto")
    args = op.make((8, 6), FEATURES)
    placed = [
        jax.device_put(a, NamedSharding(mesh, P("dp", "tp", None) if i == 0 else P())) for i, a in enumerate(args)
    ]
    compiled = jax.jit(op.function()).lower(*placed).compile()
    results = compiled(*placed)
    op.check(args, [np.asarray(r) for r in results])
    assert hlo.collectives(compiled.as_text()) == []


@ops
def test_inside_a_sharded_program(op):
    """Between two matrix products under jit with in_shardings: the norm adds no collective of its own."""
    mesh = make_mesh("Auto")
    args = op.make((16,), FEATURES, dtypes=dict.fromkeys(("x", "residual", "weight"), "float32"))
    rows = NamedSharding(mesh, P("dp", None))
    shardings = tuple(rows if r else NamedSharding(mesh, P(None)) for r in op.per_row)
    kernel = np.eye(FEATURES, dtype=np.float32)

    def layer(*args):
        return tuple(o @ kernel for o in op.function()(args[0] @ kernel, *args[1:]))

    compiled = jax.jit(layer, in_shardings=shardings).lower(*args).compile()
    assert hlo.collectives(compiled.as_text()) == []
    np.testing.assert_allclose(compiled(*args)[0], op.forward(*args).y, rtol=1e-4, atol=1e-5)


@ops
@meshes
def test_partially_manual_shard_map(op, kind):
    """shard_map over dp alone, with the second dim of x sharded over tp inside: right; Explicit axes are not gathered.

    An Auto axis beside manual ones is: neither jax's custom_partitioning nor its types can say how to split it. jax 0.10.2 gathers
    in a nested shard_map, too.
    """
    mesh = make_mesh(kind)
    args = op.make((8, 4), FEATURES)
    cts = op.cotangents(args)
    manual, full = P("dp", None, None), NamedSharding(mesh, P("dp", "tp", None))
    specs = tuple(manual if rows else P(None) for rows in op.per_row)
    f = jax.shard_map(op.function(), mesh=mesh, in_specs=specs, out_specs=(manual,) * len(cts), axis_names={"dp"})
    with jax.set_mesh(mesh):
        vector = NamedSharding(mesh, P(None))
        placed = tuple(jax.device_put(a, full if rows else vector) for a, rows in zip(args, op.per_row, strict=True))
        cotangents = tuple(jax.device_put(c, full) for c in cts)
        forward = jax.jit(f).lower(*placed).compile()
        results, gradients = jax.jit(with_gradients(f))(placed, cotangents)
    op.check(args, [np.asarray(r) for r in results])
    op.check_gradients(args, cts, [np.asarray(g) for g in gradients])
    if kind == "Explicit" and jax.__version_info__ >= (0, 11):
        assert hlo.collectives(forward.as_text()) == []
