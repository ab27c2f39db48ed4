"""GroupNorm by clusters of blocks (groups_cluster.h) on the CPU: values, and the same bits whatever holds a part."""

from __future__ import annotations

from dataclasses import replace

import needs
import numpy as np
import oracle_groupnorm as oracle
import pytest
import simt_build
from cases_groupnorm import F16, F32, Case
from jaxnorm.kernels.configs import _groups_cluster as clusters
from jaxnorm.kernels.configs import groupnorm_hip

Cut, Cluster = groupnorm_hip.Cut, clusters.Cluster
STAGE, TARGET = "groupnorm_fwd", "sm_90"
ORDER = ("JN_PART", "JN_Q", "JN_K")
# (case, ways to compute it that differ in nothing that matters to the bits); the first one also by two launches
ENTRIES = [
    (  # a ragged part
        Case(2, (50,), 80, 8, silu=True),
        [Cluster(Cut(32, 4, 8, 40), 1), Cluster(Cut(32, 4, 8, 80))],
    ),
    (  # groups straddle chunks; what means lost to rounding
        Case(2, (37,), 48, 4, x=F32, weight=F32, bias=F32, mean=1e4, std=1.0),
        [Cluster(Cut(16, 2, 4, 24), 2), Cluster(Cut(16, 2, 4, 12), 1)],
    ),
    (Case(2, (32, 16), 8, 2, last=False, x=F16, weight=F32), [Cluster(Cut(64, 1, 64)), Cluster(Cut(64, 1, 64), 1)]),
    (  # the last steps held, those before them fetched again
        Case(1, (320,), 20, 2, last=False, silu=True),
        [Cluster(Cut(256, 1, 64), n) for n in (3, 1, 4)],
    ),
]


def plan(case, way):
    p = case.problem(STAGE, TARGET)
    return p, clusters.launches(groupnorm_hip._check(p), way)


def apart(case, way):
    """By two launches of the same cut."""
    p = case.problem(STAGE, TARGET)
    return p, groupnorm_hip._forward_launches(groupnorm_hip._check(p), way.cut)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    made = [plan(c, way) for c, ways in ENTRIES for way in ways] + [apart(c, ways[0]) for c, ways in ENTRIES]
    return simt_build.Kernels((TARGET, launches) for _, launches in made)


@pytest.mark.parametrize(("case", "ways"), ENTRIES, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_values_and_bits(kernels, case, ways):
    x, w, b = args = case.arrays()
    want, operands = case.forward(args), {"x": x, "weight": w, "bias": b}
    orders = ("shuffled", "reverse", "forward")
    found = [kernels.run(*plan(case, way), operands, order) for way, order in zip(ways, orders, strict=False)]
    found.append(kernels.run(*apart(case, ways[0]), operands))
    oracle.assert_alike(found, want, case)


@pytest.mark.parametrize("last", [True, False])
def test_plan(last):
    """One launch by clusters where there are some; where their kernel does not serve a group, two of the same cut; other targets
    and groups too large for the chip as ever."""
    case = Case(2, (64, 64), 320, 32, last=last, silu=True)
    kernels = lambda c, target=TARGET: [k.kernel.split("_")[-1] for k in groupnorm_hip.plan(c.problem(STAGE, target))]  # noqa: E731
    assert kernels(case) == ["cluster"]
    for other in ("sm_80", "sm_100", "gfx942"):
        assert kernels(case, other) == ["partials", "apply"]
    assert kernels(Case(1, (1024, 1024), 128, 32, last=last)) == ["partials", "apply"]
    assert kernels(Case(2, (64, 64), 320, 32, last=last, x=F32, out=F16)) != ["cluster"]
    few = Case(2, (64, 64), 20, 2, last=last, silu=True)  # chunks of four channels
    assert kernels(few) == (["partials", "apply"] if last else ["cluster"])
    if last:
        plans = [groupnorm_hip.plan(c.problem(STAGE))[0] for c in (case, few, replace(case, batch=32))]
        whole, parts, many = ({n: dict(k.constants).get(n) for n in (*ORDER, "JN_TILE")} for k in plans)
        assert all(whole[n] == other[n] for n in ORDER for other in (parts, many))
        assert whole["JN_TILE"] < many["JN_TILE"]  # few examples: tiles for all units
        for slow in (Case(2, (32, 32), 960, 32), Case(2, (16, 16), 1920, 32)):
            assert kernels(slow) == ["cluster"] and kernels(replace(slow, silu=True)) == ["partials", "apply"]
        for channels in (12, 48):  # groups narrower than 16 bytes, whatever a chunk of this image is
            assert kernels(Case(2, (64, 64), channels, channels // 6, silu=True)) == ["partials", "apply"]


def test_silu_far_out(kernels):
    """Two neighbours share a reciprocal: neither one's NaN, infinity or large exponential reaches the other."""
    case, ways = ENTRIES[0]
    x, w, _ = case.arrays()
    bias = np.array([-np.inf, 3.0, np.nan, -70.0, -300.0, -1.0, np.inf, -1e30, 0.0], np.float32)
    b = np.resize(bias, case.channels).astype(x.dtype)
    y = kernels.run(*plan(case, ways[1]), {"x": x, "weight": w, "bias": b})["y"].astype(np.float32)
    with np.errstate(invalid="ignore"):
        want = case.forward((x, w, b)).y()
    low = np.isneginf(np.resize(bias, case.channels))
    assert (np.abs(y[..., low]) < 1e-15).all()
    np.testing.assert_allclose(y[..., ~low], want[..., ~low], rtol=2.0**-7, atol=1e-5)
