"""Properties over spec x shape, drawn by hypothesis: always the same examples, few of them, since each is a compilation."""

from __future__ import annotations

import jax
import numpy as np
import oracle_quant as oq
import pytest
import tolerances
from oracle_quant import FP8, MAXIMUM, Case

import jaxnorm
from jaxnorm import QuantSpec

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis: tests/requirements.txt names it")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

few = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@st.composite
def specs(draw):
    dtype = draw(st.sampled_from(("int8", *FP8, "fp4")))
    layouts = ["row", "column"]
    if dtype == "fp4" or (dtype != "int8" and draw(st.booleans())):
        group = 32 if dtype == "fp4" else draw(st.sampled_from((16, 32, 64)))
        layouts += ["shuffled"] if group == 32 else []
        more = {"scale_dtype": "e8m0", "e8m0_rounding": draw(st.sampled_from(("up", "down", "even")))}
    else:
        group, more = draw(st.sampled_from((None, 1, 7, 16, 32, 96))), {}
    ub = draw(st.sampled_from((None, None, 0.5)))
    return QuantSpec(dtype, group_size=group, scale_layout=draw(st.sampled_from(layouts)), scale_ub=ub, **more)


@st.composite
def calls(draw):
    spec = draw(specs())
    op = draw(st.sampled_from(("quantize", "rmsnorm_quant", "add_rmsnorm_quant")))
    features = (spec.group_size or 1) * draw(st.integers(1, 9))
    lead = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
    floats = st.sampled_from(("bfloat16", "float16", "float32"))
    options = {}
    if op != "quantize":
        options = {"cast": draw(st.sampled_from(("output", "before_weight"))), "eps": 1e-5}
        if draw(st.booleans()):
            options["pad_to_multiple"] = (spec.group_size or 2) * draw(st.integers(1, 4))
    return Case(op, spec, features, lead, draw(floats), draw(floats), draw(floats), draw(st.none() | floats),
                keep=op != "quantize" and draw(st.booleans()), options=options)  # fmt: skip


@few
@given(calls(), st.integers(0, 3))
def test_every_spec_and_shape(case, seed):
    arrays = case.arrays(seed)
    case.check(arrays, case.run(arrays))


@few
@given(specs(), st.integers(-12, 12), st.integers(0, 3))
def test_codes_do_not_depend_on_powers_of_two(spec, power, seed):
    """x * 2**k has the codes of x and 2**k times its scale; -x the mirrored codes; rows keep their codes in another order."""
    if spec.scale_ub is not None:
        spec = QuantSpec(spec.dtype, spec.group_size, spec.scale_dtype, spec.scale_layout, None, spec.e8m0_rounding)
    features, name = (spec.group_size or 5) * 4, spec.dtype
    case = Case("quantize", spec, features, (6,), x_dtype="float32")
    x = case.arrays(seed)["x"]
    order = np.random.default_rng(seed).permutation(6)

    @jax.jit
    def run(x):
        return jaxnorm.quantize(x, spec)

    q, scaled, mirrored, moved = run(x), run(x * np.float32(2.0**power)), run(-x), run(x[order])
    tolerances.assert_same_bits(scaled.values, q.values)
    rows, more, other = (
        oq.to_rows(s.scale, spec.scale_layout, (6,), spec.groups(features)) for s in (q, scaled, moved)
    )
    np.testing.assert_array_equal(
        more, rows.astype(int) + power if rows.dtype == np.uint8 else rows * np.float32(2.0**power)
    )
    np.testing.assert_array_equal(
        oq.steps(oq.codes_of(mirrored.values, name), name), -oq.steps(oq.codes_of(q.values, name), name)
    )
    tolerances.assert_same_bits(moved.values, np.asarray(q.values)[order])
    tolerances.assert_same_bits(other, rows[order])


@few
@given(specs(), st.floats(1e-30, 1e30), st.integers(0, 3))
def test_no_code_beyond_the_maximum(spec, size, seed):
    """Finite in, finite out; the largest code of a row or group is near the maximum wherever the scale may not saturate."""
    features, name = (spec.group_size or 7) * 3, spec.dtype
    case = Case("quantize", spec, features, (4,), x_dtype="float32")
    x = case.arrays(seed)["x"] * np.float32(size)
    q = case.run({"x": x})["q"]
    value = np.abs(oq.decode(oq.codes_of(q.values, name), name))
    assert value.max() <= MAXIMUM[name]
    if spec.scale_ub is None and size > 1e-25:
        largest = value.reshape(4, -1, spec.group_size or features).max(-1)
        assert (largest >= MAXIMUM[name] * (0.45 if spec.scale_dtype == "e8m0" else 1)).all()
