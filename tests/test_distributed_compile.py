"""Machine code of the fused distributed kernels: memory order between devices, access widths, registers."""

from __future__ import annotations

import re

import pytest
import simt_ranks
from jaxnorm.kernels.configs import distributed_hip
from test_hip_compile import assert_no_spills, machine_code, need_compiler

from jaxnorm import QuantSpec

pytestmark = pytest.mark.compile
FP8 = QuantSpec("float8_e4m3fn")
CASES = {
    "one shot over 8": {"rows": 16, "ranks": 8, "schedule": "one-shot", "spec": FP8},
    "two shots over 2": {"rows": 8192, "ranks": 2, "schedule": "two-shot", "spec": FP8},
    "two shots over 4": {"rows": 8192, "ranks": 4, "schedule": "two-shot", "spec": FP8},
    "allreduce over 4": {"rows": 1024, "ranks": 4, "schedule": "two-shot", "replicated": True, "residual": "bfloat16"},
}


def code(target: str, name: str) -> tuple[str, object]:
    need_compiler(target)
    options = dict(CASES[name])
    dtypes = {"x": "bfloat16", "weight": "bfloat16"}
    if residual := options.pop("residual", None):
        dtypes["residual"] = residual
    p = simt_ranks.problem(target, options.pop("rows"), 8192, dtypes, **options)
    (launch,) = distributed_hip.plan(p)
    return machine_code(launch, p), launch


@pytest.mark.parametrize(("target", "name"), [("gfx942", "one shot over 8"), ("gfx942", "two shots over 2"),
                                              ("gfx950", "allreduce over 4")])  # fmt: skip
def test_amd(target, name):
    """Data reaches the other devices before the flag does, and nothing stale is read behind a flag that was seen."""
    text, launch = code(target, name)
    assert_no_spills(text, launch, target)
    exchanges = 1 if "one shot" in name else 2
    lines = [line.strip() for line in text.splitlines()]
    flags = [i for i, line in enumerate(lines) if re.match(r"global_store_dwordx2 .*sc0 sc1", line)]
    assert len(flags) == exchanges, "one release store of a flag for each exchange"
    for at in flags:
        before = [
            line for line in lines[:at] if line.startswith(("buffer_wbl2", "s_waitcnt", "global_store", "s_barrier"))
        ]
        assert any(line.startswith("buffer_wbl2 sc0 sc1") for line in before[-4:]), before[-6:]
        assert before[-1].startswith("s_waitcnt") and "vmcnt(0)" in before[-1], before[-6:]
    assert sum(line.startswith("buffer_inv sc0 sc1") for line in lines) >= exchanges
    assert re.search(r"s_memrealtime", text)
    wide = len(re.findall(r"global_(?:load|store)_dwordx4", text))
    assert wide >= 8, wide


@pytest.mark.parametrize("name", CASES)
def test_sm_90(name):
    """Release and acquire at the scope of the system, no multicast of NVLink, no memory of a thread's own."""
    text, launch = code("sm_90", name)
    assert_no_spills(text, launch, "sm_90")
    exchanges = 1 if "one shot" in name else 2
    assert len(re.findall(r"MEMBAR\.\w+\.SYS", text)) >= exchanges
    assert len(re.findall(r"ST\w*\.E\.64\.STRONG\.SYS", text)) == exchanges
    assert len(re.findall(r"LD\w*\.E\.64\.STRONG\.SYS", text)) >= 2 * exchanges
    assert len(re.findall(r"CCTL\.IVALL", text)) >= exchanges
    assert not re.search(r"MULTIMEM|UBLKRED|LDGMC|REDG?MC", text, re.IGNORECASE)
    assert len(re.findall(r"STG?\.E\.(?:[A-Z.]*\.)?128", text)) >= 1
