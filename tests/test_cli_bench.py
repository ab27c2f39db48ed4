"""``jaxnorm bench`` and ``jaxnorm cache prewarm`` on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from needs import need

from jaxnorm import cli

for package in ("typer", "rich"):
    pytest.importorskip(package, reason=f"needs cli: {package}")

from jaxnorm._bench import measure, ops, programs, store, timing  # noqa: E402
from jaxnorm._bench.ops import OPS, Case  # noqa: E402


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(store, "source_digest", lambda: "digest")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the command sets a default, which must not stay

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def one_set(monkeypatch):
    """Builds and checks everything, and times nothing."""
    monkeypatch.setattr(timing, "rotation", lambda nbytes: (1, False))

    def no_times(timer, built, nbytes, input_bytes, failed):
        return {p.name: {"median_us": 2.0, "min_us": 2.0, "max_us": 2.0, "n": 20, "kernels": []} for p in built}

    monkeypatch.setattr(timing, "measure", no_times)


SHAPES = {2: (6, 64), 3: (5, 2, 64), 4: (2, 3, 2, 64)}


@pytest.mark.parametrize("name", OPS)
def test_every_op_agrees_with_its_plain_form(name, one_set, monkeypatch):
    monkeypatch.setattr(
        measure, "contestants", list
    )  # ours alone: the plain form in float32 is what it is held against
    op = OPS[name]
    shape = SHAPES[len(op.dims.split("x"))]
    if op.function == "qk_norm_rope":
        shape = (5, 4, 2, 64)
    record = measure.measure(Case(name, shape, "float32", "int8" if op.quantises else ""), ["xla"], timing.WallTimer())
    assert record["contestants"]["xla"].get("right"), record["contestants"]
    assert record["contestants"]["xla"]["distance"] < (0.02 if op.quantises else 1e-5)


def test_a_wrong_result_is_seen(one_set, monkeypatch):
    wrong = dataclasses.replace(OPS["rmsnorm"], call=lambda x, w, backend: 1.02 * x * w)
    monkeypatch.setitem(OPS, "rmsnorm", wrong)
    record = measure.measure(Case("rmsnorm", (6, 64)), ["xla"], timing.WallTimer())
    assert not record["contestants"]["xla"]["right"]
    assert record["contestants"]["plain"]["right"]


def test_bytes_are_each_input_and_output_once():
    def traffic(name, spec=""):
        return measure.traffic(Case(name, (8, 64), "bfloat16", spec))

    x, w = 2 * 8 * 64, 2 * 64
    assert traffic("rmsnorm") == 2 * x + w
    assert traffic("add_rmsnorm") == 4 * x + w
    assert traffic("rmsnorm_quant", "int8") == x + w + x // 2 + 4 * 8
    assert traffic("rmsnorm_bwd") == 3 * x + 2 * w + 4 * 8  # x, dy, dx; weight, dweight; rstd
    assert traffic("add_rmsnorm_bwd") == 4 * x + 2 * w + 4 * 8


def test_the_first_shape_of_every_op_comes_first():
    cases = ops.select(["rmsnorm", "add_rmsnorm"], ["4x64", "8x64"], ["bfloat16"], ["fp8"], False)
    assert [(c.op, c.shape[0]) for c in cases] == [
        ("rmsnorm", 4),
        ("add_rmsnorm", 4),
        ("rmsnorm", 8),
        ("add_rmsnorm", 8),
    ]


def test_a_shape_may_name_its_op():
    cases = ops.select(["rmsnorm", "rmsnorm_bwd", "quantize"], ["rmsnorm:4x64", "8x64"], ["float32"], ["int8"], False)
    assert sorted((c.op, c.shape[0]) for c in cases) == [
        ("quantize", 8), ("rmsnorm", 4), ("rmsnorm", 8), ("rmsnorm_bwd", 4), ("rmsnorm_bwd", 8)
    ]  # fmt: skip


RUN = ("bench", "--ops", "rmsnorm,rmsnorm_quant", "--shapes", "4x64,8x64", "--specs", "int8", "--timer", "wall")


def test_a_run_on_the_cpu(call, tmp_path, monkeypatch):
    out, plot = tmp_path / "new" / "r.json", tmp_path / "r.svg"
    run = (
        "bench",
        "--ops",
        "rmsnorm,rmsnorm_quant",
        "--shapes",
        "4x64",
        "--specs",
        "int8",
        "--timer",
        "wall",
        "--out",
        out,
    )
    code, said, err = call(*run)
    assert code == 0, err
    assert "This is a CPU: the times are wall clock of the xla backend" in said
    assert "% of copy" in said and "plain XLA" in said
    data = json.loads(out.read_text())
    assert set(data["cases"]) == {"rmsnorm 4x64 bfloat16", "rmsnorm_quant 4x64 bfloat16 int8"}
    assert all(r["copy_us"] > 0 and r["contestants"]["xla"]["right"] for r in data["cases"].values())
    assert data["environment"]["device"] and data["environment"]["versions"]["jax"]

    monkeypatch.setattr(measure, "measure", lambda *a: pytest.fail("measured again"))
    assert call(*run)[0] == 0
    need_matplotlib()
    code, said, _ = call("bench", "--from", out, "--plot", plot)
    assert code == 0
    assert "roof: a copy of the same bytes" in plot.read_text() or plot.stat().st_size > 5000
    assert str(plot) in said.replace("\n", "")
    _, said, _ = call("bench", "--from", out, "--ops", "rmsnorm_quant")
    assert "rmsnorm_quant" in said and "rmsnorm " not in said
    assert "expected some of rmsnorm, rmsnorm_quant" in call("bench", "--from", out, "--ops", "rope")[2]


def test_results_of_a_familys_benchmark_can_be_drawn(tmp_path):
    need_matplotlib()
    from benchmarks import plot_family
    from jaxnorm._bench import plot

    environment = {"device": "a card", "versions": {"jax": "1"}, "date": "2026-01-02", "source": "s"}
    times = {
        "copy": {"median_us": 2.0},
        "jaxnorm-hip": {"median_us": 4.0},
        "xla": {"median_us": 8.0},
        "other": {"median_us": 1.0},
    }
    cells = {"rope neox 8x4x64": {"bytes": 8000, "times": times}, "mrope 8x4x64": {"bytes": 1, "times": {}}}
    drawn = plot_family.convert({"environment": environment, "cells": cells, "method": "m"}, ["rope"])
    (record,) = drawn["cases"].values()
    assert (record["op"], record["shape"]) == ("rope neox", ["8x4x64"])
    assert [plot.gigabytes_per_second(record, n) for n in ("hip", "plain", "triton")] == [2.0, 1.0, None]
    plot.save(drawn, tmp_path / "rope.svg")
    assert (tmp_path / "rope.svg").stat().st_size > 5000


def need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        need("matplotlib", False, str(error))


def fake(case: Case, backends, timer, notes=None) -> dict:
    notes = {"xla": {"median_us": 2.0, "right": True, "distance": 0.0}, "plain": {"median_us": 4.0, "right": True}}
    return {"op": case.op, "shape": list(case.shape), "dtype": case.dtype, "spec": case.spec, "bytes": 4000, "copy_us": 1.0,
            "contestants": notes, "timer": "wall", "method": "m", "clocks": {}, "seconds": 0.1}  # fmt: skip


def test_numbers_of_the_table(call, monkeypatch):
    monkeypatch.setattr(measure, "measure", fake)
    _, out, _ = call("bench", "--ops", "rmsnorm", "--shapes", "4x64")
    rows = [line.split() for line in out.splitlines()]
    assert ["xla", "2.0", "2", "50", "0.50"] in rows
    assert ["plain", "XLA", "4.0", "1", "25", "1.00"] in rows


def test_wrong_and_failed_contestants_make_the_exit_code_1(call, monkeypatch, tmp_path):
    def measured(case, backends, timer, notes=None):
        record = fake(case, backends, timer)
        record["contestants"]["xla"] |= {"right": False, "distance": 0.5}
        record["contestants"]["plain"] = {"error": "RuntimeError: boom"}
        return record

    monkeypatch.setattr(measure, "measure", measured)
    code, out, err = call("bench", "--ops", "rmsnorm", "--shapes", "4x64", "--out", tmp_path / "r.json")
    assert code == 1
    assert "xla (WRONG)" in out and "failed" in out
    assert "rmsnorm 4x64 xla: differs from the formula by 0.5" in err and "plain: RuntimeError: boom" in err
    assert json.loads((tmp_path / "r.json").read_text())["cases"]


def test_an_interruption_loses_nothing_and_the_budget_ends_a_run(call, monkeypatch, tmp_path):
    seen = []

    def measured(case, backends, timer, notes=None):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(case.key)
        return fake(case, backends, timer)

    monkeypatch.setattr(measure, "measure", measured)
    out = tmp_path / "r.json"
    code, _, err = call(*RUN, "--out", out)
    assert code != 0
    assert list(json.loads(out.read_text())["cases"]) == seen
    monkeypatch.setattr(measure, "measure", fake)
    clock = iter(range(0, 100000, 1000))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    code, _, err = call(*RUN, "--out", out, "--budget", "10")
    assert code == 0
    assert "budget: 1 of 4 cases left; the same command goes on from here" in err


def test_a_contestant_that_takes_the_device_down_is_left_out_of_the_next_run(call, monkeypatch, tmp_path):
    out = tmp_path / "r.json"
    real = OPS["rmsnorm"].call

    def lost(*arrays, backend):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "rotation", lambda nbytes: (1, False))
    monkeypatch.setitem(OPS, "rmsnorm", dataclasses.replace(OPS["rmsnorm"], call=lost))
    run = ("bench", "--ops", "rmsnorm", "--shapes", "4x64", "--backends", "auto,xla", "--out", out)
    monkeypatch.setattr(measure, "traffic", lambda case: 1000)
    code, _, err = call(*run)
    assert code == 1
    assert "the device is lost after auto in rmsnorm 4x64 bfloat16: RuntimeError: CUDA_ERROR_ILLEGAL" in err
    assert "Run the same command again: it goes on without it." in err

    def again(*arrays, backend):
        assert backend == "xla", "the contestant that lost the device ran again"
        return real(*arrays, backend=backend)

    monkeypatch.setitem(OPS, "rmsnorm", dataclasses.replace(OPS["rmsnorm"], call=again))
    code, said, _ = call(*run)
    assert code == 1 and "failed" in said  # it is still named
    (record,) = json.loads(out.read_text())["cases"].values()
    assert "median_us" in record["contestants"]["xla"] and record["contestants"]["auto"]["lost_the_device"]


def test_a_case_that_cannot_be_set_up_is_recorded_and_the_others_run(call, monkeypatch, tmp_path):
    def measured(case, backends, timer, notes=None):
        if case.shape[0] == 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return fake(case, backends, timer)

    monkeypatch.setattr(measure, "measure", measured)
    code, out, err = call("bench", "--ops", "rmsnorm", "--shapes", "4x64,8x64", "--out", tmp_path / "r.json")
    assert code == 1
    assert "RESOURCE_EXHAUSTED" in err and "0.50" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--ops", "rmsnrom"), 2, "--ops: got 'rmsnrom', expected some of rmsnorm, rmsnorm_bwd"),
        (("--ops", ","), 2, "--ops: got nothing"),
        (("--shapes", "4x0"), 2, "--shapes: got '4x0', expected numbers with x between them"),
        (("--shapes", "4x64x2"), 2, "--shapes: got 4x64x2, expected one for rmsnorm: ROWSxFEATURES"),
        (("--shapes", "4x64,8x8x8"), 2, "got 8x8x8, expected the number of dims of one of the ops"),
        (("--ops", "rmsnorm_quant", "--specs", "mxfp8", "--shapes", "4x48"), 2, "got 48 features for mxfp8"),
        (("--shapes", "rmsnrom:4x64"), 2, "got 'rmsnrom:4x64', expected OP:SHAPE with one of rmsnorm"),
        (("--shapes", "add_rmsnorm:4x64,rmsnorm:4x64x2"), 2, "expected one for rmsnorm: ROWSxFEATURES"),
        (("--dtypes", "float64"), 2, "--dtypes: got 'float64', expected some of bfloat16, float16, float32"),
        (("--specs", "int4"), 2, "--specs: got 'int4', expected some of int8, fp8"),
        (("--backends", "cuda"), 2, "--backends: got 'cuda', expected some of xla, triton, hip, auto"),
        (("--backends", "triton"), 1, "--backends: triton is not usable here: needs a GPU"),
        (("--timer", "clock"), 2, "--timer: got 'clock'"),
        (("--plot", "x.bmp"), 2, "--plot: got x.bmp, expected a name that ends with .png or .svg"),
        (("--out", "/proc/nowhere/x.json"), 2, "--out: cannot write to /proc/nowhere"),
        (("--from", "nowhere.json"), 2, "expected results of jaxnorm bench"),
    ],
)
def test_wrong_arguments(arguments, code, said, call):
    got, _, err = call("bench", *arguments)
    assert (got, said in err.replace("\n", " ")) == (code, True), err


def test_results_of_another_device_or_of_something_else_are_not_touched(call, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", fake)
    out = tmp_path / "r.json"
    out.write_text('{"precious": true}')
    assert call(*RUN, "--out", out)[0] == 2
    assert out.read_text() == '{"precious": true}'
    environment = store.environment() | {"device": "another card"}
    other = json.dumps({"format": measure.FORMAT, "environment": environment, "cases": {}})
    out.write_text(other)
    code, _, err = call(*RUN, "--out", out)
    assert code == 2
    assert "results of another device" in err
    assert out.read_text() == other
    assert call(*RUN, "--out", out, "--fresh")[0] == 0


def test_the_commit_is_not_that_of_a_repository_around_an_installed_package(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.delenv("JAXNORM_BENCH_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "_version.py").write_text("")
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    assert store.commit() == ""


def test_distance_sees_shapes_and_numbers():
    import jax.numpy as jnp

    assert programs.distance((jnp.ones(4),), (jnp.ones(4),)) == 0
    assert programs.distance((jnp.ones(4), 2 * jnp.ones(4)), (jnp.ones(4), jnp.ones(4))) == pytest.approx(1)
    with pytest.raises(ValueError, match="results"):
        programs.distance(jnp.ones(4), jnp.ones(5))


def test_prewarm(call, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "cache"))
    code, _, err = call("cache", "prewarm")
    assert code == 2
    assert "default device is a cpu: name the GPU to compile for with --target" in err
    assert call("cache", "prewarm", "--target", "h100")[0] == 2
    assert call("cache", "prewarm", "--target", "sm_90", "--ops", "rmsnorm", "--shapes", "3")[0] == 2


@pytest.mark.compile
def test_prewarm_compiles_what_a_call_will_use(call, tmp_path, monkeypatch):
    from jaxnorm import _native
    from jaxnorm._compile import cache, triton

    need("triton", triton.available()[0], "the compiler of the Triton kernels")
    need("launcher", _native.status().ok, _native.status().reason)
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "cache"))
    cache.clear_memory()
    arguments = ("--ops", "rmsnorm", "--shapes", "16x256", "--backends", "triton")
    code, out, err = call("cache", "prewarm", "--target", "gfx942", *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("1 of 1 programs compiled for rocm; 1 new kernels")
    assert [(e.target, e.name) for e in cache.entries()] == [("gfx942", "rmsnorm_fwd")]
    assert "0 new kernels" in call("cache", "prewarm", "--target", "gfx942", *arguments)[1]


def test_prewarm_into_a_folder_that_cannot_be_written(call, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(Path(tmp_path / "file") / "cache"))
    code, _, err = call("cache", "prewarm", "--target", "sm_90")
    assert code == 2
    assert "JAXNORM_CACHE_DIR: cannot write to" in err
