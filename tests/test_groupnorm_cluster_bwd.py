"""GroupNorm backward by clusters of blocks (groups_bwd_cluster.h) on the CPU: values, and the same bits wherever parts wait."""

from __future__ import annotations

from dataclasses import replace

import isa
import needs
import oracle_groupnorm as oracle
import pytest
import simt_build
import tolerances
from cases_groupnorm import F16, F32, SD_UNET, SD_VAE, Case
from jaxnorm.kernels.configs import _groups_cluster_bwd as clusters
from jaxnorm.kernels.configs import groupnorm_hip
from test_hip_compile import assert_no_spills, machine_code, need_compiler

Cut, Held = groupnorm_hip.Cut, clusters.Held
TARGET = "sm_90"
# (case, ways: what holds a part, examples of a cluster) that add up in one order
ENTRIES = [
    (Case(2, (32, 16), 8, 2, last=False), [(Held(Cut(128, 2, 64)), 2), (Held(Cut(128, 2, 64), True), 1)]),
    (  # a ragged part; blocks that add up several channels, and none; slopes
        Case(3, (16, 32), 20, 2, last=False, silu=True, x=F16, weight=F32, bias=F16),
        [(Held(Cut(448, 7, 64)), 3), (Held(Cut(448, 7, 64), True), 1), (Held(Cut(448, 8, 64), True), 3)],
    ),
    (
        Case(2, (256,), 6, 2, last=False, mean=64.0, std=8.0, weight=F32, bias=F32, silu=True),
        [(Held(Cut(64, 1, 64), True), 1)],
    ),
    (
        Case(2, (256,), 6, 2, last=False, x=F32, weight=None, bias=F32, silu=True, mean=1e4, std=1.0),
        [(Held(Cut(64, 1, 64)), 1)],
    ),
    (Case(1, (256,), 6, 2, last=False, x=F32, weight=None, bias=None), [(Held(Cut(64, 1, 64)), 1)]),
]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    return simt_build.Kernels((TARGET, plan(c, way)[1]) for c, ways in ENTRIES for way in ways)


def plan(case, way):
    p = case.problem("groupnorm_bwd", TARGET)
    return p, clusters.launches(groupnorm_hip._check(p), *way)


@pytest.mark.parametrize(("case", "ways"), ENTRIES, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_values_and_bits(kernels, case, ways):
    x, w, b = args = case.arrays()
    want, dy = case.forward(args), case.cotangent()
    operands = {"x": x, "dy": dy, "weight": w, "bias": b if case.silu else None, "stats": case.stats(want)}
    operands = {n: a for n, a in operands.items() if a is not None}
    found = [
        kernels.run(*plan(case, way), operands, order)
        for way, order in zip(ways, ("shuffled", "reverse", "forward"), strict=False)
    ]
    gradients = (found[0]["dx"], found[0].get("dweight"), found[0].get("dbias"))
    oracle.assert_gradients(gradients, args, oracle.backward(want, dy))
    for other in found[1:]:
        tolerances.assert_same_bits(other["dx"], found[0]["dx"], "dx")
        oracle.assert_gradients(
            (other["dx"], other.get("dweight"), other.get("dbias")), args, oracle.backward(want, dy)
        )


@pytest.mark.compile
@pytest.mark.parametrize(
    "case",
    [
        replace(SD_UNET[0], silu=True),
        replace(SD_UNET[0], batch=8, silu=True),
        replace(SD_VAE[2], batch=2, silu=True),
    ],
    ids=str,
)
def test_machine_code(case):
    need_compiler(TARGET)
    problem = case.first.problem("groupnorm_bwd", TARGET)
    launch = groupnorm_hip.plan(problem)[0]
    text = machine_code(launch, problem)
    assert_no_spills(text, launch, TARGET)
    count = isa.counts(text, TARGET)
    assert count["atomics"] == 0 and count["load16"] and count["store16"], count


def test_plan():
    """Groups that a cluster holds, channels first, on one target; dweight and dbias in the launch where it has all examples."""
    case = SD_UNET[0].first

    def kernels(c, target=TARGET):
        return [k.kernel.split("_", 2)[-1] for k in groupnorm_hip.plan(c.problem("groupnorm_bwd", target))]

    assert kernels(case) == ["cluster"]
    assert kernels(replace(case, batch=3)) == ["cluster_part", "add"]
    assert kernels(replace(case, batch=3, weight=None, bias=None)) == ["cluster_part"]
    for other, target in (
        (replace(case, last=True), TARGET),
        (SD_UNET[3].first, TARGET),  # eight chunks of a channel
        (replace(case, channels=32), TARGET),  # small
        (replace(case, spatial=(48, 48), channels=640), TARGET),  # fifteen whole parts of sixteen
        (SD_VAE[0].first, TARGET),
        (SD_VAE[1].first, TARGET),
        (replace(case, x=F32, out=F16), TARGET),
        *((case, t) for t in ("sm_80", "sm_100", "gfx942")),
    ):
        assert kernels(other, target) == ["sums", "dx"], (other, target)


@pytest.mark.parametrize("spatial, channels", [((64, 64), 320), ((64, 64), 640), ((16, 16), 640), ((128, 128), 512)])
def test_one_cut_in_any_batch(spatial, channels):
    """What waits where may differ, the part of a thread may not."""
    sizes = [
        groupnorm_hip._check(Case(b, spatial, channels, 32, last=False).problem("groupnorm_bwd", TARGET))
        for b in (1, 2, 3, 9, 200)
    ]
    held = [clusters.choose(s) for s in sizes]
    assert len({(h.cut.part, h.cut.k, h.cut.q) for h in held}) == 1
    parts = clusters.part_count(sizes[0], held[0].cut)
    assert all(parts * clusters.examples(s, h) in (2, 4, 8, 16) for s, h in zip(sizes, held, strict=True))
