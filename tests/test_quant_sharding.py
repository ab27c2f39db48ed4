"""Sharded operands on a 4 x 2 mesh: values, the collectives of the compiled programs, and which scales a shard holds."""

from __future__ import annotations

from dataclasses import replace

import hlo
import jax
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle_quant import Case

from jaxnorm import QuantSpec

MX = {"group_size": 32, "scale_dtype": "e8m0"}
ROWS = ("x", "residual")
meshes = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def make_mesh(kind: str):
    needs.need_devices(8)
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(getattr(AxisType, kind),) * 2)


def run(case: Case, kind: str, x: P, vector: P | None = None):
    """(results, text of the compiled program, mesh); values are checked, and compared bit for bit with one device."""
    mesh, arrays = make_mesh(kind), case.arrays()
    vector = P(x[-1]) if vector is None else vector
    spec = {k: x if k in ROWS else (P() if a.ndim == 0 else vector) for k, a in arrays.items()}
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(a, NamedSharding(mesh, spec[k])) for k, a in arrays.items()}
        compiled = jax.jit(case.call).lower(placed).compile()
        out = compiled(placed)
    case.check(arrays, jax.tree.map(np.asarray, out), f"{kind} {x}")
    return out, compiled.as_text(), mesh, arrays


def sharded_like(array, spec: P, mesh) -> bool:
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def assert_same_bits_as_alone(case, arrays, out) -> None:
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(case.run(arrays)), strict=True):
        tolerances.assert_same_bits(a, b, "sharded against one device")


# name -> (case, sharding of x, sharding of the scale: those of a shard's own rows)
GROUPS, MXFP8, COLUMNS = (
    QuantSpec("int8", group_size=32),
    QuantSpec("fp8", **MX),
    {"group_size": 32, "scale_layout": "column"},
)
TILES = QuantSpec("fp8", scale_layout="shuffled", **MX)
DP, BOTH = P("dp", None), P(("dp", "tp"), None)
BY_ROWS = {
    "token": (Case("add_rmsnorm_quant", QuantSpec("int8"), 64, (16,), keep=True), DP, DP),
    "group-both-axes": (Case("rmsnorm_quant", GROUPS, 64, (8, 6)), P("dp", "tp", None), P("dp", "tp", None)),
    "one-dim-both-axes": (Case("quantize", MXFP8, 64, (16,)), BOTH, BOTH),
    "second-dim": (Case("quantize", QuantSpec("int8"), 64, (3, 16)), P(None, "dp", None), P(None, "dp", None)),
    "static": (Case("rmsnorm_quant", QuantSpec("int8"), 64, (16,), static=0.03), DP, P()),
    "padded": (Case("add_rmsnorm_quant", GROUPS, 72, (16,), smooth="float32", options={"pad_to_multiple": 96}), DP, DP),
    "fp4": (Case("rmsnorm_quant", QuantSpec("fp4", **MX), 64, (16,)), DP, DP),
    "column": (Case("add_rmsnorm_quant", QuantSpec("fp8", **COLUMNS), 64, (16,)), DP, P(None, "dp")),
    "column-3d": (Case("quantize", QuantSpec("int8", **COLUMNS), 64, (8, 6)), P("dp", None, None), P(None, "dp")),
    "shuffled": (Case("rmsnorm_quant", TILES, 64, (256,)), DP, DP),
    "shuffled-both-axes": (Case("quantize", QuantSpec("fp4", scale_layout="shuffled", **MX), 64, (512,)), BOTH, BOTH),
    "shuffled-3d": (Case("quantize", TILES, 64, (4, 256)), P("dp", None, None), DP),
}


ROWS_ON_EXPLICIT = ("token", "group-both-axes", "padded", "column-3d", "shuffled", "static")


@pytest.mark.parametrize("name, kind", [*((n, "Auto") for n in BY_ROWS), *((n, "Explicit") for n in ROWS_ON_EXPLICIT)])
def test_rows_sharded(name, kind):
    """No collective; each shard holds the codes and the scales of its rows; the bits of one device."""
    case, x, scale = BY_ROWS[name]
    out, text, mesh, arrays = run(case, kind, x)
    assert hlo.collectives(text) == []
    assert sharded_like(out["q"].values, x, mesh), out["q"].values.sharding
    assert sharded_like(out["q"].scale, scale, mesh), out["q"].scale.sharding
    for k in ("residual_out", "y"):
        assert k not in out or sharded_like(out[k], x, mesh)
    if kind == "Auto":  # the same program of a shard; a compile saved
        assert_same_bits_as_alone(case, arrays, out)


@pytest.mark.parametrize("rows", [7 * 8, 128 * 3])
def test_tiles_that_rows_would_split(rows):
    """Shuffled scales with M no multiple of 256: right, whatever it costs."""
    case = Case("rmsnorm_quant", QuantSpec("fp8", scale_layout="shuffled", **MX), 64, (rows,))
    out, _, _, arrays = run(case, "Auto", P("dp", None))
    assert_same_bits_as_alone(case, arrays, out)


TP, DPTP, WIDE = P(None, "tp"), P("dp", "tp"), P(None, ("dp", "tp"))
# name -> (case, sharding of x, of the scale, bytes of one row's statistics)
BY_FEATURES = {
    "quantize-groups": (Case("quantize", GROUPS, 256, (6,)), TP, TP, 0),
    "quantize-mxfp8": (Case("quantize", MXFP8, 256, (8,), smooth="float32"), DPTP, DPTP, 0),
    "quantize-columns": (Case("quantize", QuantSpec("int8", **COLUMNS), 256, (8,)), DPTP, P("tp", "dp"), 0),
    "quantize-static": (Case("quantize", QuantSpec("int8"), 256, (6,), static=0.03), TP, P(), 0),
    "norm-groups": (Case("add_rmsnorm_quant", QuantSpec("fp8", group_size=64), 256, (8,), keep=True), DPTP, DPTP, 4),
    "norm-groups-8-ways": (Case("rmsnorm_quant", GROUPS, 256, (6,)), WIDE, WIDE, 4),
    "norm-static": (Case("rmsnorm_quant", QuantSpec("fp8"), 256, (6,), static=0.02), TP, P(), 4),
    "norm-columns": (Case("rmsnorm_quant", QuantSpec("fp8", **COLUMNS), 256, (8,)), DPTP, P("tp", "dp"), 4),
    "quantize-fp4": (Case("quantize", QuantSpec("fp4", **MX), 256, (8,)), DPTP, DPTP, 0),
    "norm-fp4-columns": (
        Case("rmsnorm_quant", QuantSpec("fp4", scale_layout="column", **MX), 256, (8,)),
        DPTP,
        P("tp", "dp"),
        4,
    ),
    "quantize-token": (Case("quantize", QuantSpec("int8"), 256, (8,)), DPTP, DP, 4),
    "norm-token": (
        Case("add_rmsnorm_quant", QuantSpec("int8", scale_ub=4.0), 256, (8,), smooth="float32"),
        DPTP,
        DP,
        8,
    ),
}
ON_EXPLICIT = ("quantize-fp4", "quantize-groups", "quantize-columns", "norm-groups", "norm-static", "norm-token")


@pytest.mark.parametrize("name, kind", [*((n, "Auto") for n in BY_FEATURES), *((n, "Explicit") for n in ON_EXPLICIT)])
def test_features_sharded(name, kind):
    """Whole groups on each shard: only the sum of squares of a norm, nothing for quantize; per token also the row maximum."""
    case, x, scale, row_bytes = BY_FEATURES[name]
    out, text, mesh, _ = run(case, kind, x)
    found = hlo.collectives(text)
    rows_here = case.lead[0] // (4 if x[0] == "dp" else 1)
    assert {c.kind for c in found} <= {"all-reduce"}, found
    assert hlo.traffic(text) <= row_bytes * rows_here, found
    assert (row_bytes == 0) == (found == []), found
    assert sharded_like(out["q"].values, x, mesh), out["q"].values.sharding
    assert sharded_like(out["q"].scale, scale, mesh), out["q"].scale.sharding


@meshes
@pytest.mark.parametrize("case", [
    Case("rmsnorm_quant", QuantSpec("int8", group_size=96), 192, (8,)),  # tp=2 leaves 96, dp x tp would split it
    Case("quantize", QuantSpec("int8", group_size=64), 192, (8,)),
    Case("quantize", QuantSpec("fp4", **MX), 96, (8,)),
    Case("rmsnorm_quant", QuantSpec("int8"), 200, (8,), options={"pad_to_multiple": 256}),
], ids=lambda c: c.id)  # fmt: skip
def test_groups_that_shards_would_split(case, kind):
    """Right values, whatever it costs."""
    run(case, kind, P("dp", "tp"))


@meshes
@pytest.mark.parametrize("case, x", [
    (Case("quantize", QuantSpec("fp4", scale_layout="shuffled", **MX), 512, (256,)), P(None, "tp")),
    (Case("add_rmsnorm_quant", QuantSpec("fp8", scale_layout="shuffled", **MX), 256, (256,)), P("dp", "tp")),
    (Case("quantize", QuantSpec("fp8", scale_layout="shuffled", **MX), 256, (40,)), P(None, ("dp", "tp"))),
], ids=["fp4", "norm-both-axes", "few-rows"])  # fmt: skip
def test_shuffled_scales_of_sharded_features(case, x, kind):
    """A tile holds groups of several shards: the scales are gathered, one byte for 32 features, the rows are not."""
    out, text, mesh, _ = run(case, kind, x)
    gathered = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    rows = case.lead[0] // (4 if x[0] == "dp" else 1)
    assert {c.dtypes for c in gathered} == {("u8",)} and sum(c.bytes for c in gathered) == rows * case.features // 32
    assert sharded_like(out["q"].values, x, mesh), out["q"].values.sharding
    assert sharded_like(out["q"].scale, P(x[0], None), mesh), out["q"].scale.sharding


@pytest.mark.parametrize("where", ["whole", "shard"])
def test_nan_on_one_shard_of_the_features(where):
    """Per token: the scale of the row is NaN on every shard, wherever in the row the NaN is."""
    mesh = make_mesh("Auto")
    case = Case("quantize", QuantSpec("int8"), 64, (4,), x_dtype="float32")
    x = case.arrays()["x"]
    x[1, 5 if where == "whole" else 40] = np.nan
    q = case.run({"x": jax.device_put(x, NamedSharding(mesh, P(None, "tp")))})["q"]
    assert (np.isnan(np.asarray(q.scale)[:, 0]) == (np.arange(4) == 1)).all()
    want = replace(case).run({"x": np.nan_to_num(x)})["q"]
    keep = [0, 2, 3]
    tolerances.assert_same_bits(np.asarray(q.values)[keep], np.asarray(want.values)[keep])


def test_partially_manual_shard_map():
    """shard_map over dp alone, features whole: each shard quantises its rows."""
    mesh = make_mesh("Auto")
    case = Case("rmsnorm_quant", QuantSpec("int8", group_size=32), 64, (8, 3))
    arrays = case.arrays()
    specs = ({k: P("dp") if k in ROWS else P() for k in arrays},)
    f = jax.shard_map(case.call, mesh=mesh, in_specs=specs, out_specs=P("dp"), axis_names={"dp"})
    case.check(arrays, jax.jit(f)(arrays))


def test_dequantize_of_a_sharded_result_gathers_nothing():
    mesh = make_mesh("Auto")
    case = Case("quantize", QuantSpec("fp8", group_size=32), 64, (16,))
    x = jax.device_put(case.arrays()["x"], NamedSharding(mesh, P("dp", None)))
    compiled = jax.jit(lambda x: case.call({"x": x})["q"].dequantize()).lower(x).compile()
    assert hlo.collectives(compiled.as_text()) == []
