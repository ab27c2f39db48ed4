"""The GroupNorm Triton kernels in the interpreter: both layouts, one program to a group and parts of channels."""

from __future__ import annotations

from dataclasses import replace

import interpreter
import numpy as np
import oracle_groupnorm as oracle
import pytest
from cases_groupnorm import BF16, F16, F32, Case
from jaxnorm.kernels.configs import Unsupported, groupnorm_triton

FORWARD, BACKWARD = "groupnorm_fwd", "groupnorm_bwd"
Tile = groupnorm_triton.Tile
# (case, tile of the launches in parts, or None for the plan's choice)
CASES = [
    (Case(2, (5, 7), 40, 4, silu=True), None),
    (Case(2, (3, 3), 15, 5, x=F32, weight=F32, bias=BF16), None),
    (Case(3, (), 24, 3, x=F16, weight=None, bias=F32, silu=True), None),
    (Case(2, (6, 5), 10, 2, last=False, weight=F32, out=F32), None),
    (Case(2, (5, 7), 40, 4, silu=True, weight=F32), Tile(8, 16, 16)),  # ragged parts, channels and tiles
    (Case(2, (37,), 20, 2, x=F32, weight=F32, bias=F32, mean=1e4, std=1.0), Tile(8, 32, 8)),
    (Case(2, (5, 7), 10, 2, last=False, x=F16, silu=True, bias=None), Tile(16, 4, 32)),
    (Case(1, (64,), 6, 3, last=False, x=F32, weight=None, bias=F32, mean=1e4, std=1.0, silu=True), Tile(16, 1, 32)),
    (Case(2, (64,), 6, 3, last=False, out=F16), Tile(16, 2, 16)),
]


def present(**arrays):
    return {k: v for k, v in arrays.items() if v is not None}


def _id(value) -> str:
    return "" if value is None else str(value) if isinstance(value, Case) else f"part{value.part}"


@pytest.mark.parametrize(("case", "tile"), CASES, ids=_id)
def test_forward(case, tile):
    x, w, b = args = case.arrays()
    want = case.forward(args)
    for wanted in (True, False):  # the statistics are a result, or scratch
        p = case.problem(FORWARD, stats=wanted)
        plan = groupnorm_triton.plan(p)
        if tile is not None:
            plan = groupnorm_triton._forward_in_parts(groupnorm_triton._check(p), tile)
        out = interpreter.run(plan, p, present(x=x, weight=w, bias=b))
        oracle.assert_y(out["y"], want, case.out_dtype)
        if wanted:
            got, expected = out["stats"].astype(np.float64), case.stats(want).astype(np.float64)
            np.testing.assert_allclose(got[:, 0] + got[:, 1], expected[:, 0] + expected[:, 1], rtol=0, atol=4e-6)
            np.testing.assert_allclose(got[:, 2], expected[:, 2], rtol=2.0**-20)


@pytest.mark.parametrize(("case", "tile"), CASES, ids=_id)
def test_backward(case, tile):
    p = case.problem(BACKWARD)
    plan = groupnorm_triton.plan(p)
    if tile is not None:
        plan = groupnorm_triton._backward(groupnorm_triton._check(p), tile)
    x, w, b = args = case.arrays()
    want, dy = case.forward(args), case.cotangent()
    operands = present(x=x, dy=dy, weight=w, bias=b if case.silu else None, stats=case.stats(want))
    out = interpreter.run(plan, p, operands)
    gradients = (out["dx"], out.get("dweight"), out.get("dbias"))
    oracle.assert_gradients(gradients, args, oracle.backward(want, dy))


@pytest.mark.parametrize("last", [True, False])
def test_tiles_do_not_depend_on_batch_or_groups(last):
    names = ("PARTS", "PART", "POS", "CH", "ROWS")
    for spatial, size in (((64, 64), 10), ((8, 8), 80), ((512, 512), 4), ((7,), 3), ((), 8)):
        for stage in (FORWARD, BACKWARD):
            cases = [Case(b, spatial, size * g, g, last=last) for b in (1, 2, 64) for g in (32, 16)]
            plans = [groupnorm_triton.plan(c.problem(stage)) for c in cases]
            plans = [[k for k in plan if "reduce" not in k.kernel] for plan in plans]
            found = [[(k.kernel, k.num_warps, *(v for n, v in k.constants if n in names)) for k in p] for p in plans]
            assert all(f == found[0] for f in found), found


def test_a_small_group_takes_one_launch():
    for case in (Case(2, (16, 16), 1280, 32), Case(2, (8, 8), 2560, 32, last=False)):
        assert len(groupnorm_triton.plan(case.problem(FORWARD))) == 1
    assert len(groupnorm_triton.plan(Case(2, (64, 64), 320, 32).problem(FORWARD))) == 3


def test_what_no_kernel_serves_is_said():
    with pytest.raises(Unsupported, match="nothing"):
        groupnorm_triton.plan(Case(0, (2,), 8, 2).problem(FORWARD))
    with pytest.raises(Unsupported, match="131072 channels"):
        groupnorm_triton.plan(Case(1, (2,), 131072, 1).problem(FORWARD))
    with pytest.raises(Unsupported, match="elements"):
        groupnorm_triton.plan(Case(1, (1 << 16, 1 << 14), 8, 2).problem(BACKWARD))
    with pytest.raises(Unsupported, match="rmsnorm_fwd"):
        groupnorm_triton.plan(replace(Case(1, (2,), 8, 2).problem(FORWARD), stage="rmsnorm_fwd"))
