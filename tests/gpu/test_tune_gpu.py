"""A short search on the real device: the candidates that win have the bits of the own choice, and dispatch takes them up."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from jaxnorm import _dispatch, _explain, cli
from jaxnorm._bench import timing
from jaxnorm._bench.ops import OPS, Case, inputs
from jaxnorm._compile import target as targets
from jaxnorm._tune import plans, search

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_TUNED_DIR", str(tmp_path / "tuned"))
    return tmp_path / "tuned"


@pytest.mark.parametrize("backend", ["hip", "triton"])
@pytest.mark.parametrize("name", ["add_rmsnorm", "rmsnorm_bwd", "rmsnorm_quant"])
def test_search(name, backend):
    case = Case(name, (256, 2048), "bfloat16", "int8" if OPS[name].quantises else "")
    about = search.subject(case, backend, 4)
    assert not isinstance(about, str), about
    found = search.search(about, timing.make_timer(), 2, lambda what, i: None, lambda: False)
    assert found.failed == {}
    assert found.tried == len(about.candidates)
    assert 0 < found.us <= found.own_us
    entry = search.entry(about, found)
    assert entry["own"] == plans.digest(about.candidates[0])


def test_a_tuned_plan_is_used_and_changes_no_bit(folder):
    """Whatever wins the search: another candidate with the same bits is written into the table by hand, and used."""
    case = Case("rmsnorm", (64, 4096))
    about = search.subject(case, "hip", 0)
    assert not isinstance(about, str), about
    (arguments,) = inputs(case, 1)
    run = lambda: jax.jit(lambda *a: OPS["rmsnorm"].ours("hip", None)(*a))(*arguments)  # noqa: E731
    before = run()
    entry = search.entry(about, search.Found(2, {}, 0, 2.0, 1.0, about.candidates[1], "label", None))
    path = folder / "device" / "plans" / "rmsnorm_fwd.hip.json"
    path.parent.mkdir(parents=True)
    table = {"format": plans.FORMAT, "device": jax.devices()[0].device_kind, "backend": "hip"}
    path.write_text(json.dumps({**table, "entries": {plans.digest(about.problem): entry}}))
    with _explain.recording() as choices:
        after = run()
    assert "tuned on" in choices[0].reason
    assert _dispatch.choose(about.call, about.problem, targets.default_platform()).plan == about.candidates[1]
    assert jnp.array_equal(before, after)


def test_the_command(folder, capsys):
    arguments = ["--ops", "rmsnorm", "--shapes", "128x1024", "--backends", "hip", "--limit", "3"]
    assert cli.main(["tune", *arguments]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "rmsnorm 128x1024 bfloat16" in out
    assert len(list(folder.glob("*/plans/rmsnorm_fwd.hip.json"))) == 1
    assert cli.main(["tune", *arguments]) == 0
    assert "in the table already" in capsys.readouterr().out


def test_bench(tmp_path, capsys):
    out = tmp_path / "r.json"
    code = cli.main(["bench", "--ops", "rmsnorm,add_rmsnorm_bwd", "--shapes", "256x1024", "--out", str(out)])
    assert code == 0, capsys.readouterr()
    for record in json.loads(out.read_text())["cases"].values():
        assert {"hip", "triton", "auto", "plain"} <= set(record["contestants"])
        assert all(c["right"] for c in record["contestants"].values())
