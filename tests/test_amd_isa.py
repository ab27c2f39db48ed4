"""The machine-code report: its reading of assembly, its page, and that no kernel got worse than the committed baseline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import needs
import pytest

from jaxnorm._aot import bundle, isa
from jaxnorm._compile import hip

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import make_isa_report as report

BASE = json.loads(report.BASELINE.read_text())
QUICK = ("rmsnorm 8192x4096 | hip", "rmsnorm 8192x4096 | triton", "add_rmsnorm_quant 8192x8192 fp8 | hip")


def compare(prefix: str, targets: tuple[str, ...]) -> None:
    here = report.compilers()
    name, backend = prefix.split(" | ")
    needs.need(
        "clang", hip.find("gfx942") is not None, f"set {hip.CLANG_VARIABLE}; python tools/rocm_clang.py DIR makes one"
    )
    if here[backend] != BASE["compilers"][backend]:
        pytest.skip(f"the baseline is of {BASE['compilers'][backend]}, here is {here[backend]}")
    (subject,) = [s for s in report.SUBJECTS if s.name == name]
    worse = []
    for target in targets:
        found = list(report.launches(subject, target, backend))
        assert found, f"{prefix}: {target}: nothing is launched"
        for i, (problem, launch) in enumerate(found):
            old = BASE["kernels"][f"{prefix} | {i}"][target]
            new = json.loads(json.dumps(report.measure(problem, launch, backend)))
            worse += [f"{prefix} {target}: {text}" for text in report.regressions(old, new)]
    assert not worse, "\n".join(worse) + "\nIf it is meant: python tools/make_isa_report.py"


@pytest.mark.compile
@pytest.mark.parametrize("prefix", QUICK)
def test_no_kernel_got_worse(prefix: str) -> None:
    compare(prefix, ("gfx942", "gfx950"))


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("prefix", [f"{s.name} | {b}" for s in report.SUBJECTS for b in s.backends])
def test_none_of_all_kernels_got_worse(prefix: str) -> None:
    (subject,) = [s for s in report.SUBJECTS if prefix.startswith(f"{s.name} | ")]
    compare(prefix, subject.targets)


def test_the_page_shows_the_baseline() -> None:
    assert report.PAGE.read_text() == report.render(BASE), "python tools/make_isa_report.py --render"


def test_the_baseline_has_every_kernel_of_the_report() -> None:
    listed = {key.rsplit(" | ", 1)[0] for key in BASE["kernels"]}
    assert listed == {f"{s.name} | {b}" for s in report.SUBJECTS for b in s.backends}
    targets = {f"{s.name} | {b}": set(s.targets) for s in report.SUBJECTS for b in s.backends}
    assert all(set(found) == targets[key.rsplit(" | ", 1)[0]] for key, found in BASE["kernels"].items())


def test_the_report_has_every_kernel() -> None:
    """Of gfx942, the target of most plans."""
    found = {
        launch.kernel for s in report.SUBJECTS for b in s.backends for _, launch in report.launches(s, "gfx942", b)
    }
    assert found == {name for name, kernel in bundle.KERNELS.items() if not kernel.clusters}


def test_the_baseline_is_clean() -> None:
    """What must not be made a baseline: scratch, spills, bulk accesses of less than 16 bytes alone."""
    for key, targets in BASE["kernels"].items():
        for target, f in targets.items():
            assert f["scratch"] == f["spills"] == 0, (key, target)
            # What puts statistics of parts together reads few bytes; a shuffled page has the tokens of a value side by side.
            assert "16" in f["loads"] or "combine" in f["kernel"] or "gather" in f["kernel"], (key, target)


GOOD = {"scratch": 0, "spills": 0, "barriers": 1, "occupancy": 8, "loads": {"16": 4, "4": 1}, "stores": {"16": 2}}
WORSE = [
    ({"scratch": 4}, "scratch: 0 -> 4"),
    ({"spills": 1}, "spills: 0 -> 1"),
    ({"barriers": 2}, "barriers: 1 -> 2"),
    ({"occupancy": 7}, "occupancy: 8 -> 7"),
    ({"loads": {"8": 8, "4": 1}}, "by width"),
    ({"loads": {"16": 4, "2": 1}}, "accesses of 2 bytes"),
    ({"stores": {"8": 4}}, "accesses of 8 bytes"),
]


@pytest.mark.parametrize(("change", "words"), WORSE)
def test_a_regression_is_seen(change: dict, words: str) -> None:
    assert any(words in text for text in report.regressions(GOOD, GOOD | change))


def test_the_baseline_is_written_as_it_is_read() -> None:
    assert report.BASELINE.read_text() == report.dump(BASE)


def test_an_improvement_is_none() -> None:
    assert (
        report.regressions(GOOD, GOOD | {"occupancy": 9, "barriers": 0, "loads": {"16": 3}, "stores": {"16": 3}}) == []
    )


def test_occupancy_by_registers_and_lds() -> None:
    """CDNA: 512 registers in steps of 8, at most 8 waves; RDNA3: 1536 in steps of 24, at most 16."""
    for target, vgpr, expected in (("gfx942", 64, 8), ("gfx942", 65, 7), ("gfx942", 128, 4), ("gfx942", 129, 3), ("gfx90a", 512, 1),
                                   ("gfx1100", 96, 16), ("gfx1100", 97, 12), ("gfx1100", 256, 5)):  # fmt: skip
        assert isa.occupancy(target, vgpr, 32, 0, 256) == expected, (target, vgpr)
    assert isa.occupancy("gfx942", 32, 101, 0, 256) == 7
    assert isa.occupancy("gfx942", 32, 32, 32 << 10, 512) == 4, "two workgroups of 8 waves on four SIMDs"
    assert isa.occupancy("gfx950", 32, 32, 32 << 10, 512) == 8, "160 KiB there"
    assert isa.occupancy("gfx1100", 32, 32, 64 << 10, 256) == 4


ASM = """
kernel:
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\ts_waitcnt vmcnt(0)
\tv_add_f32_dpp v1, v0, v0 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf
\tv_pk_mul_f32 v[0:1], v[0:1], v[2:3]
\tv_cvt_f32_f16_e32 v0, v1
\tv_cvt_f32_f16_sdwa v0, v1
\tds_write_b32 v0, v1
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v4, v0, s[0:1]
\ts_cbranch_scc1 .LBB0_2
.LBB0_2:
\ts_endpgm
.amdgpu_metadata
"""


def test_reading_assembly() -> None:
    found = isa.counts(ASM)
    assert (found["load16"], found["store2"], found["store16"]) == (1, 1, 0)
    assert isa.conversions(ASM) == {"v_cvt_f32_f16": 2}
    assert isa.instructions(ASM) == {"valu": 4, "packed": 1, "dpp": 1, "lds_ops": 1, "waits": 1, "loops": 1}
