"""Machine code of the LayerNorm kernels for AMD targets and sm_90: no spills, no float atomics, rows in accesses of 16 bytes."""

from __future__ import annotations

from dataclasses import replace

import cases
import isa
import pytest
from cases_layernorm import NONE, Case, quant_case
from jaxnorm.kernels.configs import quant_hip, quant_triton, rmsnorm_hip, rmsnorm_triton, shared_memory
from layernorm_problems import Call, QuantCall
from test_hip_compile import assert_no_spills, machine_code, need_compiler

from jaxnorm import QuantSpec
from jaxnorm._compile import hip
from jaxnorm._compile import triton as triton_compiler

BF16, F16, F32 = cases.FLOATS
SCALARS = {"load4", "store4"}  # of a row: mean, shift, rstd, dot
MX4 = {"group_size": 32, "scale_dtype": "e8m0", "scale_layout": "shuffled"}
pytestmark = pytest.mark.compile


def problem(call: Call, direction: str, rows: int):
    a = call.case.arrays()
    return replace(call.forward(a) if direction == "fwd" else call.backward(call.saved(a)[0]), rows=rows)


# direction, rows, call: each way of keeping a row and of walking the rows, the vectors in every dtype, on targets in turn
HIP = [
    ("fwd", 8192, Call(Case(4096, (1,)), "sm_90", save=False)), ("fwd", 16, Call(Case(4096, (1,)), "sm_90")),
    ("fwd", 8192, Call(Case(768, (1,), residual=None, weight=F32, bias=F32), "sm_90")),
    ("fwd", 4096, Call(Case(65536, (1,), residual=BF16, x_bias=F32), "sm_90")),
    ("fwd", 1024, Call(Case(8192, (1,), residual=BF16), "sm_90")), ("fwd", 1024, Call(Case(16384, (1,)), "sm_90")),
    ("fwd", 64, Call(Case(131072, (1,), x_bias=BF16, weight=F32), "gfx942")),
    ("fwd", 8192, Call(Case(8192, (1,), F16, F32, x_bias=F16), "gfx950")),
    ("fwd", 1 << 18, Call(Case(128, (1,), x_bias=BF16), "gfx90a")), ("fwd", 4096, Call(Case(1600, (1,), F32, bias=F16), "gfx1100")),
    ("bwd", 8192, Call(Case(4096, (1,)), "sm_90")), ("bwd", 131072, Call(Case(1024, (1,), residual=BF16, x_bias=BF16), "sm_90")),
    ("bwd", 8192, Call(Case(8192, (1,), F32, x_bias=F32, weight=F32), "sm_90")), ("bwd", 512, Call(Case(65536, (1,)), "sm_90")),
    ("bwd", 8192, Call(Case(4096, (1,), residual=F32, x_bias=F32), "gfx942")),
    ("bwd", 131072, Call(Case(1024, (1,), x_bias=BF16), "gfx950")), ("bwd", 4096, Call(Case(384, (1,), F16), "gfx1100")),
]  # fmt: skip
TRITON = [
    ("fwd", 8192, Call(Case(4096, (1,)), "sm_90")), ("fwd", 512, Call(Case(16384, (1,), residual=F32, x_bias=F32), "sm_90")),
    ("fwd", 8192, Call(Case(384, (1,), residual=None, x_bias=BF16), "gfx942")),
    ("bwd", 8192, Call(Case(4096, (1,)), "sm_90")), ("bwd", 131072, Call(Case(1024, (1,), residual=BF16, x_bias=BF16), "sm_90")),
    ("bwd", 8192, Call(Case(8192, (1,), x_bias=BF16), "sm_90")), ("bwd", 8192, Call(Case(384, (1,)), "gfx950")),
    ("bwd", 64, Call(Case(65536, (1,), x_bias=BF16), "sm_90")),
]  # fmt: skip
QUANT = [
    ("hip", 8192, QuantCall(quant_case(QuantSpec("int8"), features=4096, lead=(1,), residual_dtype=BF16, x_bias_dtype=BF16))),
    ("hip", 8192, QuantCall(quant_case(QuantSpec("float8_e4m3fn", group_size=128), features=8192, lead=(1,), smooth=F32))),
    ("hip", 4096, QuantCall(quant_case(QuantSpec("fp4", **MX4), features=1024, lead=(256,), keep=True), "gfx950")),
    ("triton", 8192, QuantCall(quant_case(QuantSpec("int8"), features=4096, lead=(1,), residual_dtype=BF16, x_bias_dtype=BF16))),
]  # fmt: skip


def ids(found):
    return [pytest.param(*f, id="-".join(map(str, f))) for f in found]


def check_counts(text: str, target: str, narrow: set[str] = SCALARS) -> None:
    count = isa.counts(text, target)
    assert count["atomics"] == 0 and count["scratch"] == 0
    assert count["load16"] and count["store16"], count
    others = {k for k, n in count.items() if k[:4] in ("load", "stor") and n and k not in ("load16", "store16")}
    assert others <= narrow, count


@pytest.mark.parametrize(("direction", "rows", "call"), ids(HIP))
def test_hip(direction, rows, call):
    need_compiler(call.target)
    p = problem(call, direction, rows)
    for launch in rmsnorm_hip.plan(p)[
        : 1 if call.case.features < 65536 else 2
    ]:  # not the reduction, which rmsnorm has, too
        text = machine_code(launch, p)
        assert_no_spills(text, launch, call.target)
        assert launch.shared <= shared_memory(call.target) and launch.threads <= 1024
        # the dots of a row in tiles are two floats; the values that a row is summed about are half a chunk
        tiled = {"load8"} if launch.kernel.endswith("bwd") or not call.case.dtype("residual") else set()
        if not launch.kernel.endswith("dot"):
            check_counts(text, call.target, SCALARS | tiled)


@pytest.mark.parametrize(("direction", "rows", "call"), ids(TRITON))
def test_triton(direction, rows, call):
    p = problem(call, direction, rows)
    # 16-bit results of a tile that float32 vectors laid out may be 8 bytes wide
    mixed = (
        {"load8", "store8"} if {call.case.dtype(k) for k in ("weight", "bias", "x_bias", "residual")} & {F32} else set()
    )
    shares = {"store8"} if direction == "bwd" else set()  # of the sums over the rows of a tile
    for launch in rmsnorm_triton.plan(p):
        if launch.kernel.endswith("reduce"):
            continue
        code = triton_compiler.compile(launch, p)
        check_counts(code.asm, call.target, SCALARS | mixed | shares)
        assert code.shared <= shared_memory(call.target)
        if call.target.startswith("gfx"):
            (stats,) = isa.stats_amd(code.asm).values()
            assert stats["scratch"] == 0 and stats["spills"] == 0


def test_scratch_of_an_earlier_launch_is_float32():
    """The means of a long row: an input that is no operand would get the type of the first one."""
    p = problem(Call(Case(65536, (1,), residual=BF16, x_bias=BF16)), "bwd", 64)
    columns = rmsnorm_triton.plan(p)[1]
    types = dict(zip(columns.inputs, triton_compiler.signature(columns, p), strict=False))
    assert types["n"] == "*bf16" and types["product"] == types["average"] == "*fp32"


@pytest.mark.parametrize(("backend", "rows", "call"), ids(QUANT))
def test_quant(backend, rows, call):
    p = call.problem(call.arrays())
    p = replace(p, rows=rows) if call.case.lead == (1,) else p
    launch = (quant_hip if backend == "hip" else quant_triton).plan(p)[0]
    if backend == "hip":
        need_compiler(call.target)
        text = machine_code(launch, p)
        assert_no_spills(text, launch, call.target)
    else:
        text = triton_compiler.compile(launch, p).asm
    count = isa.counts(text, call.target)
    assert count["load16"] and not count["atomics"] and not count["scratch"], count


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_candidates_fit(direction):
    need_compiler("sm_90")
    p = problem(Call(Case(4096, (1,), residual=BF16), save=direction == "bwd"), direction, 8192)
    plans = rmsnorm_hip.candidates(p)
    assert plans[0] == rmsnorm_hip.plan(p) and len(plans) > 4
    assert all(
        launch.shared <= shared_memory("sm_90") and 0 < launch.threads <= 1024 for plan in plans for launch in plan
    )
    hip.compile(plans[len(plans) // 2][0], p)


def test_vectors_of_none_are_not_read():
    """No weight, no bias, no sums: nothing but rows in and out."""
    need_compiler("sm_90")
    p = problem(Call(Case(4096, (1,), weight=NONE, bias=NONE), save=False), "fwd", 8192)
    text = machine_code(rmsnorm_hip.plan(p)[0], p)
    count = isa.counts(text, "sm_90")
    regs = dict(rmsnorm_hip.plan(p)[0].constants)["JN_REGS"]
    assert count["load16"] == 2 * regs and count["load8"] == 1  # the row, and once more if it must be summed again
