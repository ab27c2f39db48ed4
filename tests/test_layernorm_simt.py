"""The bodies of the LayerNorm HIP kernels, unmodified, on the CPU in waves of 32 and 64."""

from __future__ import annotations

from dataclasses import replace

import cases
import needs
import numpy as np
import pytest
import simt_build
import tolerances
from cases_layernorm import EPS12, NONE, Case, quant_cases
from jaxnorm.kernels.configs import Unsupported, quant_hip, rmsnorm_hip
from layernorm_problems import Call, QuantCall

BF16, F16, F32 = cases.FLOATS
TARGETS = ("sm_90", "gfx942")  # waves of 32 with asynchronous copies, waves of 64 without


def on(target: str, *found: Case) -> list[Call]:
    return [Call(c, target) for c in found]


FORWARD = [
    *on("sm_90",
        Case(3, (5,), F16, BF16, F32, NONE, F32), Case(31, (7,), F32, F32, NONE, F32, BF16),
        Case(128, (19,), options={"weight_offset": 1.0, "cast": "before_weight"}), Case(384, (5,), residual=F32, options=EPS12),
        Case(769, (3,), residual=None, x_bias=F32),
        Case(1000, (3,), weight=NONE, bias=NONE, x_bias=F16, options={"out_dtype": F32}),
        Case(384, (3,), F32, NONE, F32, F32, mean=1e4, std=1.0), Case(2880, (2,), bias=F32, options={"pad_to_multiple": 256}),
        Case(4096, (2,), residual=BF16, x_bias=BF16, options={"residual_rounding": "input"}),
        Case(65536, (1,), residual=BF16, x_bias=F32), Case(131072, (1,), mean=40.0)),
    *on("gfx942",
        Case(97, (5,), F16, F16, F32, BF16, F32, options={"cast": "before_weight"}),
        Case(1024, (5,), x_bias=F32), Case(1600, (3,), F32, F32, F32, F32, F32, mean=1e4, std=1.0),
        Case(5125, (2,), residual=F32),),
]  # fmt: skip
BACKWARD = [
    *on("sm_90",
        Case(3, (9,), F16, BF16, F32, NONE, F32), Case(31, (33,), F32, NONE, NONE, NONE, F16),
        Case(97, (20,), x_bias=F32, bias=NONE), Case(128, (300,), F32, mean=1e4, std=1.0),
        Case(384, (30,), residual=None, x_bias=BF16), Case(1024, (23,), residual=F32, x_bias=F32, weight=F32),
        Case(2880, (9,), options={"pad_to_multiple": 256, "weight_offset": 1.0}),
        Case(4096, (12,), mean=64.0, std=8.0), Case(20480, (3,), x_bias=F32)),
    *on("gfx942",
        Case(769, (9,), F32, x_bias=F32), Case(1000, (9,), weight=NONE, bias=NONE),
        Case(4096, (5,), residual=F16, x_bias=BF16), Case(16384, (2,), residual=None)),
]  # fmt: skip
QUANT = [QuantCall(c, TARGETS[i // 2 % 2]) for i, c in enumerate(quant_cases()) if c.spec.group_size != 96][::2]

# One row through every tier and thread count: all must give the same bits.
TIERS = Case(4096, (2,), residual=BF16, x_bias=F32)
SHAPES = {
    "sm_90": [{"lanes": 32, "groups": 2, "regs": 16}, {"lanes": 512}, {"lanes": 96, "regs": 2, "shared": 2},
              {"lanes": 64, "regs": 1, "shared": 5}, {"lanes": 256, "regs": 2, "early": True}],
    "gfx942": [{"lanes": 64, "groups": 2, "regs": 8}, {"lanes": 512}, {"lanes": 192, "regs": 1, "shared": 1}],
}  # fmt: skip
WALK = Call(Case(1024, (23,), residual=BF16, x_bias=F32))
WALKS = [
    {"lanes": 32, "groups": 4, "blocks": 1, "depth": 2, "shared_pipe": True, "hold_weight": False},
    {"lanes": 128, "groups": 1, "blocks": 1, "depth": 4, "shared_pipe": True, "hold_weight": True},
    {"lanes": 64, "groups": 1, "blocks": 16, "depth": 3, "shared_pipe": True, "hold_weight": True, "tile": 48},
]

AHEAD = {"sm_90": Case(1000, (7,), mean=64.0, std=8.0), "gfx942": Case(1000, (7,), residual=BF16, mean=64.0, std=8.0)}
PIVOTS = Case(1000, (7,), F32, weight=NONE, bias=NONE, options=EPS12)
AHEAD_SHAPES = {
    "sm_90": {"lanes": 64, "regs": 2, "depth": 2, "blocks": 2},
    "gfx942": {"lanes": 128, "depth": 1, "blocks": 3},
}


def ahead_plans():
    """A block that walks, and the plan whose bits it must have."""
    for target, shape in AHEAD_SHAPES.items():
        p = Call(AHEAD[target], target).forward(AHEAD[target].arrays())
        yield target, p, (rmsnorm_hip._forward_launch(p, rmsnorm_hip.Ahead(**shape)),), rmsnorm_hip.plan(p)


def tier_plans():
    for target, shapes in SHAPES.items():
        p = Call(TIERS, target).forward(TIERS.arrays())
        yield from ((target, p, (rmsnorm_hip._forward_launch(p, rmsnorm_hip.Forward(**s)),)) for s in shapes)


def walk_plans():
    p = WALK.backward(WALK.saved(WALK.case.arrays())[0])
    return [(p, rmsnorm_hip._backward_launches(p, rmsnorm_hip.Backward(**w))) for w in WALKS]


def plan_of(call: Call, stage: str):
    a = call.case.arrays()
    return rmsnorm_hip.plan(call.forward(a) if stage == "fwd" else call.backward(call.saved(a)[0]))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    plans = [(c.target, plan_of(c, "fwd")) for c in FORWARD] + [(c.target, plan_of(c, "bwd")) for c in BACKWARD]
    plans += [(q.target, quant_hip.plan(q.problem(q.arrays()))) for q in QUANT]
    plans += [(t, plan) for t, _, plan in tier_plans()] + [(p.target, plan) for p, plan in walk_plans()]
    plans += [(t, rmsnorm_hip.plan(Call(PIVOTS, t).forward(PIVOTS.arrays()))) for t in TARGETS]
    plans += [(t, plan) for t, _, *both in ahead_plans() for plan in both]
    return simt_build.Kernels(plans)


@pytest.mark.parametrize("call", FORWARD, ids=str)
def test_forward(kernels, call: Call) -> None:
    a = call.case.arrays()
    p = call.forward(a)
    call.check_forward(a, kernels.run(p, rmsnorm_hip.plan(p), a, ("forward", "reverse", "shuffled")[p.features % 3]))


@pytest.mark.parametrize("call", BACKWARD, ids=str)
def test_backward(kernels, call: Call) -> None:
    a = call.case.arrays()
    operands, forward = call.saved(a)
    p = call.backward(operands)
    plan = rmsnorm_hip.plan(p)
    out = kernels.run(p, plan, operands, "reverse")
    call.check_backward(a, operands, forward, out)
    if call.sums():
        again = kernels.run(p, plan, operands, "shuffled")
        for name in call.sums():
            tolerances.assert_same_bits(again[name], out[name], f"{name} of a second run")


@pytest.mark.parametrize("call", QUANT, ids=str)
def test_quant(kernels, call: QuantCall) -> None:
    a = call.arrays()
    p = call.problem(a)
    call.check(a, kernels.run(p, quant_hip.plan(p), a, "shuffled"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_plan_has_the_same_bits(kernels, target: str) -> None:
    a = TIERS.arrays()
    results = [kernels.run(p, plan, a) for t, p, plan in tier_plans() if t == target]
    for other in results[1:]:
        for name, value in results[0].items():
            tolerances.assert_same_bits(other[name], value, name)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_whose_first_values_lie_far_off(kernels, target: str) -> None:
    """The sums are about a value of the row: none, one, two, three of those it is taken from far off, others, and constant rows."""
    a = PIVOTS.arrays()
    x = a["x"]
    x[1, 0], x[2, 1:3], x[3, :3], x[4, 500], x[6] = 1e4, 1e4, -1e6, 1e6, 0.1
    x[5] += 1e4
    x[5, :3] = 0.0
    call = Call(PIVOTS, target)
    p = call.forward(a)
    out = kernels.run(p, rmsnorm_hip.plan(p), a, "shuffled")
    exact = x.astype(np.float64)
    deviation = exact - exact.mean(1, keepdims=True)
    want = deviation / np.sqrt((deviation**2).mean(1, keepdims=True) + 1e-12)
    assert (np.abs(out["y"] - want) <= 7e-7 * np.maximum(1.0, np.abs(want)))[:6].all()
    assert (out["y"][6] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_rows_ahead(kernels, target: str) -> None:
    a = AHEAD[target].arrays()
    ((p, walks, plan),) = ((p, walks, plan) for t, p, walks, plan in ahead_plans() if t == target)
    out, want = kernels.run(p, walks, a, "shuffled"), kernels.run(p, plan, a)
    Call(AHEAD[target], target).check_forward(a, out)
    for name, value in want.items():
        tolerances.assert_same_bits(out[name], value, name)


def test_walks_have_the_same_dx(kernels) -> None:
    a = WALK.case.arrays()
    operands, forward = WALK.saved(a)
    results = [kernels.run(p, plan, operands, "shuffled") for p, plan in walk_plans()]
    for result in results:
        WALK.check_backward(a, operands, forward, result)
        tolerances.assert_same_bits(result["dx"], results[0]["dx"], "dx")


def test_rows_do_not_depend_on_their_company(kernels) -> None:
    """In another position, beside a NaN or an infinity: the same bits, and the bad rows show it."""
    call = next(c for c in FORWARD if c.case.features == 128)
    a = call.case.arrays()
    p = call.forward(a)
    plan = rmsnorm_hip.plan(p)
    first = kernels.run(p, plan, a)
    spoiled = {**a, "x": np.roll(a["x"], 4, axis=0)}
    spoiled["x"][1, 5], spoiled["x"][2, 7] = np.nan, np.inf
    second = kernels.run(p, plan, spoiled)
    keep = np.delete(np.arange(call.rows), [call.rows - 3, call.rows - 2])
    for name in ("y", "mean", "shift", "rstd"):
        tolerances.assert_same_bits(np.roll(second[name], -4, axis=0)[keep], first[name][keep], name)
    assert np.isnan(second["y"][1:3].astype(np.float32)).all()


def test_constant_rows_give_the_bias(kernels) -> None:
    call = next(c for c in FORWARD if c.case.options == EPS12)
    a = call.case.arrays()
    a["x"][...] = np.asarray([0.0, 0.1, -3.3, 200.0, 3e4])[:, None]
    a["residual"][...] = 0.0
    p = call.forward(a)
    y = kernels.run(p, rmsnorm_hip.plan(p), a)["y"].astype(np.float32)
    assert (np.abs(y - a["bias"].astype(np.float32)) <= 2.0**-8 * np.abs(a["bias"].astype(np.float32))).all()


def test_plans_of_different_rows_share_their_order_of_sums() -> None:
    a = Case(4096, (2,), residual=F32).arrays()
    base = Call(Case(4096, (2,), residual=F32)).forward(a)
    plans = [rmsnorm_hip.plan(replace(base, rows=m))[0] for m in (1, 16, 1000, 1 << 20)]
    assert len({dict(launch.constants)["JN_V"] for launch in plans}) == 1


def test_another_group_size_is_refused() -> None:
    q = next(QuantCall(c) for c in quant_cases() if c.spec.group_size == 96)
    with pytest.raises(Unsupported, match="group_size=96"):
        quant_hip.plan(q.problem(q.arrays()))
