"""Tuned plans: what a table may choose, what makes it void, what a search keeps, and ``jaxnorm tune``. No kernel is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn
from jaxnorm import _dispatch, _launch, _native, cli
from jaxnorm._bench import store
from jaxnorm._bench.ops import OPS, Case, input_types
from jaxnorm._compile import target as targets
from jaxnorm._compile.code_object import CodeObject
from jaxnorm._tune import plans, search

DEVICE = "NVIDIA H200"
CASE = Case("rmsnorm", (64, 4096))


@pytest.fixture(autouse=True)
def no_table_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_TUNED_DIR", str(tmp_path / "tuned"))
    for name in ("JAXNORM_BACKEND", "JAXNORM_REQUIRE", "JAXNORM_TRITON_BRIDGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """As on an H200 with every compiler, whose machine code is the text of the launch."""
    monkeypatch.setattr(targets, "kind", lambda platform, target: DEVICE)
    monkeypatch.setattr(_dispatch, "compiler", lambda backend, target: (True, "", ""))
    monkeypatch.setattr(_native, "status", lambda: _native.Status(True, "", "", "launcher.so"))
    monkeypatch.setattr(_native, "require", lambda: _native.Status(True, "", "", "launcher.so"))

    def compiled(launch, problem, backend):
        return CodeObject(b"\x7fELF" + repr(launch).encode(), "kernel", problem.target, launch.threads or 128, 0, "")

    monkeypatch.setattr(_launch, "compile_launch", compiled)


def subject(case=CASE, backend="hip") -> search.Subject:
    found = search.subject(case, backend, 0, "cuda")
    assert not isinstance(found, str), found
    return found


def entry(about: search.Subject, plan) -> dict:
    found = search.Found(len(about.candidates), {}, 0, 10.0, 9.0, plan, "label", 8.0)
    return search.entry(about, found)


def write(folder: Path, about: search.Subject, content: dict, device: str = DEVICE) -> Path:
    path = folder / "some_device" / "plans" / f"{about.problem.stage}.{about.backend}.json"
    table = {"format": plans.FORMAT, "device": device, "backend": about.backend, "entries": content}
    store.write_json(path, table)
    return path


def chosen(about: search.Subject):
    """(plan, reason) that a call gets, through the dispatch."""
    found = _dispatch.choose(about.call, about.problem, "cuda")
    assert found.backend == about.backend
    return found.plan, found.reason


# Tables


def test_a_table_chooses_a_candidate_and_explain_says_so(gpu, tmp_path):
    about = subject()
    assert chosen(about) == (about.candidates[0], "named by backend=")
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3])})
    plan, reason = chosen(about)
    assert plan == about.candidates[3] != about.candidates[0]
    assert reason == f"named by backend=; tuned on {DEVICE} (9 us for 10)"
    other_rows = subject(Case("rmsnorm", (65, 4096)))
    assert chosen(other_rows) == (other_rows.candidates[0], "named by backend=")


def test_the_own_choice_in_a_table_stays(gpu, tmp_path):
    about = subject()
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[0])})
    assert chosen(about)[1].endswith(f"own choice, best on {DEVICE}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": "0" * 32}, "made with other kernels"),
        ({"own": "0" * 32}, "made with other kernels"),
        ({"plan": "0" * 32}, "its plan is no candidate any more"),
        ({"code": "0" * 32}, "this compiler makes other code"),
    ],
)
def test_an_entry_that_no_longer_holds_is_passed_over_with_a_note(change, said, gpu, tmp_path):
    about = subject()
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3]) | change})
    plan, reason = chosen(about)
    assert plan == about.candidates[0]
    assert said in reason


def test_a_tuned_plan_that_cannot_be_compiled_leaves_the_own_choice(gpu, tmp_path, monkeypatch):
    about = subject()
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3])})

    def refuses(launch, problem, backend):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_launch, "compile_launch", refuses)
    plan, reason = chosen(about)
    assert plan == about.candidates[0]
    assert "it does not compile here (no compiler)" in reason


def test_a_table_of_another_device_or_without_a_device_says_nothing(gpu, tmp_path, monkeypatch):
    about = subject()
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3])}, "NVIDIA H100")
    assert chosen(about)[0] == about.candidates[0]
    monkeypatch.setattr(targets, "kind", lambda platform, target: "")
    assert chosen(about)[0] == about.candidates[0]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other/1", "entries": {}}', '{"format": "jaxnorm-tuned-plans/1"}']
)
def test_a_damaged_table_is_noted_and_the_others_are_read(text, gpu, tmp_path):
    about = subject()
    path = write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3])})
    bad = path.with_name("another.json")
    bad.write_text(text)
    assert chosen(about)[0] == about.candidates[3]
    (note,) = plans.notes()
    assert str(bad) in note and "not read" in note


def test_a_table_that_others_could_have_written_is_not_read(gpu, tmp_path):
    about = subject()
    write(tmp_path / "tuned", about, {plans.digest(about.problem): entry(about, about.candidates[3])})
    (tmp_path / "tuned").chmod(0o777)
    assert chosen(about)[0] == about.candidates[0]
    assert "writable by others" in " ".join(plans.notes())


def test_the_users_table_comes_before_the_shipped_one(gpu, tmp_path, monkeypatch):
    about = subject()
    key = plans.digest(about.problem)
    monkeypatch.setattr(plans, "SHIPPED", tmp_path / "shipped")
    write(tmp_path / "shipped", about, {key: entry(about, about.candidates[2])})
    assert chosen(about)[0] == about.candidates[2]
    write(tmp_path / "tuned", about, {key: entry(about, about.candidates[3])})
    assert chosen(about)[0] == about.candidates[3]
    assert sorted(count for *_, count in plans.tables()) == [1, 1]


def test_shipped_tables_hold_plans_in_the_form_that_is_read():
    for path in plans.SHIPPED.glob("*/plans/*.json"):
        assert json.loads(path.read_text())["format"] == plans.FORMAT, path
    assert [n for n in plans.notes() if str(plans.SHIPPED) in n] == []


# Forcing a plan, which a search measures with


@pytest.mark.parametrize(
    "name", ["rmsnorm", "add_rmsnorm", "rmsnorm_bwd", "add_rmsnorm_bwd", "rmsnorm_quant", "quantize"]
)
@pytest.mark.parametrize("backend", ["hip", "triton"])
def test_a_forced_plan_is_what_gets_lowered(name, backend, gpu):
    case = Case(name, (64, 1024), "bfloat16", "int8" if OPS[name].quantises else "")
    about = subject(case, backend)
    assert about.problem.stage.endswith("bwd") == name.endswith("_bwd")
    types = input_types(case)
    f = search.forward(case, backend)
    if OPS[name].gradients:
        types, f = (types, jax.eval_shape(f, *types)), search.backward(case, backend)
    with plans.forced(backend, about.problem, about.candidates[-1]):
        text = jax.jit(f).trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    own = jax.jit(lambda *a: f(*a)).trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    assert text != own


def test_a_forced_plan_that_is_not_used_is_an_error():
    about = subject()
    with pytest.raises(RuntimeError, match="was not used"), plans.forced("hip", about.problem, about.candidates[1]):
        pass


# The search


@pytest.fixture
def fake_device(monkeypatch):
    """Candidates by number: some do not compile, some have other bits; times as given."""

    class Device:
        other_bits: tuple[int, ...] = ()
        broken: tuple[int, ...] = ()
        times: dict[int, list[float]]
        timed: list[list[int]]

    device = Device()
    device.times, device.timed = {}, []

    def bits(about, plan, checked):
        return [jnp.asarray([about.candidates.index(plan) if about.candidates.index(plan) in device.other_bits else 0])]

    def times(about, chosen, timer, failed, step):
        numbers = [about.candidates.index(p) for p in chosen]
        device.timed.append(numbers)
        return {
            p: device.times.get(i, [10.0] * 2)[len(device.timed) - 1] for p, i in zip(chosen, numbers, strict=True)
        }, 8.0

    def compile_all(about, jobs, step):
        return iter([(about.candidates[i], "CompileError: no") for i in device.broken])

    monkeypatch.setattr(search, "_bits", bits)
    monkeypatch.setattr(search, "_times", times)
    monkeypatch.setattr(search, "compile_all", compile_all)
    monkeypatch.setattr(search, "_checked_sets", lambda case: None)
    return device


def run(about) -> search.Found:
    return search.search(about, None, 1, lambda what, i: None, lambda: False)  # pyright: ignore[reportArgumentType]


def test_the_fastest_candidate_with_the_same_bits_wins(fake_device):
    about = subject()
    fake_device.other_bits, fake_device.broken = (2,), (4,)
    fake_device.times = {2: [1.0] * 2, 4: [1.0] * 2, 3: [7.0, 7.5], 5: [8.0] * 2}
    found = run(about)
    assert found.best == about.candidates[3]
    assert (found.own_us, found.us, found.copy_us, found.other_bits) == (10.0, 7.5, 8.0, 1)
    assert list(found.failed.values()) == ["CompileError: no"]
    assert fake_device.timed[1][:3] == [0, 3, 5]  # the finalists once more, beside the own choice


@pytest.mark.parametrize("times", [[9.9, 9.9], [5.0, 9.9]])
def test_a_gain_within_the_noise_or_seen_only_once_is_none(times, fake_device):
    about = subject()
    fake_device.times = {3: times}
    assert run(about).best == about.candidates[0]


def test_an_own_choice_that_does_not_compile_is_an_error(fake_device):
    fake_device.broken = (0,)
    with pytest.raises(RuntimeError, match="the own choice does not compile"):
        run(subject())


@pytest.mark.parametrize("name", ["add_rmsnorm", "rmsnorm_bwd"])
def test_bits_are_compared_over_all_sets(name, monkeypatch):
    """On the reference here: equal to itself, and not to itself with another eps."""
    monkeypatch.setattr(search, "CHECKED", 6 * 16 * 5)
    monkeypatch.setattr(plans, "forced", lambda *a: contextlib.nullcontext())
    case = Case(name, (6, 16))
    about = search.Subject(case, "xla", None, None, ())  # pyright: ignore[reportArgumentType]
    checked = search._checked_sets(case)
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(checked))
    first = search._bits(about, (), checked)
    assert {a.shape[0] for a in first} == {5} and all(np.issubdtype(a.dtype, np.unsignedinteger) for a in first)
    assert search._equal(first, search._bits(about, (), checked))
    function = getattr(jn, OPS[name].function)
    wrong = dataclasses.replace(OPS[name], call=lambda *a, backend: function(*a, eps=1e-3, backend=backend))
    monkeypatch.setitem(OPS, name, wrong)
    assert not search._equal(first, search._bits(about, (), checked))


def test_what_cannot_be_searched_is_said():
    assert search.subject(CASE, "xla", 0, "cuda") == "rmsnorm has no xla kernel"
    few = search.subject(CASE, "hip", 5, "cuda")
    assert not isinstance(few, str) and len(few.candidates) == 5 and few.candidates[0] == subject().candidates[0]


# The command


@pytest.fixture
def call(capsys, monkeypatch):
    pytest.importorskip("typer", reason="needs cli: typer")
    pytest.importorskip("rich", reason="needs cli: rich")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(store, "source_digest", lambda: "digest")

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def on_a_gpu(call, gpu, monkeypatch):
    """``jaxnorm tune`` as on an H200, with a search that takes candidate 3."""
    from jaxnorm._cli import tune

    searched: list[str] = []

    def fake_search(about, timer, jobs, step, stop):
        searched.append(about.case.key)
        step("compile", 1)
        if len(searched) == 2 and about.case.shape[0] == 7:
            raise RuntimeError("the device is lost")
        return search.Found(5, {}, 1, 10.0, 9.0, about.candidates[3], "label", 8.0)

    monkeypatch.setattr(tune, "_usable", lambda wanted: wanted)
    monkeypatch.setattr(search, "search", fake_search)
    monkeypatch.setattr(targets, "default_platform", lambda: "cuda")
    monkeypatch.setattr(
        store, "environment", lambda: {"device": DEVICE, "platform": "gpu", "versions": {}, "date": "2026"}
    )
    return searched


TUNE = ("tune", "--ops", "rmsnorm", "--backends", "hip")


def test_tune_writes_a_table_that_dispatch_reads_and_goes_on(call, on_a_gpu, tmp_path):
    code, out, err = call(*TUNE, "--shapes", "64x4096,8x4096")
    assert code == 0
    assert err.startswith("Wall clock of a queue of calls")  # this machine has no CUPTI, and that is said
    assert on_a_gpu == ["rmsnorm 64x4096 bfloat16", "rmsnorm 8x4096 bfloat16"]
    assert "10.00" in out and "9.00" in out and "label" in out
    table = tmp_path / "tuned/nvidia_h200/plans/rmsnorm_fwd.hip.json"
    assert len(json.loads(table.read_text())["entries"]) == 2
    assert "export JAXNORM_TUNED_DIR" not in out
    assert f"tuned plans: 2 for hip on {DEVICE}, {table}" in call("cache", "show")[1]
    about = subject()
    assert chosen(about)[0] == about.candidates[3]
    code, out, _ = call(*TUNE, "--shapes", "64x4096,8x4096,9x4096")
    assert on_a_gpu[2:] == ["rmsnorm 9x4096 bfloat16"]
    assert out.count("in the table already") == 2
    call(*TUNE, "--shapes", "64x4096", "--fresh")
    assert len(on_a_gpu) == 4


def test_tune_into_another_folder_says_how_to_use_it(call, on_a_gpu, tmp_path):
    _, out, _ = call(*TUNE, "--shapes", "64x4096", "--out", tmp_path / "mine")
    assert f"export JAXNORM_TUNED_DIR={tmp_path / 'mine'}" in out.replace("\n", "")


def test_a_failed_search_loses_nothing(call, on_a_gpu, tmp_path):
    code, out, err = call(*TUNE, "--shapes", "64x4096,7x4096,8x4096")
    assert code == 1
    assert "failed: the device is lost" in out
    assert "1 searches failed" in err
    assert len(json.loads((tmp_path / "tuned/nvidia_h200/plans/rmsnorm_fwd.hip.json").read_text())["entries"]) == 2


def test_a_search_that_loses_the_device_is_left_out_of_the_next_run(call, on_a_gpu, monkeypatch, tmp_path):
    taken = search.search

    def lost(about, *rest):
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")

    monkeypatch.setattr(search, "search", lost)
    code, _, err = call(*TUNE, "--shapes", "64x4096,8x4096")
    assert code == 1
    assert "the device is lost in rmsnorm 64x4096 bfloat16 hip" in err
    monkeypatch.setattr(search, "search", taken)
    code, out, _ = call(*TUNE, "--shapes", "64x4096,8x4096")
    assert (code, on_a_gpu) == (0, ["rmsnorm 8x4096 bfloat16"])
    assert "left out: a search lost the device" in " ".join(out.split())


def test_a_file_that_is_no_table_is_kept_aside(call, on_a_gpu, tmp_path):
    table = tmp_path / "tuned/nvidia_h200/plans/rmsnorm_fwd.hip.json"
    table.parent.mkdir(parents=True)
    table.write_text("precious")
    assert call(*TUNE, "--shapes", "64x4096")[0] == 0
    assert [p.read_text() for p in table.parent.glob("*.unread")] == ["precious"]
    assert json.loads(table.read_text())["format"] == plans.FORMAT


def test_the_budget_ends_a_run(call, on_a_gpu, monkeypatch):
    from jaxnorm._cli import tune

    clock = iter(range(0, 100000, 1000))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    _, _, err = call(*TUNE, "--shapes", "64x4096,8x4096,9x4096", "--budget", "5")
    assert len(on_a_gpu) == 1
    assert "budget: 2 searches left; the same command goes on from here" in err


def test_tune_on_a_cpu_says_why_not_and_lists(call):
    code, _, err = call("tune")
    assert code == 1
    assert "there is nothing to tune here: jax's default device is a cpu" in err
    code, out, _ = call(*TUNE, "--list", "--target", "gfx942", "--shapes", "64x4096")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "rmsnorm" in line)
    with jn.use_target({"rocm": "gfx942"}):
        expected = search.subject(CASE, "hip", 64, "rocm")
    assert not isinstance(expected, str)
    assert row[:5] == ["rmsnorm", "64x4096", "bfloat16", "hip", str(len(expected.candidates))]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--ops", "softmax"), 2, "--ops: got 'softmax', expected some of rmsnorm"),
        (("--backends", "xla"), 2, "--backends: got 'xla', expected some of hip, triton"),
        (("--shapes", "axb"), 2, "--shapes: got 'axb'"),
        (("--target", "gfx942"), 2, "expected no target without --list"),
        (("--list",), 2, "name a GPU with --target"),
        (("--list", "--target", "mi300"), 2, "--target: use_target"),
    ],
)
def test_wrong_arguments(arguments, code, said, call):
    got, _, err = call("tune", *arguments)
    assert (got, said in err.replace("\n", " ")) == (code, True), err


def test_a_folder_that_cannot_be_written(call, on_a_gpu, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(*TUNE, "--shapes", "64x4096", "--out", tmp_path / "file" / "x")
    assert code == 2
    assert "--out: cannot write to" in err
    assert on_a_gpu == []
