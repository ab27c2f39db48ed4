"""The Triton kernels on heads in Triton's interpreter, against the float64 oracle. Every buffer lies between guards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tolerances

pytest.importorskip("triton", reason="needs triton: not installed")

import interpreter
from jaxnorm.kernels.configs import Unsupported, qk_triton, rope_triton
from jaxnorm.kernels.configs._heads_triton import Tile
from oracle_rope import BF16, F16, F32, QK_CASES, ROPE_CASES, TWO_CASES, Case

ROPE, QK, TWO = ROPE_CASES, QK_CASES, TWO_CASES
FORWARD = [ROPE[i] for i in (1, 2, 3, 5, 6, 7, 9)] + [QK[i] for i in (0, 3, 4, 5, 8, 9, 11)] + [TWO[1], TWO[2]]
BACKWARD = [ROPE[3], ROPE[4], QK[1], QK[3], QK[5], QK[11], TWO[1]]


def module(problem):
    return rope_triton if problem.stage.startswith("rope") else qk_triton


def run(case, backward=False, arrays=None, plan=None):
    a = case.arrays() if arrays is None else arrays
    p, operands = case.problem(a, backward)
    return interpreter.run(plan(p) if plan else module(p).plan(p), p, operands)


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    a = case.arrays()
    case.check_stage(a, run(case, arrays=a), False)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case):
    a = case.arrays()
    case.check_stage(a, run(case, True, a), True)


MANY = Case((5, 2), 64, (21,), 32, weights=(BF16, F16), dtypes=(BF16, F16), offset=0.5)


def test_tiles_have_the_same_bits():
    """And programs that walk over several tiles."""
    a = MANY.arrays()
    tiles = (Tile(4), Tile(16, 2))
    forward = [run(MANY, arrays=a, plan=lambda p, t=t: (qk_triton._forward(p, qk_triton._parts(p), t),)) for t in tiles]
    MANY.check_stage(a, forward[0], False)

    def walk(p, t):
        few = replace(p, target="gfx90a")
        return qk_triton._backward(few, qk_triton._parts(few), qk_triton.Walk(t, 0))

    backward = [run(MANY, True, a, lambda p, t=t: walk(p, t)) for t in tiles]
    for got in backward:
        MANY.check_stage(a, got, True)
    for results, names in ((forward, ("y0", "y1")), (backward, ("dx0", "dx1"))):
        for name in names:
            tolerances.assert_same_bits(results[1][name], results[0][name], name)


def test_more_arrays_than_a_launch_takes():
    case = Case((2, 1, 3, 1, 2), 16, (3,), dtypes=(F32,) * 5)
    a = case.arrays()
    p, _ = case.problem(a, False)
    assert len(rope_triton.plan(p)) == 2
    case.check_stage(a, run(case, arrays=a), False)


def test_far_positions_and_special_values():
    """Nothing is read outside of the table; what is not turned keeps its bits, -0 and Inf, too; NaN stays in its head."""
    for style in ("neox", "gptj"):
        case = Case((3,), 32, (2, 3), 8, style=style, dtypes=(BF16,))
        a = case.arrays()
        a["positions"] = np.array([[-(2**31), 2**31 - 1, 29], [-1, 28, 0]], np.int32)
        a["x0"][0, 2, :, 8:] = -0.0
        a["x0"][1, 0, 1, 20] = np.inf
        a["x0"][1, 1, 2, 3] = np.nan
        out = run(case, arrays=a)
        case.check_stage(a, out, False)
        tolerances.assert_same_bits(out["y0"].reshape(a["x0"].shape)[..., 8:], a["x0"][..., 8:], "beyond rotary_dim")


def test_equal_positions_of_mrope_are_rope():
    case = Case((3,), 32, (4,), dtypes=(F32,), sections=(6, 5, 5), interleaved=True)
    a = case.arrays()
    a["positions"][:] = a["positions"][0]
    plain = replace(case, sections=None)
    want = run(plain, arrays=a | {"positions": a["positions"][0]})
    tolerances.assert_same_bits(run(case, arrays=a)["y0"], want["y0"])


def test_the_plan_looks_at_heads_and_features_alone():
    for case in (QK[0], ROPE[0], TWO[0]):
        a = case.arrays()
        p, _ = case.problem(a, False)
        grown = replace(
            p, rows=p.rows * 999, shapes=tuple((n, (s[0] * 999, *s[1:]) if n[0] in "xyqkp" else s) for n, s in p.shapes)
        )
        (few,), (many,) = module(p).plan(p), module(p).plan(grown)
        assert (few.constants, few.num_warps) == (many.constants, many.num_warps)


def test_what_the_kernels_leave_to_others():
    p, _ = ROPE[0].problem(ROPE[0].arrays(), False)
    with pytest.raises(Unsupported, match="no Triton kernel"):
        rope_triton.plan(replace(p, stage="rmsnorm_fwd"))
    with pytest.raises(Unsupported, match="no stage"):
        qk_triton.plan(p)
    long = Case((1,), 2048, (1,), 64, dtypes=(F32,))
    with pytest.raises(Unsupported, match="heads of up to 1024"):
        rope_triton.plan(long.problem(long.arrays(), False)[0])


def test_candidates_start_with_the_plan_and_are_different():
    for case, backward in ((QK[0], False), (QK[0], True), (ROPE[0], True)):
        p, _ = case.problem(case.arrays(), backward)
        found = module(p).candidates(p)
        assert found[0] == module(p).plan(p)
        assert len(found) == len(set(found)) > 3
