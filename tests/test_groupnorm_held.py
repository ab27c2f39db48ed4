"""GroupNorm held by teams of blocks all over the device (groups_held.h) on the CPU: values; the same bits whoever holds what."""

from __future__ import annotations

from dataclasses import replace

import needs
import oracle_groupnorm as oracle
import pytest
import simt_build
from cases_groupnorm import F16, F32, Case
from jaxnorm.kernels.configs import _groups_cluster as clusters
from jaxnorm.kernels.configs import _groups_held as held
from jaxnorm.kernels.configs import groupnorm_hip

Cut, Held, Cluster = groupnorm_hip.Cut, held.Held, clusters.Cluster
STAGE, TARGET = "groupnorm_fwd", "sm_90"
ORDER = ("JN_PART", "JN_Q", "JN_K")
# (case, ways that differ in nothing that matters to the bits, a cluster of the same cut if one serves it)
ENTRIES = [
    (  # groups straddle chunks, threads without a chunk, a tile for each team; two teams to a block, some of it in registers
        Case(2, (64,), 80, 8, silu=True),
        [Held(Cut(16, 2, 8, 40), 2, 1, 4, 0), Held(Cut(16, 2, 8, 40), 2, 2, 5, 3), Held(Cut(16, 2, 8, 80), 1, 2, 4, 0)],
        Cluster(Cut(16, 2, 8, 40)),
    ),
    (  # two groups to a chunk; some fetched again, of the second team
        Case(2, (192,), 16, 4, x=F16, weight=F32, bias=None),
        [
            Held(Cut(96, 2, 16, 16), 2, 1, 4, 2),
            Held(Cut(96, 2, 16, 16), 1, 2, 5, 2),
            Held(Cut(96, 2, 16, 16), 1, 1, 6, 0),
        ],
        Cluster(Cut(96, 2, 16, 16), 2),
    ),
    (  # an odd number of channels to a group, a word for each of its parts to one block, which tells the others
        Case(1, (72,), 72, 24, weight=None, silu=True),
        [Held(Cut(3, 1, 3, 72), 8, 1, 6, 2)],
        None,
    ),
    (  # one channel
        Case(2, (72,), 64, 64, x=F16, out="bfloat16"),
        [Held(Cut(8, 1, 4, 64), 3, 2, 9, 3), Held(Cut(8, 1, 4, 16), 9, 1, 8, 6)],
        None,
    ),
    (
        Case(1, (32, 16), 8, 2, last=False, x=F16, weight=F32),
        [Held(Cut(64, 1, 64), 2, 1, 2, 0), Held(Cut(64, 1, 64), 1, 2, 2, 0)],
        Cluster(Cut(64, 1, 64)),
    ),
    (  # fetched again; a block alone
        Case(1, (1536,), 4, 2, last=False, silu=True),
        [Held(Cut(192, 2, 32), 1, 1, 4, 2), Held(Cut(192, 2, 32), 2, 1, 4, 3)],
        Cluster(Cut(192, 2, 32), 3),
    ),
]


def plan(case, way):
    """The launch whose blocks meet, and those that stand in."""
    p = case.problem(STAGE, TARGET)
    s = groupnorm_hip._check(p)
    return p, held.launches(s, way, groupnorm_hip._forward_launches(s, replace(way.cut, min_blocks=1)))


def clustered(case, way):
    p = case.problem(STAGE, TARGET)
    return p, clusters.launches(groupnorm_hip._check(p), way)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    made = [plan(c, way) for c, ways, _ in ENTRIES for way in ways]
    made += [clustered(c, way) for c, _, way in ENTRIES if way]
    return simt_build.Kernels((TARGET, launches) for _, launches in made)


def operands(case):
    names = ("x", "weight", "bias")
    return {n: a for n, a in zip(names, case.arrays(), strict=True) if a is not None}


@pytest.mark.parametrize(("case", "ways", "cluster"), ENTRIES, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_values_and_bits(kernels, case, ways, cluster):
    want, given = case.forward(case.arrays()), operands(case)
    orders = ("shuffled", "reverse", "forward")
    found = [kernels.run(*plan(case, way), given, order) for way, order in zip(ways, orders, strict=False)]
    for each in found:
        assert not each["words"].any(), "whoever takes a word clears it"
    found.append(kernels.run(*plan(case, ways[0]), given, room=False))
    if cluster:
        found.append(kernels.run(*clustered(case, cluster), given))
    oracle.assert_alike(found, want, case)


@pytest.mark.parametrize("last", [True, False])
def test_plan(last):
    """Where teams hold an image depends on the batch and the channels, the order of its sums does not: that of a cluster, or of the
    launches that stand in."""
    plan = lambda c, target=TARGET: groupnorm_hip.plan(c.problem(STAGE, target))  # noqa: E731
    kernels = lambda *a: [k.kernel.split("_")[-1] for k in plan(*a)]  # noqa: E731
    few = Case(2, (64, 64), 320, 32, silu=True) if last else Case(8, (512, 512), 32, 8, last=False, silu=True)
    many, more = (replace(few, batch=n) for n in ((16, 64) if last else (4, 16)))
    assert kernels(few) == kernels(more) == ["cluster"] and kernels(many) == ["held", "partials", "apply"]
    order = [{n: v for n, v in k.constants if n in ORDER} for c in (few, many, more) for k in plan(c)[:2]]
    assert all(o == order[0] for o in order)
    large = Case(1, (512, 512), 128, 32, last=last)
    for case in (many, large, Case(2, (256, 256), 256, 32, last=last, x=F16)):
        launch, *others = plan(case)
        blocks = launch.grid[0] * launch.grid[1]
        constants = dict(launch.constants)
        assert launch.kernel.endswith("_held") and launch.meeting == blocks <= 132 * constants["JN_MIN_BLOCKS"]
        assert [k.meeting for k in others] == [-blocks] * 2 and not any(k.overlaps for k in others)
        for other in others[: 1 if last else 2]:
            assert all(constants[n] == dict(other.constants)[n] for n in ORDER if n in constants)
    for target in ("sm_80", "sm_100", "gfx942"):
        assert kernels(large, target) == ["partials", "apply"]
    for other in (
        replace(large, x=F32),
        replace(large, out=F32),
        replace(large, spatial=(512, 511)),
        replace(large, batch=64),
    ):
        assert "held" not in kernels(other)


def test_candidates():
    """All of one order of the sums, and none too large for a unit."""
    p = Case(1, (512, 512), 128, 32, silu=True).problem(STAGE, TARGET)
    found = [k for k, *_ in groupnorm_hip.candidates(p) if k.kernel.endswith("_held")]
    assert len(found) > 3
    assert len({tuple(dict(k.constants)[n] for n in ORDER) for k in found}) == 1
