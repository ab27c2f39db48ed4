"""The HIP kernels on heads, unmodified, on the CPU in waves of 32 and 64, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import needs
import numpy as np
import oracle_rope
import pytest
import simt_build
import tolerances
from jaxnorm.kernels.configs import Problem, Unsupported, _heads_hip, qk_hip, rope_hip
from oracle_rope import BF16, F16, F32, QK_CASES, ROPE_CASES, TWO_CASES, Case

ROPE, QK, TWO = ROPE_CASES, QK_CASES, TWO_CASES
# (case, target, backward): each option in waves of 32, what depends on the wave in 64, too
RUNS = [
    *((c, "sm_90", False) for c in (*ROPE, *QK, *TWO)),
    *((c, "sm_90", True) for c in (ROPE[2], ROPE[4], QK[1], QK[3], QK[4], QK[7], QK[8], QK[10], TWO[1])),
    *((c, "gfx942", False) for c in (ROPE[0], ROPE[5], QK[0], QK[3], QK[7], QK[9], TWO[2])),
    *((c, "gfx942", True) for c in (QK[0], QK[7], QK[11], TWO[0], TWO[2])),
]
MANY = Case((9, 4), 64, (50,), weights=(BF16, F16), dtypes=(BF16, F16), offset=0.5)
DEALS = [_heads_hip.Deal(64, 1), _heads_hip.Deal(128, 3), _heads_hip.Deal(256, 8)]
WALKS = [qk_hip.Walk(_heads_hip.Deal(128, 2), 1, True), qk_hip.Walk(_heads_hip.Deal(64, 1), 2, False)]
NINE = Case((2, 1, 1, 1, 1, 1, 1, 1, 3), 16, (3,), dtypes=(F32,) * 9)


def module(problem: Problem):
    return rope_hip if problem.stage.startswith("rope") else qk_hip


def deals() -> list:
    a = MANY.arrays()
    p, _ = MANY.problem(a, False)
    return [(qk_hip._forward_launch(p, qk_hip._parts(p), d),) for d in DEALS]


def walks() -> list:
    p, _ = MANY.problem(MANY.arrays(), True)
    return [qk_hip._backward_launches(p, qk_hip._parts(p), w) for w in WALKS]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    plans = []
    for case, target, backward in [*RUNS, (NINE, "sm_90", False)]:
        p, _ = case.problem(case.arrays(), backward, target)
        plans.append((target, module(p).plan(p)))
    return simt_build.Kernels([*plans, *(("sm_90", plan) for plan in (*deals(), *walks()))])


def run(kernels, case, backward=False, target="sm_90", arrays=None, plan=None, order="forward"):
    a = case.arrays() if arrays is None else arrays
    p, operands = case.problem(a, backward, target)
    return kernels.run(p, plan or module(p).plan(p), operands, order)


@pytest.mark.parametrize(("case", "target", "backward"), RUNS, ids=str)
def test_against_the_oracle(kernels, case, target, backward):
    order = ("forward", "reverse", "shuffled")[case.features % 3]
    a = case.arrays()
    case.check_stage(a, run(kernels, case, backward, target, a, order=order), backward, target)


def test_more_arrays_than_a_launch_takes(kernels):
    a = NINE.arrays()
    p, _ = NINE.problem(a, False)
    assert len(rope_hip.plan(p)) == 2
    NINE.check_stage(a, run(kernels, NINE, arrays=a), False)


def test_every_deal_has_the_same_bits(kernels):
    """Threads, heads a group, blocks that walk: the same y and dx; the weight gradients within their bound."""
    results = [run(kernels, MANY, plan=plan, order="shuffled") for plan in deals()]
    MANY.check_stage(MANY.arrays(), results[0], False)
    for other in results[1:]:
        for name, value in results[0].items():
            tolerances.assert_same_bits(other[name], value, name)
    gradients = [run(kernels, MANY, True, plan=plan, order="reverse") for plan in walks()]
    for got in gradients:
        MANY.check_stage(MANY.arrays(), got, True)
        for name in ("dx0", "dx1"):
            tolerances.assert_same_bits(got[name], gradients[0][name], name)


def test_far_positions_and_special_values(kernels):
    """Nothing is read outside of the table; NaN stays in its head; what is not turned keeps its bits, -0 and Inf, too."""
    case = ROPE[3]  # one quarter of a head is turned
    a = case.arrays()
    a["positions"] = np.array([[-(2**31), 2**31 - 1, 29], [-1, 28, 0]], np.int32)
    a["x0"][0, 2, :, 64:] = -0.0
    a["x0"][1, 0, 1, 70] = np.inf
    a["x0"][1, 1, 2, 3] = np.nan
    out = run(kernels, case, arrays=a)
    case.check_stage(a, out, False)
    tolerances.assert_same_bits(out["y0"].reshape(a["x0"].shape)[..., 64:], a["x0"][..., 64:], "beyond rotary_dim")
    case = QK[0]
    b = case.arrays()
    clean = run(kernels, case, arrays=b)
    b["x0"][2, 5, 9] = np.nan
    dirty = run(kernels, case, arrays=b)
    assert np.isnan(dirty["y0"][2, 5].astype(np.float32)).all()
    keep = np.ones((5, 32), bool)
    keep[2, 5] = False
    tolerances.assert_same_bits(dirty["y0"][keep], clean["y0"][keep])
    tolerances.assert_same_bits(dirty["y1"], clean["y1"])


def test_equal_positions_of_mrope_are_rope(kernels):
    case = ROPE[8]
    a = case.arrays()
    a["positions"][:] = a["positions"][0]
    plain = Case((16, 2), 128, (6,))
    p, _ = plain.problem(a | {"positions": a["positions"][0]}, False)
    both = simt_build.Kernels([("sm_90", rope_hip.plan(p))])
    want = run(both, plain, arrays=a | {"positions": a["positions"][0]})
    for name, value in run(kernels, case, arrays=a).items():
        tolerances.assert_same_bits(value, want[name])


def test_what_the_kernels_leave_to_others():
    a = ROPE[0].arrays()
    p, _ = ROPE[0].problem(a, False)
    with pytest.raises(Unsupported, match=r"no stage of rope\.hip"):
        rope_hip.plan(replace(p, stage="rmsnorm_fwd"))
    with pytest.raises(Unsupported, match="elements of a head a lane"):
        rope_hip.plan(
            Case((1,), 4110, (1,), 6, dtypes=(F32,)).problem(Case((1,), 4110, (1,), 6, dtypes=(F32,)).arrays(), False)[
                0
            ]
        )
    huge = replace(p, shapes=tuple((n, (1 << 26, 64, 128) if n[0] in "xy" else s) for n, s in p.shapes))
    with pytest.raises(Unsupported, match="the kernels count up to"):
        rope_hip.plan(huge)
    with pytest.raises(Unsupported, match="no stage"):
        qk_hip.plan(p)


def test_a_sum_has_one_order_for_any_number_of_tokens():
    """Lanes and chunk of a head (heads.h) are those of every plan and candidate."""
    for case in (QK[0], QK[4], QK[6]):
        for target in ("sm_90", "gfx942", "gfx1100"):
            found = set()
            for tokens in (1, 16, 8192, 1 << 20):
                p, _ = case.problem(case.arrays(), False, target)
                resized = tuple((n, (tokens, *s[1:]) if n[0] in "xyp" else s) for n, s in p.shapes)
                for plan in qk_hip.candidates(replace(p, rows=tokens, shapes=resized)):
                    c = dict(plan[0].constants)
                    found.add(tuple(c[f"JN_{k}{i}"] for k in ("V", "LANES") for i in (0, 1)))
            assert len(found) == 1


def test_cases_of_the_oracle_are_those_of_the_contract():
    """Head dims, both styles, mixed dtypes, partial rotary and both kinds of sections are all there."""
    assert {64, 80, 96, 128, 192, 256, 512} <= {c.features for c in (*ROPE, *QK)}
    assert {c.style for c in QK} == {"neox", "gptj"}
    assert {(256, 64), (128, 64)} <= {(c.features, c.rotary) for c in QK} & {(c.features, c.rotary) for c in ROPE}
    assert {c.interleaved for c in (*ROPE, *QK) if c.sections} == {False, True}
    assert oracle_rope.component(4, (2, 3, 3), False) == 1
