"""Machine code of the kernels on heads, HIP and Triton, for every target, without a GPU: access widths, registers, scratch.

What is asserted here is compiled and inspected; nothing of it has run on AMD silicon."""

from __future__ import annotations

import dataclasses
import os

import isa
import needs
import pytest
from jaxnorm.kernels.configs import Problem, qk_hip, qk_triton, rope_hip, rope_triton, wave_size
from oracle_rope import BF16, F16, F32, QK_CASES, ROPE_CASES, Case, TwoStream

from jaxnorm._compile import hip

pytestmark = pytest.mark.compile

AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")
QK = Case((64, 8), 128, (4,), weights=(BF16, BF16))
ROPE = Case((64, 8), 128, (4,))
PARTIAL = Case((16, 4), 256, (4,), 64, style="gptj", weights=(F32, F32), offset=1.0, dtypes=(F16, F16))
MROPE = Case((16, 4), 128, (4,), sections=(24, 20, 20), interleaved=True, weights=(BF16, BF16))
TWO = TwoStream(2, (4, 5), (24, 24), 128, weights=(BF16,) * 4)


def problem(case, backward: bool, target: str, tokens: int = 8192) -> Problem:
    p, _ = case.problem(case.arrays(), backward, target)
    if isinstance(case, TwoStream):
        return p
    return dataclasses.replace(
        p,
        rows=tokens,
        shapes=tuple((n, (tokens, *s[1:]) if n[:2] not in ("co", "w0", "w1", "dw") else s) for n, s in p.shapes),
    )


def need_hip(target: str) -> None:
    usable, reason, _ = hip.available(target)
    name = "nvrtc" if target.startswith("sm_") else "hipcc"
    needs.need(name, usable, reason)


def check(text: str, target: str, tmp_path, image: bytes | None = None) -> dict[str, int]:
    """No scratch, no spills, no float atomics, rows by 16 bytes; the counts."""
    counts = isa.counts(text, target)
    assert counts["scratch"] == counts["atomics"] == 0
    assert counts["load16"] > 0 and counts["store16"] > 0
    assert counts["load2"] + counts["load1"] + counts["store2"] + counts["store1"] == 0
    if target.startswith("gfx"):
        (stats,) = isa.stats_amd(text).values()
        assert stats["scratch"] == stats["spills"] == 0 and stats["wave"] == wave_size(target)
    elif image is not None:
        cubin = tmp_path / "k.cubin"
        cubin.write_bytes(image)
        (stats,) = isa.resources(cubin).values()
        assert stats["stack"] == stats["local"] == 0
        counts["registers"] = stats["registers"]
    return counts


def hip_code(p: Problem, tmp_path, module) -> dict[str, int]:
    need_hip(p.target)
    launch = module.plan(p)[0]
    if p.target.startswith("gfx"):
        if os.environ.get("JAXNORM_HIP_CLANG") is None:
            needs.need("hipcc", hip.find(p.target).kind in ("clang", "hipcc"), "assembly needs a clang or hipcc")
        return check(hip.assembly(launch, p), p.target, tmp_path)
    code = hip.compile(launch, p)
    cubin = tmp_path / "code.cubin"
    cubin.write_bytes(code.image)
    return check(isa.sass(cubin), p.target, tmp_path, code.image)


@pytest.mark.parametrize("target", [*AMD, "sm_90"])
def test_hip_forward(target, tmp_path):
    """Every 16-byte access of a head once: four heads of two chunks (two heads on NVIDIA), of q and of k."""
    counts = hip_code(problem(QK, False, target), tmp_path, qk_hip)
    assert counts["store16"] == 2 * (2 if target == "sm_90" else 4) * 2
    assert counts["barriers"] == 0


@pytest.mark.parametrize("target", [*AMD, "sm_90"])
def test_hip_backward(target, tmp_path):
    hip_code(problem(QK, True, target), tmp_path, qk_hip)


def test_hip_options(tmp_path):
    """On NVIDIA: other types, partial rotation, mrope, two streams, rope alone; six blocks of the backward share a unit."""
    for case, module in ((PARTIAL, qk_hip), (MROPE, qk_hip), (TWO, qk_hip), (ROPE, rope_hip)):
        for backward in (False, True):
            if case is ROPE and backward:
                continue
            hip_code(problem(case, backward, "sm_90"), tmp_path, module)
    counts = hip_code(problem(QK, True, "sm_90"), tmp_path, qk_hip)
    assert counts["registers"] <= 80


def triton_code(p: Problem, tmp_path, module) -> dict[str, int]:
    pytest.importorskip("triton", reason="needs triton: not installed")
    from jaxnorm._compile import triton as compiler

    launch = module.plan(p)[0]
    code = compiler.compile(launch, p)
    assert code.threads == launch.num_warps * wave_size(p.target)
    return check(code.asm, p.target, tmp_path, code.image)


@pytest.mark.parametrize("target", [*AMD, "sm_90"])
def test_triton_forward(target, tmp_path):
    triton_code(problem(QK, False, target), tmp_path, qk_triton)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_triton_backward(target, tmp_path):
    triton_code(problem(QK, True, target), tmp_path, qk_triton)


@pytest.mark.slow
@pytest.mark.parametrize("target", [*AMD, "sm_90"])
@pytest.mark.parametrize("case", [*ROPE_CASES, *QK_CASES, TWO], ids=str)
def test_every_case_compiles(case, target, tmp_path):
    need_hip(target)
    for backward in (False, True):
        p = problem(case, backward, target)
        hip_module, triton_module = (rope_hip, rope_triton) if p.stage.startswith("rope") else (qk_hip, qk_triton)
        for launch in hip_module.plan(p):
            hip.compile(launch, p)
        triton = pytest.importorskip("jaxnorm._compile.triton")
        for launch in triton_module.plan(p):
            triton.compile(launch, p)
