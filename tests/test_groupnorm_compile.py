"""Machine code of the GroupNorm kernels: 16-byte accesses to images, no scratch, no float atomics, for AMD targets and sm_90.

Each kernel is compiled for sm_90 and, in turn, for one of the AMD targets; none of this runs anything.
"""

from __future__ import annotations

from dataclasses import replace

import isa
import needs
import pytest
from cases_groupnorm import F32, SD_UNET, SD_VAE, Case
from jaxnorm.kernels.configs import Launch, Problem, groupnorm_hip, groupnorm_triton, shared_memory
from test_hip_compile import AMD, assert_no_spills, machine_code, need_compiler

from jaxnorm._compile import triton as triton_compiler

pytestmark = pytest.mark.compile
PARTS, CHIP = replace(SD_UNET[0], silu=True), replace(SD_UNET[3], silu=True)
LARGE = replace(SD_VAE[1], silu=True)  # in parts; on sm_90 they stand in
# name -> (stage, case, index of the launch)
KERNELS = {
    "partials-last": ("groupnorm_fwd", LARGE, -2),
    "apply-last": ("groupnorm_fwd", LARGE, -1),
    "chip-last": ("groupnorm_fwd", CHIP, 0),
    "chip-first": ("groupnorm_fwd", SD_UNET[2].first, 0),
    "apply-first": ("groupnorm_fwd", Case(1, (1024, 1024), 128, 32, last=False), 1),
    "sums-last": ("groupnorm_bwd", PARTS, 0),
    "dx-last": ("groupnorm_bwd", PARTS, 1),
    "rows-first": ("groupnorm_bwd", Case(1, (1024, 1024), 128, 32, silu=True, last=False), 0),
    "dx-first": ("groupnorm_bwd", Case(1, (1024, 1024), 128, 32, silu=True, last=False), 1),
}
# sm_90: in registers, in shared memory, with and without silu; float32
CLUSTERS = [
    SD_UNET[0],
    SD_UNET[1],
    SD_UNET[6],
    *(replace(c, silu=True) for c in (*SD_UNET[:3], SD_UNET[1].first, SD_UNET[0].first)),
    *(replace(c, silu=True, batch=8) for c in (SD_VAE[2], SD_VAE[1].first)),
    replace(PARTS, x=F32),
]
# sm_90: two teams to a block; some fetched again
HELD = [Case(4, (128, 128), 320, 32), replace(SD_VAE[1], batch=2, silu=True), SD_VAE[0].first]
HELD_BACKWARD = [Case(2, (128, 128), 512, 32, silu=True), Case(2, (128, 128), 320, 32)]
HIP = [(name, t) for i, name in enumerate(KERNELS) for t in ("sm_90", AMD[i % len(AMD)])]


def check_hip(launch: Launch, problem: Problem) -> dict[str, int]:
    text = machine_code(launch, problem)
    assert_no_spills(text, launch, problem.target)
    assert launch.shared <= shared_memory(problem.target)
    count = isa.counts(text, problem.target)
    assert count["atomics"] == 0
    return count


@pytest.mark.parametrize(("name", "target"), HIP)
def test_hip(name, target):
    need_compiler(target)
    stage, case, index = KERNELS[name]
    problem = case.problem(stage, target)
    count = check_hip(groupnorm_hip.plan(problem)[index], problem)
    images = 2 if stage == "groupnorm_bwd" else 1
    assert count["load16"] >= images, count
    assert bool(count["store16"]) == (name.split("-")[0] in ("apply", "chip", "dx")), count
    # what is left is vectors of channels and statistics: channels first, one weight to a chunk
    assert case.last is False or not count["load2"] or name == "sums-last", count


@pytest.mark.parametrize("case", CLUSTERS, ids=str)
def test_hip_clusters(case):
    need_compiler("sm_90")
    problem = case.problem("groupnorm_fwd")
    (launch,) = groupnorm_hip.plan(problem)
    assert launch.kernel.endswith("cluster")
    count, text = check_hip(launch, problem), machine_code(launch, problem)
    steps, chunks = (dict(launch.constants)[n] for n in ("JN_SLOTS", "JN_K"))
    assert count["store16"] == chunks, count
    # from global memory to registers, or past them to shared memory
    assert ("LDGSTS.E.BYPASS.128" in text) == (steps > 0)
    assert "STAS" in text and "UCGABAR_WAIT" in text and "MEMBAR" not in text  # no fence of global memory


@pytest.mark.parametrize("case", HELD, ids=str)
def test_hip_held(case):
    """Without statistics; a launch that saves them too keeps a few words of a thread in memory."""
    need_compiler("sm_90")
    problem = case.problem("groupnorm_fwd", stats=False)
    launch = groupnorm_hip.plan(problem)[0]
    assert launch.kernel.endswith("held")
    text = machine_code(launch, problem)
    check_hip(launch, problem)
    assert "LDGSTS.E.BYPASS.128" in text and "STG.E.128" in text
    # words are whole accesses, and nobody waits for anything else
    assert "LD.E.128.STRONG.GPU" in text or "LDG.E.128.STRONG.GPU" in text
    assert "MEMBAR" not in text


@pytest.mark.parametrize("case", HELD_BACKWARD, ids=str)
def test_hip_held_backward(case):
    """What a thread holds stays in registers; all of it is read past the registers first."""
    need_compiler("sm_90")
    problem = case.problem("groupnorm_bwd")
    launch = groupnorm_hip.plan(problem)[0]
    assert launch.kernel.endswith("bwd_held")
    text = machine_code(launch, problem)
    check_hip(launch, problem)
    assert "LDGSTS.E.BYPASS.128" in text and "STG.E.128" in text
    assert "LDG.E.128.STRONG.GPU" in text and "MEMBAR" not in text


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])
def test_hip_odd_channels_and_float32(target):
    """One channel of a group at a time; a group that straddles chunks; the plane of what the means lost."""
    need_compiler(target)
    case = Case(2, (64, 64), 360, 8, x=F32, weight=F32, bias=F32, silu=True)
    for stage in ("groupnorm_fwd", "groupnorm_bwd"):
        problem = case.problem(stage, target)
        for launch in groupnorm_hip.plan(problem)[:1]:
            assert check_hip(launch, problem)["load16"]


def test_hip_candidates_fit():
    for case in (PARTS, PARTS.first, CHIP, SD_VAE[0], SD_UNET[1], SD_VAE[0].first):
        for stage in ("groupnorm_fwd", "groupnorm_bwd"):
            problem = case.problem(stage)
            plans = groupnorm_hip.candidates(problem)
            assert plans[0] == groupnorm_hip.plan(problem)
            assert len(plans) == len(set(plans)) > 2
            for launch in (k for plan in plans for k in plan):
                assert launch.shared <= shared_memory("sm_90")
                assert 0 < launch.threads <= 1024 and launch.threads % 32 == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("case", "stage"), [(PARTS, "groupnorm_fwd"), (CHIP, "groupnorm_fwd"), (PARTS, "groupnorm_bwd")]
)
def test_triton(case, stage, target):
    usable, why, remedy = triton_compiler.available()
    needs.need("triton", usable, f"{why} {remedy}")
    problem = case.problem(stage, target)
    for launch in groupnorm_triton.plan(problem):
        if "reduce" in launch.kernel:
            continue
        text = triton_compiler.compile(launch, problem).asm
        count = isa.counts(text, target)
        assert count["atomics"] == 0 and count["scratch"] == 0, count
        if "combine" not in launch.kernel:
            assert count["load16"] >= (2 if "bwd" in launch.kernel else 1), count
            assert "partials" in launch.kernel or "sums" in launch.kernel or count["store16"], count


def test_triton_candidates():
    for case in (PARTS, PARTS.first, CHIP, SD_VAE[0]):
        for stage in ("groupnorm_fwd", "groupnorm_bwd"):
            problem = case.problem(stage)
            plans = groupnorm_triton.candidates(problem)
            assert plans[0] == groupnorm_triton.plan(problem)
            assert len(plans) == len(set(plans)) > 2
