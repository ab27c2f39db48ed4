"""What of benchmarks/ needs no GPU: cells, splitting of kernel records, resume, verdicts, tables, and a run on the CPU."""

import ctypes
import dataclasses
import importlib
import json

import pytest

import jaxnorm
from benchmarks import cells, compare, run, store, sweep, table, timing
from benchmarks.cells import Cell
from jaxnorm._bench import cupti
from jaxnorm._bench.cupti import Kernel


def test_bytes_are_each_input_and_output_once():
    assert Cell("rmsnorm", 8192, 8192).bytes == 256 * cells.MIB + 2 * 8192
    assert Cell("add_rmsnorm", 1024, 4096).bytes == 32 * cells.MIB + 2 * 4096
    assert Cell("rmsnorm_bwd", 8192, 4096).bytes == 192 * cells.MIB + 2 * 4096
    assert Cell("rmsnorm_fwdbwd", 1024, 4096, "float32").bytes == 64 * cells.MIB + 4 * 4096


def test_the_first_cells_of_all_ops_come_before_the_rest_of_any():
    chosen = cells.select("rmsnorm,add_rmsnorm,rmsnorm_bwd", "table")
    assert [c.op for c in chosen[:3]] == ["rmsnorm", "add_rmsnorm", "rmsnorm_bwd"]
    assert {c.shape for c in chosen[:3]} == {"8192x8192"}
    assert len(chosen) == len(set(chosen)) == 21 + 21 + 9
    assert all(c.rows <= 16 for c in cells.select("rmsnorm", "decode"))
    assert all(c.bytes > 64 * cells.MIB for c in cells.select("add_rmsnorm", "large"))


@pytest.mark.parametrize("ops, group", [("nothing", "table"), ("rmsnorm", "8192"), ("rmsnorm", "ax4")])
def test_unknown_ops_and_cells_are_named(ops, group):
    with pytest.raises(ValueError, match="got"):
        cells.select(ops, group)


def test_records_are_split_per_call_and_the_flush_is_left_out():
    flush, norm, total = Kernel("xor", 120.0, 0.0), Kernel("norm", 2.0, 121.0), Kernel("sum", 1.0, 123.0)
    assert timing.split_records([flush, norm, total] * 3, 3, {"xor": 1}) == [[norm, total]] * 3


def test_kernels_that_overlap_count_once():
    apart = [Kernel("a", 2.0, 10.0), Kernel("b", 3.0, 13.0)]
    assert cupti.busy_us(apart) == 5.0
    assert cupti.busy_us([*apart, Kernel("c", 2.0, 15.0), Kernel("d", 0.5, 10.5)]) == 6.0
    assert cupti.busy_us([]) == 0.0


class FakeCupti:
    """Hands out kernel records, those of two buffers out of order; every other function succeeds."""

    def __init__(self):
        names = (b"later", 7000, 9320), (b"first", 1000, 4000), (b"second", 3500, 5000)
        base = 1_795_000_000_000_000_000  # nanoseconds since 1970, more digits than a float has
        kind = cupti.CONCURRENT_KERNEL
        self.records = [cupti._Record(kind=kind, start=base + s, end=base + e, name=n) for n, s, e in names]
        self.left = list(self.records)

    def cuptiActivityGetNextRecord(self, buffer, valid, record):
        if not self.left:
            return 12
        record._obj.value = ctypes.addressof(self.left.pop(0))
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


def test_records_of_cupti_become_kernels_in_the_order_of_their_start(monkeypatch):
    monkeypatch.setattr(cupti.Recorder, "_load", staticmethod(FakeCupti))
    recorder = cupti.Recorder()
    kernels = recorder(lambda: recorder._completed(None, 0, 0, 8, 8))
    assert kernels == [Kernel("first", 3.0, 0.0), Kernel("second", 1.5, 2.5), Kernel("later", 2.32, 6.0)]
    assert cupti.busy_us(kernels) == 6.32


@pytest.mark.parametrize(
    "records, calls, ignore, text",
    [
        ([], 2, None, "got 0"),
        ([("a", 1.0)] * 5, 2, None, "got 5"),
        ([("a", 1.0), ("b", 1.0)], 2, None, "call 1 ran"),
        ([("a", 1.0), ("xor", 1.0), ("a", 1.0)], 2, {"xor": 1}, "flush kernels"),
    ],
)
def test_records_that_do_not_fit_the_calls_are_refused(records, calls, ignore, text):
    with pytest.raises(ValueError, match=text):
        timing.split_records([Kernel(*r, 0.0) for r in records], calls, ignore)


class FakeFlush:
    def __init__(self, log):
        self.log, self.kernels = log, {"xor": 1}

    def __call__(self):
        self.log.append(Kernel("xor", 100.0, 100.0 * len(self.log)))

    def learn(self, recorder):
        pass

    def busy(self, seconds):
        pass


def fake_timer():
    log = []

    def record(call):
        start = len(log)
        call()
        return log[start:]

    return timing.CuptiTimer(record, FakeFlush(log)), log


def fake_program(name, log, times, fail_at=None):
    count = iter(range(1000))

    def call():
        if next(count) == fail_at:
            raise RuntimeError("boom")
        begin = 100.0 * len(log)  # one behind the other
        log.extend(Kernel(f"{name}{i}", t, begin + sum(times[:i])) for i, t in enumerate(times))

    return timing.Program(name, [call, call], lambda out: out)


@pytest.mark.parametrize("input_bytes", [1000, 1 << 28])
def test_a_failing_contestant_is_reported_and_the_others_are_timed(input_bytes):
    timer, log = fake_timer()
    errors = {}
    programs = [fake_program("a", log, (2.0, 3.0)), fake_program("b", log, (7.0,), fail_at=6)]
    out = timing.measure(timer, programs, 1 << 20, input_bytes, lambda n, e: errors.setdefault(n, e))
    assert out == {
        "a": {"median_us": 5.0, "min_us": 5.0, "max_us": 5.0, "n": 20, "kernels": [["a0", 1, 2.0], ["a1", 1, 3.0]]}
    }
    assert str(errors["b"]) == "boom"


def test_inputs_rotate_over_256_mb_or_are_flushed():
    assert timing.rotation(1000) == (4, True)
    assert timing.rotation(8 * cells.MIB) == (32, False)
    assert timing.rotation(100 * cells.MIB) == (3, False)
    assert timing.rotation(4096 * cells.MIB) == (2, False)


def cell_record(op="rmsnorm", rows=8192, features=8192, copy=100.0, **times):
    c = Cell(op, rows, features)
    contestants = {n.replace("_", "-"): {"median_us": t, "right": True, "errors": {}} for n, t in times.items()}
    return {
        "op": op, "shape": c.shape, "rows": rows, "features": features, "dtype": "bfloat16", "bytes": c.bytes, "copy_us": copy,
        "contestants": contestants, "timer": "cupti", "method": "m", "device": "NVIDIA H200", "capability": "9.0", "commit": "abc",
        "source": "s", "date": "2026-01-02 03:04 UTC", "versions": {"jax": "1"}, "time": 1,
    }  # fmt: skip


def test_verdicts():
    assert compare.verdict(cell_record(jaxnorm=104, xla=150, quack=103)) == {"copy": "pass", "peer": "equal"}
    assert compare.verdict(cell_record(jaxnorm=106, xla=106)) == {"copy": "FAIL", "peer": "pass"}
    assert compare.verdict(cell_record(rows=1, jaxnorm=2.0, xla=1.8)) == {"peer": "FAIL"}
    assert compare.verdict(cell_record(op="rmsnorm_bwd", jaxnorm=120, xla=150)) == {"peer": "pass"}
    assert compare.verdict(cell_record(xla=1.8)) == {"copy": "-", "peer": "-"}


def test_a_wrong_peer_does_not_count():
    r = cell_record(jaxnorm=104, xla=150, quack=50)
    r["contestants"]["quack"]["right"] = False
    assert compare.best_peer(r) == ("xla", 150)
    assert "quack: wrong result" in compare.report([r])


def test_store_resumes_from_earlier_directories(tmp_path):
    first = store.Store(tmp_path / "a")
    first.put("rmsnorm", "1x8", cell_record(rows=1, features=8, jaxnorm=1.0, xla=2.0))
    second = store.Store(tmp_path / "b", [tmp_path / "a"])
    assert store.is_complete(second.get("rmsnorm", "1x8"))
    assert second.get("rmsnorm", "2x8") is None
    second.put("rmsnorm", "2x8", cell_record(rows=2, features=8, xla=2.0))
    assert not store.is_complete(second.get("rmsnorm", "2x8"))
    assert set(json.loads((tmp_path / "b" / "rmsnorm.json").read_text())["cells"]) == {"1x8", "2x8"}
    (tmp_path / "b" / "torn.json").write_text('{"format": "jaxnorm-bench/1", "cells"')
    assert len(store.Store(tmp_path / "b").records()) == 2


def test_tuned_backend_is_never_slower_than_xla_where_one_is():
    fast_but_slow_once = [
        cell_record(jaxnorm_hip=50, jaxnorm_triton=90, xla=100),
        cell_record(rows=1, jaxnorm_hip=2.0, jaxnorm_triton=1.0, xla=1.0),
    ]
    assert table.choose(fast_but_slow_once)["backend"] == "triton"
    assert table.choose([cell_record(jaxnorm_hip=50, jaxnorm_triton=90, xla=100)])["backend"] == "hip"
    assert table.choose([cell_record(jaxnorm_hip=150, jaxnorm_triton=190, xla=100)])["backend"] == "xla"
    assert table.choose([cell_record(jaxnorm_hip=50)]) is None


def test_tuned_tables_are_read_by_the_library(tmp_path, monkeypatch):
    lookup = pytest.importorskip("jaxnorm._tune.table")
    records = [
        cell_record(jaxnorm_hip=50, xla=100),
        cell_record(op="add_rmsnorm", features=4096, jaxnorm_triton=50, xla=100),
    ]
    for stage, content in table.tuned(records).items():
        store.write_json(tmp_path / "nvidia_h200" / f"{stage}.json", content)
    monkeypatch.setattr(lookup, "FOLDER", tmp_path)
    lookup.entries.cache_clear()
    try:
        assert lookup.lookup("sm_90", "rmsnorm_fwd", "bfloat16", 8192, False).backend == "hip"
        assert lookup.lookup("sm_90", "rmsnorm_fwd", "bfloat16", 4096, True).backend == "triton"
    finally:
        lookup.entries.cache_clear()


def test_markdown_and_plot_show_where_a_peer_wins(tmp_path):
    records = [cell_record(jaxnorm=120, xla=150, quack=103), cell_record(rows=1, jaxnorm=2.0, xla=3.0, copy=1.0)]
    text = table.markdown(records)
    assert "quack 1.03 | copy: FAIL, peer: FAIL" in text and "NVIDIA H200" in text and "2026-01-02" in text
    pytest.importorskip("matplotlib", reason="needs matplotlib: plots")
    from benchmarks import plot

    assert plot.loses(records[0]) and not plot.loses(records[1])
    plot.draw(records, ["rmsnorm"]).savefig(tmp_path / "plot.svg")
    assert "8192x8192" in (tmp_path / "plot.svg").read_text() or (tmp_path / "plot.svg").stat().st_size > 1000


def test_a_run_on_the_cpu_measures_resumes_and_reports(tmp_path, capsys, monkeypatch):
    for name in (run.STARTED, run.CRASHES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    arguments = [
        "--ops",
        "rmsnorm,rmsnorm_bwd",
        "--cells",
        "4x64",
        "--contestants",
        "jaxnorm,xla,xla-saved,torch-eager",
    ]
    arguments += ["--timer", "wall", "--out", str(tmp_path)]
    monkeypatch.setattr(store, "source_digest", lambda: "digest")
    assert run.run(run.parser().parse_args(arguments)) == 0
    data = json.loads((tmp_path / "rmsnorm_bwd.json").read_text())["cells"]["4x64"]
    assert data["contestants"]["jaxnorm"]["right"] and data["contestants"]["xla-saved"]["right"]
    assert data["contestants"]["jaxnorm"]["median_us"] > 0 and data["copy_us"] > 0
    monkeypatch.setattr(run, "measure_cell", lambda *a: pytest.fail("measured again"))
    assert run.run(run.parser().parse_args(arguments)) == 0
    assert "rmsnorm_bwd 4x64" in capsys.readouterr().out


def test_a_contestant_that_lost_the_device_is_left_out_of_its_cell(monkeypatch):
    monkeypatch.setenv(run.CRASHES, "\nrmsnorm 4x64|quack|quack: illegal address")
    assert run.crashes(Cell("rmsnorm", 4, 64)) == {"quack": "quack: illegal address"}
    assert run.crashes(Cell("rmsnorm", 8, 64)) == {}


def test_the_backward_compiles_once_for_all_input_sets():
    from benchmarks import inputs, jax_programs

    data = inputs.make_inputs(Cell("add_rmsnorm_bwd", 4, 64))
    program = jax_programs.jaxnorm_program(None, data)
    program.calls[0].func.clear_cache()
    for call in program.calls:
        call()
    assert len(program.calls) == 4 and program.calls[0].func._cache_size() == 1


@pytest.mark.parametrize("stage", sweep.STAGES)
def test_sweep_problems_are_what_the_library_makes(stage):
    """Names, shapes, dtypes and options of the stage's Problem, against the one that lowering builds for the public function."""
    import jax
    import jax.numpy as jnp

    import jaxnorm
    from jaxnorm import _launch

    m, n = 4, 64
    wide, w = jax.ShapeDtypeStruct((m, n), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    f = (
        (lambda x, r, w: jaxnorm.add_rmsnorm(x, r, w))
        if stage.startswith("add")
        else (lambda x, w: jaxnorm.rmsnorm(x, w))
    )
    primals = [wide, wide, w] if stage.startswith("add") else [wide, w]
    if stage.endswith(("train", "bwd")):
        g, count, outputs = f, len(primals), jax.eval_shape(f, *primals)

        def f(*args):
            out, vjp = jax.vjp(g, *args[:count])
            return out, vjp(args[count])

        primals = [*primals, outputs]
    jaxpr = jax.make_jaxpr(f)(*primals)
    wanted = sweep.make_problem(stage, Cell(sweep.STAGES[stage], m, n), "sm_90")
    found = [_launch.problem(e.params["call"], [v.aval for v in e.invars], "sm_90") for e in _stages(jaxpr.jaxpr)]
    found = [p for p in found if p.stage == wanted.stage]
    assert found, "the stage was not called"
    keys = [(dict(p.shapes), dict(p.dtypes), dict(p.options)) for p in found]
    assert (dict(wanted.shapes), dict(wanted.dtypes), dict(wanted.options)) in keys


def _stages(jaxpr):
    """Equations of the stage primitive, at any depth."""
    for e in jaxpr.eqns:
        if e.primitive.name == "jaxnorm_stage":
            yield e
        for value in e.params.values():
            for v in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(v, "jaxpr", v)
                if hasattr(inner, "eqns"):
                    yield from _stages(inner)


def test_a_limited_sweep_keeps_the_plans_own_choice():
    problem = sweep.make_problem("fwd", Cell("rmsnorm", 8192, 8192), "sm_90")
    everything = sweep.candidates("triton", problem)
    some = sweep.candidates("triton", problem, 6)
    assert len(everything) > 6 == len(set(some)) and some[0] == everything[0] and set(some) <= set(everything)
    assert len({sweep.label(p, tuple(everything)) for p in everything}) == len(everything)


@pytest.mark.parametrize("name", ["rmsnorm_quant:fp8", "add_rmsnorm_quant:mxfp4"])
def test_an_op_sweep_replaces_the_plan_of_the_stage_it_is_about(name):
    from benchmarks import op_sweep, quant

    case = next(c for c in quant.sweep_cases() if c.name == name)
    args = case.arguments((33, 1024), 0)
    with jaxnorm.use_target({"cuda": "sm_90"}):
        call, problem = op_sweep.last_stage(case.function(None), args)
    assert (problem.stage, problem.rows, problem.target) == ("rmsnorm_quant_fwd", 33, "sm_90")
    module = importlib.import_module(f"jaxnorm.kernels.configs.{call.definition.plans['hip']}")
    picked, *others = module.candidates(problem)
    with op_sweep.forced(module, problem, others[0]):
        assert module.plan(problem) == others[0] != picked
        assert module.plan(dataclasses.replace(problem, rows=34)) != others[0]
    assert module.plan(problem) == picked
    total, reads = case.bytes((33, 1024))
    assert reads == sum(a.nbytes for a in args[:-1]) and total > 1.25 * reads


def test_distributed_contestants_are_timed_in_turns():
    """A host that slows down from round to round favours none; equal programs agree; who fails is named, the others go on."""
    from benchmarks import distributed

    us = {"a": 20.0, "fused": 10.0, "auto": 10.0, "bad": 5.0, "fused, two ties": 12.5}
    ran = []

    def run(program):
        name, calls = program
        ran.append(name)
        if name == "bad" and len(ran) > 20:
            raise RuntimeError("boom")
        drift = 1 + 0.5 * (len(ran) // (2 * distributed.REPEATS * len(us)))
        return (1000 + calls * us[name] * drift) * 1e-6

    errors = {}
    pairs = {name: [(name, 8), (name, 32)] for name in us}
    found = distributed.slopes(pairs, (8, 32), run, errors)
    assert list(errors) == ["bad"] and "boom" in errors["bad"] and "bad" not in found
    assert {len(each) for each in found.values()} == {distributed.ROUNDS}
    assert ran[:10] == [name for name in us for _ in range(2)]
    after = [n for n in ran if n != "bad"][2 * 4 * distributed.REPEATS :]
    assert after[0] == "fused" and after[6] == "a"  # the second round begins with the second
    middle, spread = distributed.summary(found)
    assert middle["a"] / middle["fused"] == pytest.approx(2, rel=0.2)
    assert middle["fused"] == pytest.approx(middle["auto"], rel=0.2)
    assert "fused, two ties" not in middle and 1.5 < middle["tie"] < 15
    assert all(spread[name][0] <= middle[name] <= spread[name][1] for name in middle)
    assert distributed.slopes({}, (8, 32), run, {}) == {}


def test_distributed_results_of_another_method_are_not_mixed(tmp_path):
    from benchmarks import distributed

    path = tmp_path / "distributed.json"
    assert distributed.read(path)["cells"] == {}
    path.write_text(json.dumps({"format": "jaxnorm-distributed-bench/3", "cells": {}}))
    with pytest.raises(SystemExit, match="another --out"):
        distributed.read(path)
