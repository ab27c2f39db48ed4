"""Kernel cases: what they expect, against the kernels on the CPU; how run_case.py compares, and what it asks of a driver."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import needs
import numpy as np
import pytest

from jaxnorm import _stage
from jaxnorm._aot import bundle, directory, families, families_ranks, instances, oracle, release, spec
from jaxnorm._aot.instances import Instance
from jaxnorm._compile import hip

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import kernel_case  # noqa: E402
import run_case  # noqa: E402


def everything(backend: str, target: str) -> list[Instance]:
    """The code objects of a release bundle, but those of several ranks (test_aot_ranks.py)."""
    found: dict[str, Instance] = {}
    for call in release.calls():
        if call.backend == backend and not call.ranks:
            for stage in instances.stages(call, target, compilers=False):
                found |= instances.instances(stage, call.counts)
    return list(found.values())


def one_each(found: list[Instance]) -> list[Instance]:
    """One code object of each kernel: of the longest row below 1100, of an image that is quick to emulate."""
    best: dict[str, Instance] = {}

    def order(i: Instance) -> tuple:
        large = math.prod(i.problem.shapes[0][1]) > 40000 and bundle.KERNELS[i.launch.kernel].as_planned
        return large, i.problem.features > 1100, -i.problem.features

    for i in sorted(found, key=order):
        best.setdefault(i.launch.kernel, i)
    return list(best.values())


def is_large(i: Instance) -> bool:
    """Slow to interpret."""
    return i.problem.features > 4096 or math.prod(i.problem.shapes[0][1]) > 200_000


def differences(case: families.Case, got: dict[str, np.ndarray]) -> list[str]:
    """What run_case would say about these outputs."""
    wrong = []
    for name, out in case.outputs.items():
        want = bundle._stored(out.values)
        bits = np.ascontiguousarray(got[name]).view(want.dtype).reshape(want.shape)
        argument = {"dtype": out.values.dtype.name} | ({"compare": out.compare} if out.compare else {})
        skip = np.zeros(want.shape, bool) if out.ignore is None else out.ignore
        if out.written is not None:  # the emulators give a fresh buffer: what is not written is its fill
            assert len(np.unique(bits[~out.written].view(np.uint8))) == 1, f"{name}: written where it must not be"
            skip = skip | ~out.written
        outcome = kernel_case.compare(bits, want, argument, skip)
        wrong += [f"{case.launch.kernel} {case.problem.dtypes} {name}: {outcome.text}"] if outcome.bad else []
    return wrong


def with_temps(case: families.Case) -> tuple:
    """(problem that knows the scratch inputs, operands)"""
    operands = {n: np.atleast_1d(a) for n, a in case.inputs.items()}
    extra = [n for n in operands if not case.problem.has(n)]
    shapes = dict(case.problem.shapes) | {n: a.shape for n, a in operands.items()}
    dtypes = (*case.problem.dtypes, *((n, "float32") for n in extra))
    return replace(case.problem, shapes=tuple(shapes.items()), dtypes=dtypes), operands


def check_hip(found: list[Instance], target: str) -> None:
    import simt_build

    needs.need("gxx", not simt_build.missing(), simt_build.missing())
    cases = [bundle.case(i) for i in found]
    wrong = []
    for file in sorted({c.launch.kernel.split(":")[0] for c in cases}):  # headers of two do not go together
        mine = [c for c in cases if c.launch.kernel.startswith(file)]
        kernels = simt_build.Kernels([(target, (c.launch,)) for c in mine])
        for case in mine:
            problem, operands = with_temps(case)
            launch = replace(case.launch, aliases=())
            wrong += differences(case, kernels.run(problem, (launch,), operands))
    assert wrong == []


def check_triton(found: list[Instance]) -> None:
    pytest.importorskip("triton", reason="needs triton: not installed")
    import interpreter

    wrong = []
    for case in map(bundle.case, found):
        problem, operands = with_temps(case)
        wrong += differences(case, interpreter.run((case.launch,), problem, operands))
    assert wrong == []


def test_every_kernel_of_the_hip_plans_agrees_with_its_case() -> None:
    found = [i for i in one_each(everything("hip", "gfx942")) if i.problem.features <= 4096]
    assert {i.launch.kernel for i in found} >= {"rmsnorm.hip:rmsnorm_fwd", "rmsnorm.hip:rmsnorm_bwd"}
    check_hip(found, "gfx942")


def test_the_kernels_of_clusters_agree_with_their_cases() -> None:
    found = one_each([i for i in everything("hip", "sm_90") if bundle.KERNELS[i.launch.kernel].clusters])
    assert {i.launch.kernel for i in found} >= {
        "groupnorm.hip:groupnorm_cluster",
        "groupnorm.hip:groupnorm_bwd_cluster",
    }
    check_hip(found, "sm_90")


@pytest.mark.parametrize(("channels", "images", "waves"), [(16, 160, 1), (16, 320, 2)])
def test_blocks_that_meet_agree_with_their_case(channels: int, images: int, waves: int) -> None:
    """Planned for so many images that teams of blocks hold them all; the case has one to each team of a block."""
    args = {"x": f"bfloat16[..., 64, 64, {channels}]", "weight": None, "bias": None}
    options = {"num_groups": 2, "channel_axis": -1, "activation": "silu" if waves == 1 else None}
    (call,) = spec.parse([{"op": "groupnorm", "args": args, "options": options, "backend": "hip", "rows": [images]}])
    (stage,) = instances.stages(call, "sm_90", compilers=False)
    (held,) = (i for i in instances.instances(stage, [images]).values() if i.launch.kernel.endswith("_held"))
    case = bundle.case(held)
    assert 1 < case.launch.meeting <= 16 and case.problem.rows == case.constant("JN_WAVES") == waves
    assert not case.outputs["words"].values.any()
    check_hip([held], "sm_90")


def test_blocks_that_meet_on_the_way_back_agree_with_their_case() -> None:
    args = {"x": "bfloat16[..., 64, 64, 16]", "weight": "bfloat16[16]", "bias": None}
    call = {"op": "groupnorm", "args": args, "options": {"num_groups": 2, "channel_axis": -1}, "backend": "hip"}
    stage = instances.stages(*spec.parse([call | {"grad": True, "rows": [160]}]), "sm_90", compilers=False)[-1]
    (held,) = (i for i in instances.instances(stage, [160]).values() if i.launch.kernel.endswith("_bwd_held"))
    case = bundle.case(held)
    assert case.launch.meeting == 8 and case.problem.rows == 1
    assert not case.outputs["words"].values.any()
    check_hip([held], "sm_90")


def test_every_kernel_of_the_triton_plans_agrees_with_its_case() -> None:
    found = [i for i in one_each(everything("triton", "sm_90")) if not is_large(i)]
    assert {i.launch.kernel for i in found} >= {"rmsnorm:rmsnorm_fwd", "rmsnorm:rmsnorm_bwd", "quant:quant_fwd"}
    check_triton(found)


@pytest.mark.slow
def test_kernels_of_long_rows_and_large_images_agree_with_their_cases() -> None:
    check_hip([i for i in one_each(everything("hip", "gfx942")) if i.problem.features > 4096], "gfx942")
    check_triton([i for i in one_each(everything("triton", "sm_90")) if is_large(i)])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
def test_all_hip_cases_on_the_cpu(target: str) -> None:
    check_hip(everything("hip", target), target)


def test_the_bundle_covers_every_op_dtype_and_quantisation() -> None:
    """Also that every kernel has an entry: bundle.case raises without one."""
    for backend in ("hip", "triton"):
        found = everything(backend, "gfx942")
        hip_only = {k for k, kernel in bundle.KERNELS.items() if ".hip:" in k and not kernel.clusters}
        hip_only -= {families_ranks.KERNEL}  # that in test_aot_ranks.py
        known = hip_only if backend == "hip" else {k for k in bundle.KERNELS if ".hip:" not in k}
        assert {i.launch.kernel for i in found} == known
        stages = {i.problem.stage for i in found}
        # Every stage with kernels, but those of several GPUs at once, which one launch does not show.
        plans = {name for name, stage in _stage.STAGES.items() if backend in stage.plans}
        assert plans - stages <= {n for n in plans if "reduce" in n}, plans - stages
        for stage in ("rmsnorm_fwd", "rmsnorm_quant_fwd"):
            assert {i.problem.dtype("x") for i in found if i.problem.stage == stage} == {
                "bfloat16",
                "float16",
                "float32",
            }
        kinds = {dict(i.problem.options)["spec"].dtype for i in found if "quant" in i.problem.stage}
        assert kinds == set(oracle.TOP)
        assert any(i.problem.features == 769 for i in found)


def test_a_wrong_grid_entry_is_noticed() -> None:
    """Rows a block that do not reproduce the plan's own grid: the entry of the kernel is wrong."""
    (call,) = spec.parse([{"op": "rmsnorm", "args": {"x": "bfloat16[..., 128]", "weight": None}, "backend": "hip"}])
    (stage,) = instances.stages(call, "gfx942", compilers=False)
    instance = next(iter(instances.instances(stage, [8192]).values()))
    kernel = replace(families.KERNELS[instance.launch.kernel], block_rows=lambda constants: 1)
    with pytest.raises(AssertionError, match="grid"):
        bundle.resized(instance, kernel, stage.problem(5))


# The oracle of the package against that of the tests


def test_the_two_oracles_agree() -> None:
    import oracle as other  # tests/oracle.py
    import oracle_quant

    from jaxnorm._types import QuantSpec

    g = np.random.default_rng(3)
    values = np.concatenate([g.standard_normal(4000) * 10.0 ** g.integers(-42, 38, 4000), [0.0, -0.0, np.inf, np.nan]])
    for name in ("bfloat16", "float16", "float32"):
        mine, theirs = oracle.rounded(values, name), other.round_to(values, name)
        assert (np.isnan(mine) == np.isnan(theirs)).all() and (mine[:-1] == theirs[:-1]).all(), name
    x, w = oracle.rounded(g.standard_normal((5, 96)), "bfloat16"), oracle.rounded(g.uniform(0.5, 1.5, 96), "float32")
    _, rstd = oracle.statistics(oracle.f64(x), 1e-6, centred=False)
    mine = oracle.affine(oracle.f64(x) * rstd, w, None, 1.0, "bfloat16")
    np.testing.assert_allclose(mine, other.rmsnorm(x, w, weight_offset=1.0, cast="before_weight").y, rtol=1e-14)
    z = g.standard_normal((6, 256)) * 10.0 ** g.integers(-30, 30, (6, 1))
    z[1], z[2, 7] = 0.0, np.nan
    for name in oracle.TOP:
        specs = [QuantSpec(name, 32, "e8m0", e8m0_rounding=r) for r in ("up", "down", "even")] if name != "int8" else []
        specs += [QuantSpec(name, g_) for g_ in (None, 64)] + [QuantSpec(name, scale_ub=2.0)] if name != "fp4" else []
        for s in specs:
            mine, theirs = oracle.quantise(z, s), oracle_quant.quantize(z, s, name)
            assert (mine.undefined == theirs.undefined).all()
            assert (mine.codes == theirs.codes)[~mine.undefined].all(), s
            want = theirs.scale.astype(np.float32) if s.scale_dtype == "float32" else theirs.scale
            assert ((mine.scale == want) | np.isnan(np.where(mine.scale == 255, 0, want))).all(), s
    for name in set(oracle.TOP) - {"int8"}:  # every code, and every middle between two, where ties go to the even code
        values = oracle_quant.magnitudes(name)
        ties = np.concatenate([values, (values[1:] + values[:-1]) / 2])
        both = np.concatenate([ties, -ties])
        assert (oracle.codes(both, name) == oracle_quant.encode(both, name)).all(), name
        assert (oracle.decoded(oracle.codes(values, name), name) == values).all(), name
    for layout in ("row", "column", "shuffled"):
        scale = g.integers(0, 255, (300, 12)).astype(np.uint8)
        at, shape = oracle_quant.positions(layout, 300, 12)
        assert (oracle.laid_out(scale, layout, shape).reshape(-1)[at] == scale).all(), layout


# Comparison


def bits(values, dtype: str) -> np.ndarray:
    return bundle._stored(oracle.rounded(np.asarray(values, np.float64), dtype))


BF = {"dtype": "bfloat16"}
E4, E4Z, E5 = ({"dtype": f"float8_{n}"} for n in ("e4m3fn", "e4m3fnuz", "e5m2"))
u8 = lambda *v: np.array(v, np.uint8)  # noqa: E731
RULES = [
    # argument, got, want, elements that differ
    (BF, bits([1.0, 0.0], "bfloat16"), bits([1.0, -0.0], "bfloat16"), 0),
    (BF, bits([1.0], "bfloat16") + np.uint16(1), bits([1.0], "bfloat16"), 0),
    (BF, bits([1.0], "bfloat16") + np.uint16(2), bits([1.0], "bfloat16"), 1),
    (BF, bits([np.nan, np.inf], "bfloat16"), bits([np.nan, np.inf], "bfloat16"), 0),
    (BF, bits([np.nan, -np.inf], "bfloat16"), bits([1.0, np.inf], "bfloat16"), 2),
    (BF | {"compare": {"mode": "ulp", "max": 0}}, bits([1.0], "bfloat16") + np.uint16(1), bits([1.0], "bfloat16"), 1),
    (BF | {"compare": {"mode": "bitwise"}}, bits([0.0], "bfloat16"), bits([-0.0], "bfloat16"), 1),
    (BF | {"compare": {"mode": "close", "rtol": 0.01}}, bits([1.0], "bfloat16") + np.uint16(1), bits([1.0], "bfloat16"), 0),
    ({"dtype": "float32"}, np.float32([1.000009, 5e-7]), np.float32([1.0, 0.0]), 0),
    ({"dtype": "float32"}, np.float32([1.00002, np.nan, np.inf]), np.float32([1.0, 0.0, np.inf]), 2),
    ({"dtype": "float16"}, np.float16([2.0]), np.float16([2.0]), 0),
    ({"dtype": "int8"}, np.int8([5, 0, 0]), np.int8([4, 0, 0]), 0),  # one element is always allowed
    ({"dtype": "int8"}, np.int8([5, 1, 0]), np.int8([4, 0, 0]), 2),
    ({"dtype": "int8"}, np.int8([6, 0, 0]), np.int8([4, 0, 0]), 1),
    ({"dtype": "int8"}, np.int8([1] + [0] * 1999), np.zeros(2000, np.int8), 0),
    ({"dtype": "int8"}, np.int8([1] * 3 + [0] * 1997), np.zeros(2000, np.int8), 3),
    (E4, u8(0x00, 0x38), u8(0x80, 0x38), 0),
    (E4, u8(0x01, 0x38), u8(0x80, 0x38), 0),
    (E4, u8(0x7F, 0x38), u8(0xFF, 0x38), 0),  # both NaN
    (E4, u8(0x7E), u8(0x7F), 1),
    (E4Z, u8(0x80), u8(0x00), 1),  # NaN of fnuz, which has no negative zero
    (E5, u8(0x7C), u8(0x7B), 1),  # infinity
    ({"dtype": "uint8"}, u8(3), u8(4), 1),
    ({"dtype": "uint8", "compare": {"mode": "codes4", "max_diff": 1, "max_fraction": 0.001}}, u8(0x12, 0), u8(0x11, 0), 0),
    ({"dtype": "uint8", "compare": {"mode": "codes4", "max_diff": 1, "max_fraction": 0.001}}, u8(0x18, 0), u8(0x10, 0), 0),
    ({"dtype": "uint8", "compare": {"mode": "codes4", "max_diff": 1, "max_fraction": 0.001}}, u8(0x13, 0), u8(0x11, 0), 1),
    ({"dtype": "int32"}, np.int32([7]), np.int32([7]), 0),
    ({"dtype": "int64"}, np.int64([-7]), np.int64([7]), 1),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "got", "want", "bad"), RULES, ids=[str(i) for i in range(len(RULES))])
def test_rules_of_comparison(argument, got, want, bad) -> None:
    outcome = kernel_case.compare(got, want, argument)
    assert outcome.bad == bad, outcome
    assert kernel_case.compare(got, want, argument, np.ones(want.shape, bool)).bad == 0, "nothing is compared"
    assert bad == 0 or "first at" in outcome.text


def test_an_array_without_dims_stays_one(tmp_path: Path) -> None:
    argument = {"kind": "in", "dtype": "float32", "shape": [], "data": "scale"}
    (tmp_path / "a.json").write_text(json.dumps({"format": kernel_case.FORMAT, "args": [argument]}))
    np.savez(tmp_path / "a.npz", scale=np.float32(2))
    assert kernel_case.load(tmp_path / "a.json")[1]["scale"].shape == ()


def test_masks_and_guards() -> None:
    argument = {
        "kind": "inout",
        "dtype": "int32",
        "shape": [4],
        "data": "a",
        "expect": "e",
        "written": "w",
        "ignore": "i",
    }
    arrays = {"a": np.arange(4, dtype=np.int32), "e": np.int32([9, 9, 9, 9]), "w": np.array([1, 1, 1, 0], bool),
              "i": np.array([0, 1, 0, 0], bool)}  # fmt: skip

    def after(values, beyond: bool = False) -> list[str]:
        buffer = run_case.make_buffer(argument, arrays)
        host = buffer.host.copy()
        host[buffer.inside] = np.int32(values).view(np.uint8)
        if beyond:
            host[buffer.start + buffer.size] = 0
        return run_case.differences(buffer, host, arrays)

    assert after([9, 5, 9, 3]) == []
    assert "1 of 2 elements differ" in after([8, 5, 9, 3])[0]
    assert "must stay" in after([9, 5, 9, 4])[0]
    assert "0 past the end" in after([9, 5, 9, 3], beyond=True)[0]


# The driver

PROGRAM = """
import ctypes, json, sys
sys.path.insert(0, {tools!r})
import run_case
fake = ctypes.CDLL({soname!r})
alive = (ctypes.c_int * 2)()
out = []
for name, call, status in json.loads(sys.argv[1]):
    if call == "devices":
        fake.fake_set_devices(status)
    elif call:
        fake.fake_fail(call.encode(), status)
    code = run_case.main([{folder!r}, "--only", name])
    fake.fake_alive(alive)
    out.append([code, *alive, fake.fake_together()])
print(json.dumps(out))
"""


def write_case(
    folder: Path, name: str, kernel: str = "copy", target: str = "", image: bytes = b"\x7fELF", **more
) -> None:
    x = np.arange(6, dtype=np.float32)
    want = x + 1 if name == "wrong" else x
    args = [{"name": "x", "kind": "in", "dtype": "float32", "shape": [6], "data": "x", "offset": 4},
            {"name": "y", "kind": "out", "dtype": "float32", "shape": [6], "expect": "y", "align": 64},
            {"name": "bytes", "kind": "scalar", "dtype": "int32", "value": "0x18"}]  # fmt: skip
    (folder / "code.bin").write_bytes(b"\x7fELF")
    (folder / "bad.bin").write_bytes(b"nothing")
    head = {"format": "kernel-case/1", "kernel": kernel, "code_object": "code.bin" if image[:1] == b"\x7f" else "bad.bin",
            "target": target, "grid": [2, 1, 1], "block": [64, 1, 1], "args": args}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(head | more))
    np.savez(folder / f"{name}.npz", x=x, y=want)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory) -> Path:
    needs.need("gcc", shutil.which("gcc") is not None, "a C compiler builds the fake driver")
    folder = tmp_path_factory.mktemp("fakes")
    for name, macro in (("libamdhip64.so.7", []), ("libcuda.so.1", ["-DFAKE_CUDA"])):
        (folder / name[:6]).mkdir()
        source = ROOT / "tests" / "launcher" / "fake_driver.c"
        command = [
            "gcc",
            "-O1",
            "-fPIC",
            "-shared",
            *macro,
            f"-Wl,-soname,{name}",
            str(source),
            "-o",
            str(folder / name[:6] / name),
        ]
        subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize(("soname", "target"), [("libcuda.so.1", "sm_90"), ("libamdhip64.so.7", "gfx942")])
def test_what_a_driver_is_asked(fakes: Path, tmp_path: Path, soname: str, target: str) -> None:
    """Over the recording fake: results, exit codes, and nothing left allocated or loaded, whatever fails."""
    write_case(tmp_path, "good", target=target)
    write_case(tmp_path, "wrong", target=target)
    write_case(tmp_path, "overrun", "overrun", target=target)
    write_case(tmp_path, "meddle", "meddle", target=target)
    write_case(tmp_path, "absent", "absent", target=target)
    write_case(tmp_path, "large", target=target, shared=60 << 10)
    write_case(tmp_path, "meeting", target=target, together=True)
    write_case(tmp_path, "foreign", target="gfx950")
    write_case(tmp_path, "badimage", target=target, image=b"nothing")
    write_case(tmp_path, "format", target=target, format="kernel-case/0")
    steps = [("good", "", 0), ("wrong", "", 0), ("overrun", "", 0), ("meddle", "", 0), ("absent", "", 0), ("large", "", 0),
             ("foreign", "", 0), ("badimage", "", 0), ("format", "", 0), ("good", "load", 2), ("good", "function", 2),
             ("good", "allocate", 2), ("good", "copy", 2), ("good", "launch", 719), ("good", "wait", 719), ("good", "", 0),
             ("meeting", "", 0), ("good", "devices", 0)]  # fmt: skip
    script = PROGRAM.format(tools=str(ROOT / "tools"), soname=soname, folder=str(tmp_path))
    env = os.environ | {"LD_LIBRARY_PATH": str(fakes / soname[:6])}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(steps)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    codes = [0, 1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2]
    expected = [[code, 0, 0, i >= 16] for i, code in enumerate(codes)]  # one launch of all blocks at the same time
    assert json.loads(last) == expected, done.stdout
    memory = "OutOfMemory (2)" if target[0] == "g" else "OUT_OF_MEMORY (2)"
    for words in ("6 of 6 elements differ", "1 bytes outside of the buffer", "x: an input was written", "(500)", memory,
                  f"{target}: 1 cases agree", "format: got 'kernel-case/0'"):  # fmt: skip
        assert words in done.stdout, words
    assert "NoDevice (100)" in done.stderr or "NO_DEVICE (100)" in done.stderr


def test_no_driver_is_said(tmp_path: Path) -> None:
    write_case(tmp_path, "good", target="sm_90")
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    command = [sys.executable, str(ROOT / "tools" / "run_case.py"), str(tmp_path)]
    for name in ("libcuda.so.1", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"):
        script = f"import ctypes; ctypes.CDLL({name!r})"
        if subprocess.run([sys.executable, "-c", script], env=env, capture_output=True).returncode == 0:
            pytest.skip("this machine has a driver")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU: libcuda.so.1" in done.stderr


# The command


@pytest.mark.compile
def test_a_bundle_for_the_amd_targets(tmp_path: Path, capsys) -> None:
    """A small list of calls for four targets by one command, verified, and found damaged when it is."""
    from jaxnorm import cli

    pytest.importorskip("typer")
    needs.need("clang", hip.find("gfx942") is not None, f"set {hip.CLANG_VARIABLE}")
    calls = [{"op": "rmsnorm_quant", "args": {"x": "bfloat16[..., 512]", "weight": "float32[512]"},
              "options": {"spec": {"dtype": "fp8"}}, "rows": [3]}]  # fmt: skip
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    targets = ("gfx90a", "gfx942", "gfx950", "gfx1100")
    arguments = [part for t in targets for part in ("--target", t)]
    out = tmp_path / "out"
    assert cli.main(["aot", *arguments, "--spec", str(tmp_path / "calls.json"), "--bundle", "--out", str(out)]) == 0
    files = sorted((out / "cases").glob("*.json"))
    heads = [json.loads(f.read_text()) for f in files]
    assert sorted(h["target"] for h in heads) == sorted(targets)
    dtypes = {h["target"]: next(a["dtype"] for a in h["args"] if a["name"] == "values") for h in heads}
    assert dtypes["gfx942"] == "float8_e4m3fnuz" and dtypes["gfx950"] == "float8_e4m3fn"
    for path, head in zip(files, heads, strict=True):
        kernel_case.load(path)
        assert head["op"] == "rmsnorm" and head["params"]["eps"] == 1e-6
        assert head["block"][0] % (32 if head["target"] == "gfx1100" else 64) == 0
    assert directory.check(out) == [] == bundle.check(out)
    capsys.readouterr()
    np.savez(files[0].with_suffix(".npz"), x=np.zeros(3))
    assert cli.main(["aot", "--check", str(out)]) == 1
    assert files[0].name in capsys.readouterr().out
