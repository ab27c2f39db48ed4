"""Scale layouts by raw bytes: every scale where the contract's index formula puts it, every other byte 0x7F."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import oracle_quant as oq
import pytest
from oracle_quant import Case

from jaxnorm import QuantSpec, quantize

MX = {"group_size": 32, "scale_dtype": "e8m0"}
SPECS = {
    "row": QuantSpec("fp8", group_size=32),
    "column": QuantSpec("int8", group_size=32, scale_layout="column"),
    "column-token": QuantSpec("int8", scale_layout="column"),
    "column-e8m0": QuantSpec("fp8", scale_layout="column", **MX),
    "shuffled": QuantSpec("fp8", scale_layout="shuffled", **MX),
    "shuffled-fp4": QuantSpec("fp4", scale_layout="shuffled", **MX),
}


def spread(case: Case) -> dict[str, np.ndarray]:
    """float32 rows whose groups differ by random powers of two, so that no two scales are likely the same."""
    arrays = case.arrays()
    g = np.random.default_rng(3)
    powers = 2.0 ** g.integers(-40, 40, (*case.lead, -(-case.features // 32)))
    arrays["x"] = arrays["x"] * np.repeat(powers, 32, -1)[..., : case.features].astype(np.float32)
    return arrays


def index(layout: str, m: int, j: int, rows: int, groups: int) -> int:
    """The contract's formula for one scale, in plain integers."""
    if layout == "row":
        return m * groups + j
    if layout == "column":
        return j * rows + m
    sp = -(-groups // 8) * 8
    return (m // 32) * sp * 32 + (j // 8) * 256 + (j % 4) * 64 + (m % 16) * 4 + ((j % 8) // 4) * 2 + (m % 32) // 16


def shape_of(layout: str, rows: int, groups: int) -> tuple[int, int]:
    if layout == "shuffled":
        return -(-rows // 256) * 256, -(-groups // 8) * 8
    return (groups, rows) if layout == "column" else (rows, groups)


@pytest.mark.parametrize("rows", [0, 1, 7, 173, 256])
@pytest.mark.parametrize("spec", [s for n, s in SPECS.items() if n != "column-token"], ids=lambda s: Case("", s).id)
def test_raw_bytes(spec, rows):
    case = Case("quantize", spec, 352, (rows,), x_dtype="float32")
    arrays = spread(case)
    q = case.run(arrays)["q"]
    want = case.expected(arrays)
    layout, groups = spec.scale_layout, spec.groups(352)
    assert q.scale.shape == shape_of(layout, rows, groups)
    size = want.scale.dtype.itemsize
    raw = np.full(int(np.prod(q.scale.shape)) * size, 0x7F, np.uint8)
    for m in range(rows):
        for j in range(groups):
            at = size * index(layout, m, j, rows, groups)
            raw[at : at + size] = np.frombuffer(want.scale[m, j].tobytes(), np.uint8)
    np.testing.assert_array_equal(np.frombuffer(np.asarray(q.scale).tobytes(), np.uint8), raw)
    case.check(arrays, {"q": q})


@pytest.mark.parametrize("groups", [1, 7, 8, 9, 16])
def test_shuffled_widths(groups):
    """Below, at and above whole tiles of eight scales, over more than one block of 256 rows."""
    case = Case("quantize", SPECS["shuffled"], 32 * groups, (300,), x_dtype="float32")
    arrays = spread(case)
    out = case.run(arrays)
    assert out["q"].scale.shape == (512, -(-groups // 8) * 8)
    case.check(arrays, out)


@pytest.mark.parametrize("lead", [(), (2, 3, 5), (0, 4), (4, 0), (2, 256), (2, 128), (3, 96), (1, 1)], ids=str)
@pytest.mark.parametrize("spec", [SPECS["column"], SPECS["shuffled"]], ids=["column", "shuffled"])
def test_leading_dims_are_folded(spec, lead):
    """M is the product of the leading dims, in row-major order."""
    case = Case("quantize", spec, 64, lead, x_dtype="float32")
    arrays = spread(case)
    out = case.run(arrays)
    rows = int(np.prod(lead, dtype=int))
    assert out["q"].scale.shape == shape_of(spec.scale_layout, rows, 2)
    case.check(arrays, out)


def test_the_tile_map_is_a_bijection_and_has_its_reshape_form():
    """The formula of this file, that of the oracle and the reshape form of the contract, element for element."""
    g = np.random.default_rng(0)
    for rows, groups in [(1, 1), (256, 8), (33, 9), *(tuple(map(int, g.integers(1, 300, 2))) for _ in range(6))]:
        at, (mp, sp) = oq.positions("shuffled", rows, groups)
        whole, _ = oq.positions("shuffled", mp, sp)
        assert (np.sort(whole.reshape(-1)) == np.arange(mp * sp)).all()
        m, j = rows - 1, groups - 1
        assert at[m, j] == index("shuffled", m, j, rows, groups)
        padded = np.arange(mp * sp).reshape(mp, sp)
        tiles = padded.reshape(mp // 32, 2, 16, sp // 8, 2, 4).transpose(0, 3, 5, 2, 4, 1).reshape(-1)
        assert (tiles[whole] == padded).all()


@pytest.mark.parametrize("name", ["column", "column-token", "shuffled", "shuffled-fp4"])
def test_vmap_gives_each_example_its_own_array(name):
    """Folding the batch into the rows would be wrong for columns, and for tiles unless M is a multiple of 256."""
    spec = SPECS[name]
    case = Case("rmsnorm_quant", spec, 64, (3, 5), weight_dtype="float32")
    arrays = case.arrays()
    f = jax.vmap(lambda x, w: case.call({"x": x, "weight": w})["q"], (0, None))
    q = jax.jit(f)(arrays["x"], arrays["weight"])
    groups = spec.groups(64)
    assert q.scale.shape == (3, *shape_of(spec.scale_layout, 5, groups))
    for i in range(3):
        example = replace(case, lead=(5,))
        example.check(arrays | {"x": arrays["x"][i]}, {"q": jax.tree.map(lambda a, i=i: a[i], q)})


@pytest.mark.parametrize("name", ["column", "column-token", "shuffled"])
def test_a_batch_inside_the_tile_is_an_error(name):
    """vmap with out_axes=1: the scales could only be misread."""
    x = np.random.default_rng(0).standard_normal((3, 5, 64), np.float32)
    q = jax.vmap(lambda x: quantize(x, SPECS[name]), out_axes=1)(x)
    with pytest.raises(ValueError, match=r"Quantized.dequantize: scale: got .* out_axes=0"):
        q.dequantize()


def test_vmap_of_whole_tiles():
    """M = 256 an example: two tile columns, one after the other."""
    case = Case("quantize", SPECS["shuffled"], 64, (2, 256), x_dtype="float32")
    arrays = spread(case)
    q = jax.jit(jax.vmap(lambda x: case.call({"x": x})["q"]))(arrays["x"])
    assert q.scale.shape == (2, 256, 8)
    folded = case.run(arrays)["q"].scale
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(512, 8), folded)


@pytest.mark.parametrize("spec", [SPECS["column"], SPECS["shuffled-fp4"]], ids=["column", "shuffled-fp4"])
def test_padded_groups_have_scales(spec):
    """gpt-oss: 2880 -> 3072, here 200 -> 512; the groups of padding alone have scale 1, the tile's own padding 0x7F, too."""
    case = Case("rmsnorm_quant", spec, 200, (33,), options={"pad_to_multiple": 512})
    arrays = case.arrays()
    out = case.run(arrays)
    case.check(arrays, out)
    rows = oq.to_rows(out["q"].scale, spec.scale_layout, (33,), 16)
    assert (rows[:, 7:] == (127 if rows.dtype == np.uint8 else 1.0)).all()
