"""The LayerNorm kernels in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import dataclasses

import cases
import numpy as np
import pytest
import tolerances

triton = pytest.importorskip("triton", reason="needs triton: not installed")

import interpreter  # noqa: E402
from cases_layernorm import EPS12, NONE, Case, quant_case, quant_cases, thinned  # noqa: E402
from jaxnorm.kernels.configs import quant_triton, rmsnorm_triton  # noqa: E402
from layernorm_problems import Call, QuantCall  # noqa: E402
from test_triton_interpret import few_programs, run_backward  # noqa: E402

from jaxnorm import QuantSpec  # noqa: E402

BF16, F16, F32 = cases.FLOATS
MEAN = {"mean": 1e4, "std": 1.0}


def long_plan(block=64):
    """The loop over a row that one tile would hold: the same code at a size the interpreter likes."""

    def plan(p):
        loop = dataclasses.replace(rmsnorm_triton._loop(p), block=block)
        return (rmsnorm_triton._fwd_long(p, loop),) if p.stage == "layernorm_fwd" else rmsnorm_triton._bwd_long(p, loop)

    return plan


def forward(call: Call, a=None, plan=rmsnorm_triton.plan, **kw):
    a = a or call.case.arrays()
    p = call.forward(a)
    return interpreter.run(plan(p), p, a, **kw)


def backward(call: Call, plan=rmsnorm_triton.plan):
    a = call.case.arrays()
    operands, saved = call.saved(a)
    p = call.backward(operands)
    got = run_backward(p, operands, plan)
    call.check_backward(a, operands, saved, got)
    return got


FORWARD = [
    Call(Case(384, (3,), residual=None, options=EPS12)), Call(Case(1, (5,))), Call(Case(7, (40,), F16, x_bias=F32, bias=F32)),
    Call(Case(128, (9,), F32, F32, F32, NONE, **MEAN)), Call(Case(769, (3,), residual=F32, x_bias=BF16)),
    Call(Case(1000, (3,), weight=NONE, bias=NONE, x_bias=F16, options={"out_dtype": F32})),
    Call(Case(200, (3,), bias=F32, options={"pad_to_multiple": 128, "weight_offset": 1.0}), save=False),
    Call(Case(768, (3,), F16, weight=F32, options={"cast": "before_weight"})),
    Call(Case(1600, (2,), residual=F16, options={"residual_rounding": "input"}), "gfx942"),
    Call(Case(97, (3,), F32, x_bias=F32, **MEAN), "gfx1100"), Call(Case(131072, (1,), mean=40.0)),
]  # fmt: skip
LONG = [
    Call(Case(256, (2,))), Call(Case(200, (2,), F32, F32, F32, F32, F32, **MEAN)),
    Call(Case(130, (2,), residual=F32, x_bias=BF16, options={"pad_to_multiple": 64})),
    Call(Case(97, (2,), F16, F16, weight=NONE, bias=F32, options={"residual_rounding": "input", "cast": "before_weight"})),
]  # fmt: skip
BACKWARD = [
    Call(Case(1024, (7,))), Call(Case(384, (5,), residual=None, x_bias=F32)), Call(Case(3, (40,), x_bias=BF16, bias=NONE)),
    Call(Case(128, (9,), F32, weight=F32, **MEAN)), Call(Case(769, (3,), F16, F32, x_bias=F32)),
    Call(Case(1000, (3,), weight=NONE, bias=NONE)), Call(Case(200, (3,), options={"pad_to_multiple": 128, "weight_offset": 1.0})),
    Call(Case(97, (3,), weight=NONE, x_bias=F32), "gfx942"),
]  # fmt: skip
LONG_BACKWARD = [
    Call(Case(256, (5,), x_bias=F32)), Call(Case(97, (3,), residual=F32, x_bias=F32, options={"weight_offset": 1.0})),
    Call(Case(70, (3,), F32, weight=NONE, bias=NONE)), Call(Case(130, (3,), weight=NONE, residual=None)),
]  # fmt: skip


@pytest.mark.parametrize("call", FORWARD, ids=str)
def test_forward(call):
    a = call.case.arrays()
    call.check_forward(a, forward(call, a))


@pytest.mark.parametrize("call", LONG, ids=str)
def test_forward_of_long_rows(call):
    a = call.case.arrays()
    call.check_forward(a, forward(call, a, long_plan()))


def test_the_vectors_may_be_asked_for_early():
    call = LONG[0]
    early = lambda p: (  # noqa: E731
        rmsnorm_triton._fwd_long(p, dataclasses.replace(rmsnorm_triton._loop(p), block=256, early=True)),
    )
    tolerances.assert_same_bits(forward(call, plan=early)["y"], forward(call, plan=long_plan(256))["y"])


@pytest.mark.parametrize("call", BACKWARD, ids=str)
def test_backward(call):
    backward(call)


@pytest.mark.parametrize("call", LONG_BACKWARD, ids=str)
def test_backward_of_long_rows(call):
    backward(call, long_plan())


@pytest.mark.parametrize(
    ("call", "prefetch", "reread"),
    [(Call(Case(1024, (43,), x_bias=F32)), True, False), (Call(Case(1024, (43,), x_bias=F32)), False, True),
     (Call(Case(31, (140,), residual=F32, x_bias=F32)), False, False)],
    ids=["prefetch", "reread", "rows of a wave"],
)  # fmt: skip
def test_backward_with_several_tiles_a_program(call, prefetch, reread):
    def plan(p):
        steps = few_programs(p)
        constants = tuple((k, {"PREFETCH": prefetch, "REREAD": reread}.get(k, v)) for k, v in steps[0].constants)
        assert 1 < steps[0].grid[0] < p.rows / dict(steps[0].constants)["ROWS"]
        return (dataclasses.replace(steps[0], constants=constants), *steps[1:])

    backward(call, plan)


@pytest.mark.parametrize("features", [64, 409])
def test_a_row_has_the_same_bits_alone_and_in_a_tile(features):
    case = Case(features, (9,), residual=BF16, x_bias=F32)
    a = case.arrays()
    whole = forward(Call(case), a)
    p = Call(case).forward(a)
    tile = rmsnorm_triton._tile(p, 1 << (features - 1).bit_length())
    for rows, warps in ((1, 1), (16, 4)):
        got = forward(Call(case), a, lambda p, r=rows, w=warps: (
            rmsnorm_triton._fwd(p, dataclasses.replace(tile, rows=r, warps=w)),))  # fmt: skip
        tolerances.assert_same_bits(got["y"], whole["y"], f"{rows} rows a program")
    for row in (0, 8):
        one = {k: v[row : row + 1] if v.ndim == 2 else v for k, v in a.items()}
        got = forward(Call(dataclasses.replace(case, lead=(1,))), one)
        for name in ("y", "residual_out", "mean", "shift", "rstd"):
            tolerances.assert_same_bits(got[name][0], whole[name][row], f"{name} of row {row}")


@pytest.mark.parametrize("plan", [rmsnorm_triton.plan, long_plan()], ids=["tile", "long"])
def test_bad_rows_and_the_buffer_of_residual(plan):
    """NaN and Inf stay in their row and out of the padding; residual_out may share residual's buffer."""
    call = Call(Case(100, (5,), residual=BF16, options={"pad_to_multiple": 128}))
    a = call.case.arrays()
    clean = forward(call, a, plan, aliases={"residual_out": "residual"})
    call.check_forward(a, clean)
    a["x"][1, 3], a["x"][3, 99] = np.nan, np.inf
    got = forward(call, a, plan)["y"]
    assert np.isnan(got[1, :100].astype(np.float32)).all() and np.isnan(got[3, :100].astype(np.float32)).all()
    assert not tolerances.bits(got[:, 100:]).any()
    for row in (0, 2, 4):
        tolerances.assert_same_bits(got[row], clean["y"][row], f"row {row}")


QUANT = [QuantCall(c, ("sm_90", "gfx942")[i % 2]) for i, c in enumerate(quant_cases()) if c.spec.group_size != 96]


@pytest.mark.parametrize("call", thinned(QUANT, 2))
def test_quant(call):
    a = call.arrays()
    p = call.problem(a)
    call.check(a, interpreter.run(quant_triton.plan(p), p, a))


FAR = [
    quant_case(QuantSpec("int8"), features=97, lead=(3,), weight_dtype=None),
    quant_case(QuantSpec("int8"), features=384, lead=(3,), residual_dtype=F32, options={"weight_offset": 1.0}),
    quant_case(QuantSpec("int8"), features=100, lead=(3,), x_dtype=F16, options={"cast": "before_weight"}),
]


@pytest.mark.parametrize("case", FAR, ids=lambda c: c.id)
def test_quant_of_rows_far_from_zero(case):
    """Behind the row of a tile lies -mean * rstd, which no weight, an offset or a cast to infinity leaves in the maximum."""
    call = QuantCall(case)
    a = call.arrays()
    a["x"] = (a["x"] / (1000 if case.x_dtype == F16 else 1) + 300).astype(a["x"].dtype)
    p = call.problem(a)
    call.check(a, interpreter.run(quant_triton.plan(p), p, a))


@pytest.mark.parametrize("call", [q for q in QUANT if not (q.case.spec.group_size or 0) > 64][::3], ids=str)
def test_quant_of_long_rows(call):
    a = call.arrays()
    p = call.problem(a)
    loop = quant_triton.Loop(128, quant_triton._vec(p), 4)
    call.check(a, interpreter.run((quant_triton._launch(p, loop),), p, a))
