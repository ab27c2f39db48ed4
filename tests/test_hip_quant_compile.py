"""Machine code of the quantising HIP kernels for four AMD targets and sm_90: conversions, registers, access widths."""

from __future__ import annotations

from dataclasses import replace

import cases
import isa
import pytest
from hip_quant_cases import E4, E4Z, E5, E5Z, Case, mx, plain, q
from jaxnorm.kernels.configs import Launch, quant_hip, shared_memory
from test_hip_compile import AMD, TARGETS, assert_no_spills, machine_code, need_compiler

from jaxnorm._compile import hip

BF16, F16, F32 = cases.FLOATS
pytestmark = pytest.mark.compile

EVERYWHERE = [
    Case(8192, q(E4), rows=8192, residual=BF16),
    Case(8192, q("int8", 128), rows=8192, residual=BF16),
    Case(4096, mx("fp4", "shuffled"), rows=4096, residual=BF16, smooth=F32, keep=BF16),
    Case(65536, q("int8"), rows=4096, residual=BF16),
    Case(1024, q(E5, 32), rows=131072, smooth=BF16),
]
ONCE = [
    Case(1024, q("int8"), rows=131072, residual=BF16),
    Case(4096, q(E4), rows=16),
    Case(2880, mx(E4, "column", "even"), rows=512, pad=256, x=F16, weight=F32),
    Case(65536, q(E4, 1024), rows=512, residual=F32, options={"residual_rounding": "input"}),
    Case(131072, q(E4, 128), rows=64, weight=F32, keep=F32),
    Case(8192, q(E4, scale_ub=2.0), rows=4096, options={"cast": "before_weight"}),
    Case(8192, q("int8"), rows=4096, static=0.1, residual=BF16),
    Case(769, q(E4), rows=64),
    plain(8192, q(E4, 128), rows=4096),
    plain(65536, mx("fp4"), rows=64, x=F32),
    plain(128, q("int8"), rows=1 << 20),
]
# On sm_90, blocks that walk over the rows: registers are as few as the plan dares.
WALKS = [
    Case(4096, q("int8"), rows=8192, smooth=BF16, keep=BF16),
    Case(4096, mx("fp4", "shuffled"), rows=8192),
    Case(2880, mx("fp4", "shuffled"), rows=8192, pad=256),
    Case(5120, mx(E4Z, "column"), rows=8192),
    Case(1024, q(E5, 32), rows=131072, smooth=BF16),
    Case(16384, q(E4), rows=8192),
    Case(8192, q("int8"), rows=8192, static=0.1),
    plain(4096, q(E4, 128), rows=8192),
]
CONVERSIONS = {E4: "v_cvt_pk_fp8_f32", E4Z: "v_cvt_pk_fp8_f32", E5: "v_cvt_pk_bf8_f32", E5Z: "v_cvt_pk_bf8_f32"}
HARDWARE = {"gfx942": (E4Z, E5Z), "gfx950": (E4, E5)}


def check(case: Case, launch: Launch | None = None) -> str:
    """The machine code of the plan, or of another launch of it, after the looks that every kernel must stand."""
    need_compiler(case.target)
    problem = case.problem()
    launch = launch or quant_hip.plan(problem)[0]
    text = machine_code(launch, problem)
    assert_no_spills(text, launch, case.target)
    assert launch.shared <= shared_memory(case.target)
    count = isa.counts(text, case.target)
    assert count["atomics"] == 0
    if case.features % 8 == 0:  # rows in accesses of 16 bytes; 4 for a static scale
        narrow = {k: n for k, n in count.items() if k.startswith("load") and n and k != "load16"}
        assert count["load16"] and set(narrow) <= ({"load4"} if case.static is not None else set()), count
    return text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_storage(case: Case, target: str) -> None:
    text = check(replace(case, target=target))
    if case.spec.dtype == "fp4":
        assert ("v_cvt_scalef32_pk_fp4_f32" in text) == (target == "gfx950")


@pytest.mark.parametrize("case", [replace(c, target=TARGETS[i % len(TARGETS)]) for i, c in enumerate(ONCE)], ids=str)
def test_dtypes_and_options(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_rows_ahead(case: Case) -> None:
    check(case, next(c for (c,) in quant_hip.candidates(case.problem()) if dict(c.constants).get("JN_DEPTH") == 2))


@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_conversions(target: str, kind: str) -> None:
    """The instruction where its flavour is the target's own; software elsewhere, or the codes would be off by a factor of two."""
    text = check(Case(4096, q(kind), rows=8192, target=target))
    assert (CONVERSIONS[kind] in text) == (kind in HARDWARE.get(target, ()))


@pytest.mark.parametrize(("kind", "instruction"), [(E4, "E4M3"), (E5, "E5M2"), (E4Z, None)])
def test_conversions_of_nvidia(kind: str, instruction: str | None) -> None:
    text = check(Case(4096, q(kind), rows=8192))
    found = [line for line in text.splitlines() if "F2FP.SATFINITE" in line]
    assert len(found) >= 8 if instruction else not found
    assert all(instruction in line for line in found if instruction)


@pytest.mark.parametrize("rows", [16, 8192])
def test_candidates_compile(rows: int) -> None:
    """A sample of what a benchmark sweeps: all must fit."""
    need_compiler("sm_90")
    problem = Case(8192, q(E4), rows=rows, residual=BF16).problem()
    plans = quant_hip.candidates(problem)
    assert plans[0] == quant_hip.plan(problem)
    for (launch,) in plans:
        assert launch.shared <= shared_memory("sm_90")
        assert 0 < launch.threads <= 1024
    for plan in plans[1 :: max(1, len(plans) // 2)]:
        hip.compile(plan[0], problem)
