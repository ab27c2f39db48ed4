"""GroupNorm backward held by teams of blocks all over the device (groups_bwd_held.h) on the CPU: values; the same bits whoever
holds what, and by the launches that stand in."""

from __future__ import annotations

from dataclasses import replace

import needs
import oracle_groupnorm as oracle
import pytest
import simt_build
import tolerances
from cases_groupnorm import F16, F32, Case
from jaxnorm.kernels.configs import _groups_held_bwd as held
from jaxnorm.kernels.configs import groupnorm_hip, shared_memory

Cut, Held = groupnorm_hip.Cut, held.Held
STAGE, TARGET = "groupnorm_bwd", "sm_90"
# (case, ways that differ in nothing that matters to the bits)
ENTRIES = [
    (  # groups straddle chunks, threads without a chunk, a tile for each team; all of it held
        Case(2, (64,), 80, 8, silu=True),
        [Held(Cut(16, 1, 2, 40), 2, 16, 0), Held(Cut(16, 1, 2, 80), 1, 6, 2)],
    ),
    (  # two groups to a chunk; some fetched again
        Case(2, (192,), 16, 4, x=F16, weight=F32, bias=None),
        [Held(Cut(24, 1, 2, 16), 4, 10, 6), Held(Cut(24, 1, 2, 16), 1, 4, 0)],
    ),
    (  # an odd number of channels to a group, a word for each of its parts to one block, which tells the others
        Case(1, (288,), 72, 24, weight=None, silu=True),
        [Held(Cut(12, 1, 3, 72), 8, 8, 4), Held(Cut(12, 1, 3, 72), 4, 7, 1)],
    ),
]


def plan(case, way):
    """The launch whose blocks meet, and those that stand in."""
    p = case.problem(STAGE, TARGET)
    s = groupnorm_hip._check(p)
    cut = replace(way.cut, min_blocks=1)
    return p, held.launches(s, way, groupnorm_hip._backward_launches(s, cut, cut))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    """Stand-ins of the first way."""
    needs.need("gxx", not (why := simt_build.missing()), why)
    return simt_build.Kernels(
        (TARGET, plan(c, way)[1][: 1 if n else 3]) for c, ways in ENTRIES for n, way in enumerate(ways)
    )


@pytest.mark.parametrize(("case", "ways"), ENTRIES, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_values_and_bits(kernels, case, ways):
    x, w, b = args = case.arrays()
    want, dy = case.forward(args), case.cotangent()
    operands = {"x": x, "dy": dy, "weight": w, "bias": b if case.silu else None, "stats": case.stats(want)}
    operands = {n: a for n, a in operands.items() if a is not None}
    orders = ("shuffled", "reverse", "forward")
    found = [kernels.run(*plan(case, way), operands, order) for way, order in zip(ways, orders, strict=False)]
    for each in found:
        assert not each["words"].any(), "whoever takes a word clears it"
    found.append(kernels.run(*plan(case, ways[0]), operands, room=False))
    gradients = [[each.get(n) for n in ("dx", "dweight", "dbias")] for each in found]
    oracle.assert_gradients(gradients[0], args, oracle.backward(want, dy))
    for other in gradients[1:]:
        for name, got, first in zip(("dx", "dweight", "dbias"), other, gradients[0], strict=True):
            if first is not None:
                tolerances.assert_same_bits(got, first, name)


def test_plan():
    """Where teams hold the images depends on the batch and the channels, the order of the sums does not: that of the launches that
    stand in, and of those for fewer or more examples."""
    plan = lambda c, target=TARGET: groupnorm_hip.plan(c.problem(STAGE, target))  # noqa: E731
    order = lambda k: [dict(k.constants)[n] for n in ("JN_PART", "JN_Q")]  # noqa: E731
    image = Case(2, (128, 128), 512, 32)
    served = (image, replace(image, silu=True), replace(image, channels=320), Case(1, (256, 256), 256, 32, x=F16))
    for case in served:
        launch, *others = plan(case)
        held = dict(launch.constants)
        assert launch.kernel.endswith("_bwd_held") and launch.meeting == launch.grid[0] <= 132 * held["JN_MIN_BLOCKS"]
        assert [k.kernel.split("_")[-1] for k in others] == ["sums", "dx"]
        assert all(k.meeting == -launch.meeting and not k.overlaps for k in others)
        assert launch.shared <= shared_memory(TARGET) // held["JN_MIN_BLOCKS"]
        for batch in (1, 2, 64):
            apart = plan(replace(case, batch=batch))
            assert all(order(k) == order(launch) for k in apart if k.kernel.endswith(("_bwd_held", "_sums")))
    for target in ("sm_80", "sm_100", "gfx942"):
        assert len(plan(image, target)) == 2
    for other in (
        replace(image, x=F32),
        replace(image, spatial=(128, 127)),
        replace(image, batch=4),  # more than half of it fetched again
        replace(image, spatial=(64, 64)),  # small
        replace(image, last=False),
    ):
        assert not any(k.meeting for k in plan(other)), other


def test_candidates():
    """All of one order of the sums."""
    for case in (Case(2, (128, 128), 512, 32, silu=True), Case(2, (128, 128), 320, 32)):
        found = [k for k, *_ in groupnorm_hip.candidates(case.problem(STAGE, TARGET)) if k.kernel.endswith("_held")]
        assert len(found) > 2
        assert len({tuple(dict(k.constants)[n] for n in ("JN_PART", "JN_Q")) for k in found}) == 1
