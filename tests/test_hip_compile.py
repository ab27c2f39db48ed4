"""Machine code of the HIP kernels for four AMD targets and sm_90: that it exists, and what is in it.

AMD: the clang that JAXNORM_HIP_CLANG names (``python tools/rocm_clang.py DIR`` makes one from PyPI). NVIDIA: NVRTC. What is
compiled is what a plan asks for. None of this runs anything.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import cases
import isa
import needs
import pytest
from jaxnorm.kernels.configs import ITEMSIZE, Launch, Problem, rmsnorm_hip, shared_memory, wave_size
from test_hip_simt import BEFORE, GEMMA, ROUNDED, Case

from jaxnorm._compile import hip
from jaxnorm.errors import CompileError

BF16, F16, F32 = cases.FLOATS
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")
TARGETS = (*AMD, "sm_90")
pytestmark = pytest.mark.compile


@functools.cache
def clang() -> str | None:
    path = os.environ.get(hip.CLANG_VARIABLE)
    return path if path and os.path.exists(path) else None


def need_compiler(target: str) -> None:
    if target.startswith("gfx"):
        needs.need(
            "clang", clang() is not None, f"set {hip.CLANG_VARIABLE}; python tools/rocm_clang.py DIR makes a clang"
        )
        return
    usable, reason, remedy = hip.available(target)
    needs.need("nvrtc", usable, f"{reason} {remedy}")
    needs.need("triton", isa.nvidia_tool("cuobjdump") is not None, "cuobjdump of the triton wheel. pip install triton")


def machine_code(launch: Launch, problem: Problem) -> str:
    """AMD assembly or SASS, kept between runs by a digest of all that went in."""
    target = problem.target
    parts = [
        target,
        launch.kernel,
        *hip.macros(launch, target),
        *hip._sources(launch.kernel.split(":")[0]),
        str(clang()),
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("JAXNORM_TEST_BUILD_DIR", Path(tempfile.gettempdir()) / f"jaxnorm-code-{os.getuid()}"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{key}.s"
    if not path.exists():
        if target.startswith("gfx"):
            text = hip.assembly(launch, problem, clang=clang())
        else:
            cubin = folder / f"{key}.cubin"
            cubin.write_bytes(hip.compile(launch, problem).image)
            text = isa.sass(cubin)
            cubin.unlink()
        path.write_text(text)
    return path.read_text()


def assert_no_spills(text: str, launch: Launch, target: str) -> None:
    entry = launch.kernel.split(":")[1]
    if target.startswith("gfx"):
        stats = isa.stats_amd(text)
        assert list(stats) == [entry]
        kernel = stats[entry]
        assert kernel["scratch"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["wave"] == wave_size(target)
        assert kernel["lds"] == 0, "shared memory is dynamic only, so that the launch knows all of it"
    assert isa.counts(text, target)["scratch"] == 0, "spills"


def assert_wide(text: str, target: str, narrow_loads: bool, narrow_stores: bool) -> None:
    """Rows move in accesses of 16 bytes; 4 bytes where a row has a scalar (rstd, dot); nothing else."""
    count = isa.counts(text, target)
    assert count["load16"] and count["store16"], count
    others = {k: n for k, n in count.items() if k[:4] in ("load", "stor") and n and k not in ("load16", "store16")}
    allowed = {"load4"} if narrow_loads else set()
    allowed |= {"store4"} if narrow_stores else set()
    assert set(others) <= allowed, others


def check(launch: Launch, problem: Problem) -> None:
    text, target = machine_code(launch, problem), problem.target
    assert_no_spills(text, launch, target)
    assert launch.shared <= shared_memory(target)
    assert launch.threads <= 1024 and launch.threads % wave_size(target) == 0
    assert isa.counts(text, target)["atomics"] == 0, "a float atomic: the result would depend on the order of blocks"
    entry = launch.kernel.split(":")[1]
    narrowest = min(ITEMSIZE[d] for n, d in problem.dtypes if n not in ("rstd", "dweight"))
    if rmsnorm_hip.vector(problem) * narrowest == 16 and entry in ("rmsnorm_fwd", "rmsnorm_bwd"):
        assert_wide(text, target, narrow_loads=entry == "rmsnorm_bwd", narrow_stores=entry == "rmsnorm_fwd")


def pairwise(**axes: tuple) -> list[dict]:
    """Combinations in which every two values of every two axes meet (greedy, always the same)."""
    everything = list(itertools.product(*(range(len(values)) for values in axes.values())))

    def pairs(chosen: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(chosen), 2))

    missing = set().union(*map(pairs, everything))
    found = []
    while missing:
        best = max(everything, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        found.append({name: values[k] for (name, values), k in zip(axes.items(), best, strict=True)})
    return found


def storage_cases() -> list[tuple[str, Case]]:
    """Every way of keeping a row, on every target, with the dtypes that matter most."""
    forward = [Case(128, rows=1 << 18), Case(128, rows=1), Case(1024, rows=8192), Case(4096, rows=16),
               Case(4096, rows=8192, weight=F32, options=GEMMA), Case(65536, rows=4096, residual=BF16),
               Case(131072, rows=1024)]  # fmt: skip
    backward = [Case(128, rows=1 << 18), Case(1024, rows=8192), Case(8192, rows=8192), Case(65536, rows=512)]
    return [("fwd", c) for c in forward] + [("bwd", c) for c in backward]


def option_cases() -> list[tuple[str, Case]]:
    """Dtypes and options pairwise, each on one target in turn."""
    rows = pairwise(
        x=(BF16, F16, F32), residual=(None, BF16, F32), weight=(BF16, F16, F32, None), y=(None, F32, BF16),
        options=({}, BEFORE, ROUNDED), features=(1024, 2880, 8192),
    )  # fmt: skip
    found = []
    for i, row in enumerate(rows):
        pad = 256 if row["features"] == 2880 else 1
        if row["weight"] is None:
            row["options"] = {k: v for k, v in row["options"].items() if k != "weight_offset"}
        case = Case(rows=4096, pad=pad, rstd=i % 3 > 0, target=TARGETS[i % len(TARGETS)], **row)
        found.append(("fwd", case))
        if i % 2:
            found.append(("bwd", case))
    return found


def _id(value) -> str:
    return value if isinstance(value, str) else str(value)


def _compile_all(direction: str, case: Case) -> None:
    need_compiler(case.target)
    problem = case.forward() if direction == "fwd" else case.backward()
    for launch in rmsnorm_hip.plan(problem):
        check(launch, problem)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("direction", "case"), storage_cases(), ids=_id)
def test_storage(direction: str, case: Case, target: str) -> None:
    _compile_all(direction, Case(**{**case.__dict__, "target": target}))


@pytest.mark.parametrize(("direction", "case"), option_cases(), ids=_id)
def test_dtypes_and_options(direction: str, case: Case) -> None:
    _compile_all(direction, case)


@pytest.mark.parametrize("target", TARGETS)
def test_odd_rows_use_narrow_accesses(target: str) -> None:
    """A row of odd length starts anywhere. Also the negative control of the look at access widths."""
    need_compiler(target)
    problem = Case(769, rows=512, target=target).forward()
    (launch,) = rmsnorm_hip.plan(problem)
    text = machine_code(launch, problem)
    assert_no_spills(text, launch, target)
    count = isa.counts(text, target)
    assert count["load2"] and count["store2"] and not count["load16"] and not count["store16"], count
    with pytest.raises(AssertionError):
        assert_wide(text, target, narrow_loads=True, narrow_stores=True)


def test_a_spill_is_seen() -> None:
    """Negative control: too few registers for the row."""
    need_compiler("sm_90")
    problem = Case(4096, rows=8192).forward()
    launch = rmsnorm_hip._forward_launch(problem, rmsnorm_hip.Forward(64, regs=8, min_blocks=24))
    with pytest.raises(AssertionError, match="spills"):
        assert_no_spills(machine_code(launch, problem), launch, "sm_90")


def test_hardware_bf16() -> None:
    """gfx950 has an instruction for the bf16 rounding, the others do not. Where it takes pairs, what feeds it is packed math."""
    need_compiler("gfx950")
    for target in AMD:
        problem = Case(4096, rows=8192, target=target).forward()
        (launch,) = rmsnorm_hip.plan(problem)
        text = machine_code(launch, problem)
        assert ("v_cvt_pk_bf16_f32" in text) == (target == "gfx950")
        assert (text.count("v_pk_mul_f32") >= 16) == (target != "gfx1100"), "all of the two chunks of eight"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiled_again_has_the_same_bytes(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the sources in another folder, too: a table of tuned plans names the machine code that was measured."""
    need_compiler(target)
    problem = Case(128, rows=8, target=target).forward()
    (launch,) = rmsnorm_hip.plan(problem)
    build = lambda: hip._build(hip.find(target), launch, target, "rmsnorm_fwd", hip.macros(launch, target)).image  # noqa: E731
    first = build()
    other = shutil.copytree(hip.csrc_dir(), tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cc"))
    monkeypatch.setattr(hip, "csrc_dir", lambda: other)
    assert build() == first


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_an_error_names_kernel_options_and_log(target: str) -> None:
    need_compiler(target)
    problem = Case(128, rows=8, target=target).forward()
    (launch,) = rmsnorm_hip.plan(problem)
    broken = replace(
        launch, constants=(*launch.constants[:-1], ("JN_ROUND_RESIDUAL", "no_such_name"), ("JN_X", "NoSuchType"))
    )
    with pytest.raises(CompileError) as raised:
        hip.compile(broken, problem)
    for part in ("rmsnorm.hip:rmsnorm_fwd", "-DJN_N=128", "NoSuchType", "error"):
        assert part in str(raised.value)


def test_missing_compilers_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hip.rtc, "find", lambda api: None)
    monkeypatch.setattr(hip.shutil, "which", lambda name: None)
    monkeypatch.delenv(hip.CLANG_VARIABLE, raising=False)
    for target, name in (("sm_90", "libnvrtc"), ("gfx942", "hipcc"), ("riscv", "riscv")):
        usable, reason, remedy = hip.available(target)
        assert not usable
        assert name in reason
        assert remedy
        problem = Case(128, rows=8, target=target).forward()
        launch = Launch("rmsnorm.hip:rmsnorm_fwd", ("x",), ("y",), (1, 1, 1))
        with pytest.raises(CompileError, match=name):
            hip.compile(launch, problem)


@pytest.mark.parametrize("rows", [1, 1024, 8192])
def test_candidates_compile(rows: int) -> None:
    """A sample of what a benchmark sweeps: all must be compilable and fit."""
    need_compiler("sm_90")
    for problem in (Case(4096, rows=rows, residual=BF16).forward(), Case(4096, rows=rows).backward()):
        plans = rmsnorm_hip.candidates(problem)
        assert plans[0] == rmsnorm_hip.plan(problem)
        for plan in plans:
            assert all(launch.shared <= shared_memory("sm_90") and 0 < launch.threads <= 1024 for launch in plan)
        for plan in plans[1 :: max(1, len(plans) // 2)]:
            hip.compile(plan[0], problem)
