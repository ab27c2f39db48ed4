"""The bodies of the GroupNorm HIP kernels on the CPU, in waves of 32 and 64: both layouts, groups on chip and in parts."""

from __future__ import annotations

from dataclasses import replace

import needs
import numpy as np
import oracle_groupnorm as oracle
import pytest
import simt_build
import tolerances
from cases_groupnorm import BF16, F16, F32, Case
from jaxnorm.kernels.configs import Unsupported, groupnorm_hip

TARGETS = ("sm_90", "gfx942")
FORWARD, BACKWARD = "groupnorm_fwd", "groupnorm_bwd"
Cut, Lines = groupnorm_hip.Cut, groupnorm_hip.Lines
# (case, how the group is cut, or None for the plan's choice)
LAST = [
    (Case(2, (5, 7), 40, 4), None),  # groups straddle chunks, two channels at a time
    (Case(3, (9,), 24, 8, x=F16, weight=F32, bias=F32, silu=True), None),
    (Case(2, (3, 3), 15, 5, x=F32, weight=F32, bias=BF16, silu=True), None),  # one channel at a time
    (Case(2, (), 64, 4, weight=None, bias=F32), None),
    (Case(2, (6, 5), 16, 16, x=BF16, out=F32, weight=F32), None),  # instance norm
    (Case(2, (64,), 40, 4, silu=True), Cut(16, 2, 4, 40)),  # parts of two steps
    (
        Case(2, (37,), 48, 4, x=F32, weight=F32, bias=F32, mean=1e4, std=1.0),
        Cut(16, 1, 8, 24),
    ),  # ragged part, low plane
    (Case(1, (50,), 36, 3, x=F16, silu=True), Cut(20, 3, 2, 24)),  # a tile that is not there as a whole
    (Case(2, (21,), 56, 7, weight=F32, bias=None, out=F16), Cut(8, 4, 2, 56)),
]
FIRST = [
    (Case(2, (5, 7), 6, 3, last=False, silu=True), None),  # odd positions
    (Case(2, (4, 4), 12, 3, last=False, x=F32, weight=F16, bias=F32), None),
    (Case(3, (24,), 8, 2, last=False, x=F16, weight=None, bias=None, out=BF16), None),
    (Case(2, (32, 16), 8, 2, last=False, silu=True, weight=F32), Cut(96, 1, 64)),  # ragged part
    (Case(1, (160,), 10, 5, last=False, x=F32, mean=1e4, std=1.0, weight=F32), Cut(128, 1, 64)),
    (Case(2, (512,), 6, 2, last=False, x=BF16), Cut(128, 1, 64)),
]
CASES = [(c, cut, t) for c, cut in LAST + FIRST for t in TARGETS]


def forward(case: Case, cut: Cut | None, target: str):
    p = case.problem(FORWARD, target)
    if cut is None:
        return p, groupnorm_hip.plan(p)
    s = groupnorm_hip._check(p)
    return p, groupnorm_hip._forward_launches(s, cut, groupnorm_hip._resident_apply(s, cut))


def backward(case: Case, cut: Cut | None, target: str):
    p = case.problem(BACKWARD, target)
    if cut is None:
        return p, groupnorm_hip.plan(p)
    sums = cut if case.last else Lines(16, 1, 64, 1) if case.spatial == (512,) else Lines(8, 2, 4, 16)
    return p, groupnorm_hip._backward_launches(groupnorm_hip._check(p), sums, cut)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    return simt_build.Kernels((t, make(c, cut, t)[1]) for c, cut, t in CASES for make in (forward, backward))


def present(**arrays):
    return {k: v for k, v in arrays.items() if v is not None}


def _id(value) -> str:
    return "" if value is None else str(value) if not isinstance(value, Cut) else f"part{value.part}"


@pytest.mark.parametrize(("case", "cut", "target"), CASES, ids=_id)
def test_forward(kernels, case, cut, target):
    p, plan = forward(case, cut, target)
    x, w, b = args = case.arrays()
    out = kernels.run(p, plan, present(x=x, weight=w, bias=b), "reverse")
    want = case.forward(args)
    oracle.assert_y(out["y"], want, case.out_dtype)
    stats, expected = out["stats"].astype(np.float64), case.stats(want).astype(np.float64)
    np.testing.assert_allclose(stats[:, 0] + stats[:, 1], expected[:, 0] + expected[:, 1], rtol=0, atol=2e-6 * case.std)
    np.testing.assert_allclose(stats[:, 2], expected[:, 2], rtol=2.0**-20)


@pytest.mark.parametrize(("case", "cut", "target"), CASES, ids=_id)
def test_backward(kernels, case, cut, target):
    p, plan = backward(case, cut, target)
    x, w, b = args = case.arrays()
    want, dy = case.forward(args), case.cotangent()
    operands = present(x=x, dy=dy, weight=w, bias=b if case.silu else None, stats=case.stats(want))
    out = kernels.run(p, plan, operands, "shuffled")
    gradients = (out["dx"], out.get("dweight"), out.get("dbias"))
    oracle.assert_gradients(gradients, args, oracle.backward(want, dy))
    if w is not None:
        again = kernels.run(p, plan, operands, "forward")
        tolerances.assert_same_bits(again["dweight"], out["dweight"], "a second run")


def cuts(stage: str, case: Case, target: str) -> set:
    """What fixes the order of the sums, of every launch."""
    names = ("JN_PART", "JN_K", "JN_Q", "JN_LANES", "JN_SHARES") + (() if case.last else ("JN_THREADS",))
    plan = groupnorm_hip.plan(case.problem(stage, target))
    # these add up parts; beyond that their cuts are free
    free = {"bwd_dx": ("JN_SHARES",), "apply": ("JN_PART",)}
    # clusters: whether a launch adds up dweight and dbias of the examples
    plan = [k for k in plan if not k.kernel.endswith("_add")]
    found = set()
    for launch in plan:
        kind = launch.kernel.split(":groupnorm_")[1].removesuffix("_part")
        kept = {n: v for n, v in launch.constants if n in free.get(kind, names)}
        if kind == "apply":  # of the parts that the launch before it, or the one that it stands in for, has
            assert kept.items() <= dict(plan[0].constants).items()
            continue
        if kind == "bwd_held":  # of the parts that those that stand in for it have; how many chunks ahead is free
            assert all((n, v) in plan[1].constants for n, v in kept.items() if n != "JN_K")
            continue
        # the same sums, whether one launch waits for other blocks or two follow each other
        found.add(("in parts" if kind in ("cluster", "held", "partials") else kind, *kept.items()))
    return found


@pytest.mark.parametrize("last", [True, False])
def test_the_order_of_sums_does_not_depend_on_batch_or_groups(last):
    for spatial, size in (((64, 64), 10), ((32, 32), 20), ((8, 8), 80), ((128, 128), 16), ((7,), 3)):
        for target in TARGETS:
            for stage in (FORWARD, BACKWARD):
                found = [
                    cuts(stage, Case(b, spatial, size * g, g, last=last, silu=True), target)
                    for b in (1, 2, 64)
                    for g in (32, 16, 8)
                ]
                assert all(f == found[0] for f in found), found


def test_what_no_kernel_serves_is_said():
    wide = Case(1, (2,), 16386, 2).problem(FORWARD)
    with pytest.raises(Unsupported, match=r"8193 channels.*1024"):
        groupnorm_hip.plan(wide)
    with pytest.raises(Unsupported, match="nothing"):
        groupnorm_hip.plan(Case(0, (2,), 8, 2).problem(FORWARD))
    with pytest.raises(Unsupported, match="float64"):
        p = Case(1, (2,), 8, 2).problem(FORWARD)
        groupnorm_hip.plan(replace(p, dtypes=(*p.dtypes[:-1], ("stats", "float64"))))
