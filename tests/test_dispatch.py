"""Which backend is chosen, by whom, and what ``explain`` says of it. Lowering for GPU targets needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jaxnorm.kernels.configs import Launch

import jaxnorm as jn
from jaxnorm import _dispatch, _explain, _native
from jaxnorm._tune import table
from jaxnorm.errors import UnsupportedError

X = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
W = jax.ShapeDtypeStruct((4096,), jnp.bfloat16)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAXNORM_BACKEND", "JAXNORM_REQUIRE", "JAXNORM_TRITON_BRIDGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kernels_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernel backends and the launcher, whatever this machine has."""
    monkeypatch.setattr(_dispatch, "compiler", lambda backend, target: (True, "", ""))
    monkeypatch.setattr(_native, "status", lambda: _native.Status(True, "", "", "launcher.so"))


def choose(backend: str | None = None, target: str = "sm_90", fn=jn.rmsnorm) -> jn.Choice:
    with jn.use_target({"cuda" if target.startswith("sm") else "rocm": target}):
        return jn.explain(lambda x, w: fn(x, w, backend=backend), X, W)[0]


def test_order_of_who_decides(kernels_usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        table, "lookup", lambda *a: table.Entry("rmsnorm_fwd", "bfloat16", 4096, False, "triton", "NVIDIA H200")
    )
    assert (choose().backend, "measured" in choose().reason) == ("triton", True)
    monkeypatch.setenv("JAXNORM_BACKEND", "hip")
    assert (choose().backend, choose().reason) == ("hip", "named by JAXNORM_BACKEND")
    with jn.use_backend("xla"):
        assert (choose().backend, choose().reason) == ("xla", "named by use_backend")
        assert (choose("hip").backend, choose("hip").reason) == ("hip", "named by backend=")
    assert choose().backend == "hip"


def test_fallback_tells_why(kernels_usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "lookup", lambda *a: None)
    monkeypatch.setattr(
        _dispatch, "compiler", lambda backend, target: (backend == "triton", "no hipRTC here", "install ROCm")
    )
    c = choose(target="gfx942")
    assert c.backend == "triton"
    ((name, why),) = c.rejected
    assert name == "hip" and "no hipRTC here" in why
    assert "not hip: " in str(c)


def test_required_backend_does_not_fall_back(kernels_usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _dispatch, "compiler", lambda backend, target: (backend == "triton", "no hipRTC here", "install ROCm")
    )
    monkeypatch.setenv("JAXNORM_REQUIRE", "hip")
    with pytest.raises(UnsupportedError, match=r"no hipRTC here.*install ROCm"):
        choose(target="gfx942")


def test_missing_launcher_falls_back_unless_required(kernels_usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _native, "status", lambda: _native.Status(False, "launcher not built: no compiler", "reinstall", None)
    )
    monkeypatch.setenv("JAXNORM_TRITON_BRIDGE", "launcher")
    c = choose()
    assert c.backend == "xla" and all("launcher not built" in why for _, why in c.rejected) and len(c.rejected) == 2
    with pytest.raises(UnsupportedError, match=r"launcher not built"):
        choose("hip")
    monkeypatch.setenv("JAXNORM_REQUIRE", "launcher")
    with pytest.raises(UnsupportedError, match=r"launcher not built"):
        choose()


def test_explain_lists_what_meets_or_what_stands_in() -> None:
    plan = tuple(
        Launch(f"a.hip:{name}", (), (), grid, threads=32, meeting=meeting)
        for name, grid, meeting in (
            ("clear", (1, 1, 1), 0),
            ("held", (8, 2, 1), 16),
            ("sums", (4, 1, 1), -16),
            ("apply", (4, 1, 1), -16),
        )
    )
    call, p = SimpleNamespace(op="groupnorm", stage="groupnorm_fwd"), SimpleNamespace(options=())
    found = [_explain._choice(call, p, _dispatch.Chosen("hip", "", plan, road)) for road in ("launcher", "jaxlib")]
    assert [c.kernel for c in found] == ["a.hip:clear, a.hip:held", "a.hip:clear, a.hip:sums, a.hip:apply"]
    assert "grid 8x2x1" in found[0].config and found[0].config.endswith("a.hip:sums and a.hip:apply")
    assert found[1].config.count("grid") == 3 and "room" not in found[1].config


def test_what_blocks_may_meet() -> None:
    launch = Launch("a.hip:held", (), (), (8, 2, 1), threads=32)
    with pytest.raises(ValueError, match=r"a.hip:held: meeting: got 8, expected the 16 blocks"):
        replace(launch, meeting=8)
    with pytest.raises(ValueError, match=r"overlaps: got True"):
        replace(launch, meeting=16, overlaps=True)
    assert replace(launch, meeting=-8, overlaps=True).meeting == -8


def test_context_is_part_of_the_jit_cache() -> None:
    seen = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        seen.append(_dispatch.requested("op", None))
        return jn.rmsnorm(x, None)

    x = jnp.ones((2, 8))
    f(x)
    with jn.use_backend("xla"):
        f(x)
    f(x)
    assert seen == [(None, ""), ("xla", "use_backend")]


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"use_backend: name: got 'cuda', expected None, 'xla', 'triton' or 'hip'"):
        jn.use_backend("cuda")
    with pytest.raises(ValueError, match=r"use_target: targets: got platform 'amd'"):
        jn.use_target({"amd": "gfx942"})
    with pytest.raises(ValueError, match=r"use_target.*'sm_90'.*such as 'gfx942'"):
        jn.use_target({"rocm": "sm_90"})


def test_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXNORM_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"JAXNORM_BACKEND.*'cuda'"):
        jn.rmsnorm(jnp.ones((2, 8)), None)
    monkeypatch.delenv("JAXNORM_BACKEND")
    monkeypatch.setenv("JAXNORM_TRITON_BRIDGE", "pigeon")
    with pytest.raises(
        ValueError, match=r"JAXNORM_TRITON_BRIDGE: got 'pigeon', expected one of launcher, jaxlib, jax-triton"
    ):
        choose("triton")


def test_kernel_backend_on_cpu_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        UnsupportedError, match=r"rmsnorm: backend='hip' is not usable: it needs a GPU.*Leave backend=None"
    ) as e:
        jn.rmsnorm(jnp.ones((2, 8)), None, backend="hip")
    assert (e.value.op, e.value.device) == ("rmsnorm", "cpu") and e.value.reason and e.value.remedy


def test_table_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"stage": "rmsnorm_fwd", "dtype": "bfloat16", "residual": False}
    entries = [{**common, "features": n, "backend": b} for n, b in ((1024, "hip"), (8192, "xla"))]
    (tmp_path / "a_gpu").mkdir()
    good = {"format": table.FORMAT, "target": "sm_90", "device": "A GPU", "entries": entries}
    (tmp_path / "a_gpu" / "rmsnorm.json").write_text(json.dumps(good))
    (tmp_path / "a_gpu" / "damaged.json").write_text("{")
    (tmp_path / "a_gpu" / "other.json").write_text(json.dumps({**good, "format": "something/2"}))
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.entries.cache_clear()
    try:

        def look(n: int, target: str = "sm_90", dtype: str = "bfloat16", residual: bool = False) -> table.Entry | None:
            return table.lookup(target, "rmsnorm_fwd", dtype, n, residual)

        assert look(1024).backend == "hip" and look(1500).backend == "hip"
        assert look(7168).backend == "xla"
        assert look(300) is None, "more than a factor of two from any measurement"
        assert look(1024, target="gfx942") is None
        assert look(1024, dtype="float32") is None and look(1024, residual=True) is None
    finally:
        table.entries.cache_clear()


def test_explain_finds_ops_in_every_construct() -> None:
    w = jnp.ones((8,))

    def f(x: jax.Array) -> jax.Array:
        y = jax.jit(lambda x: jn.rmsnorm(x, w))(x)
        y, _ = jax.lax.scan(lambda c, _: (jn.rmsnorm(c, w), None), y, None, length=3)
        y = jax.checkpoint(lambda x: jn.add_rmsnorm(x, x, w)[0])(y)
        return jax.vmap(lambda x: jn.rmsnorm(x, w))(y[None])[0].sum()

    assert [c.op for c in jn.explain(f, jnp.ones((2, 8)))] == ["rmsnorm", "rmsnorm", "add_rmsnorm", "rmsnorm"]
    ops = [c.op for c in jn.explain(jax.grad(lambda x: jn.rmsnorm(x, w).sum()), jnp.ones((2, 8)))]
    assert ops == ["rmsnorm", "rmsnorm backward"]
    assert str(jn.explain(lambda x: x + 1, w)) == "no jaxnorm op in this function"


def test_backends_on_a_machine_without_gpu() -> None:
    info = jn.backends()
    assert info["xla"].usable
    for name in ("triton", "hip"):
        assert not info[name].usable and "needs a GPU" in info[name].reason and info[name].remedy


ONCE = """
import jax
import jaxnorm
traces = []
@jax.jit
def norm(x):
    traces.append(0)
    return jaxnorm.rmsnorm(x, None)
norm(jax.numpy.ones((2, 8)))
norm(jax.numpy.ones((2, 8)))
assert len(traces) == 1, len(traces)
"""


def test_the_first_function_with_an_op_is_traced_once():
    """The values behind use_backend and use_target are part of jit's key: made inside the first trace they would change it."""
    done = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
