"""jax.export and ahead-of-time lowering for CUDA and ROCm, all from a machine without a GPU."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import hlo
import jax
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import OPS, with_gradients
from transforms import data

import jaxnorm

ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
TARGETS = (("rocm", "gfx942"), ("rocm", "gfx950"), ("cuda", "sm_90"))
GPUS = {"rocm": "gfx942", "cuda": "sm_90"}


@pytest.fixture
def kernels():
    """Triton compiles and something can launch what it makes."""
    pytest.importorskip("triton", reason="needs triton: it compiles the kernels")
    from jaxnorm import _launch

    road, why = _launch.road("triton", "rocm")
    needs.need("launcher", road is not None, why)


def lower(f, platform, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))


def assert_no_paths(text: str) -> None:
    """Nothing of this machine's file system in a program or in the code objects inside it.

    The text is without JAX's own source locations, which it keeps in a serialised export as debug information.
    """
    for path in {str(Path(jaxnorm.__file__).resolve().parents[1]), "site-packages", os.environ["JAXNORM_CACHE_DIR"]}:
        at = text.find(path)
        assert at < 0, f"a path of this machine is in the program: ...{text[max(at - 60, 0) : at + 100]}..."


def export(f, platforms, *args):
    return jax.export.export(jax.jit(f), platforms=platforms, disabled_checks=jaxnorm.export_checks())(*args)


@ops
def test_export_for_cpu_runs_after_a_round_trip(op):
    """Forward and backward with their vjp; no custom call that would need the checks to be disabled."""
    args, cts = data(op, 4, 3)
    exported = jax.export.export(jax.jit(op.function()), platforms=["cpu"])(*args)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    op.check(args, again.call(*args))
    op.check_gradients(args, cts, again.vjp().call(*args, *cts), "exported vjp")
    both = jax.export.export(jax.jit(with_gradients(op.function())))(args, cts)
    results, gradients = jax.export.deserialize(both.serialize()).call(args, cts)
    op.check_gradients(args, cts, gradients, "exported gradient")
    for a, b in zip(results, jax.jit(op.function())(*args), strict=True):
        tolerances.assert_same_bits(a, b)


@pytest.mark.compile
@ops
def test_one_artefact_for_three_platforms(op, kernels):
    """Kernels for cuda and rocm inside, the reference for cpu; it runs here after serialisation."""
    args, cts = data(op, 4, 3)
    with jaxnorm.use_target(GPUS):
        exported = export(with_gradients(op.function()), ["cpu", "cuda", "rocm"], args, cts)
    text = exported.mlir_module()
    assert exported.platforms == ("cpu", "cuda", "rocm")
    assert hlo.launches(text) >= 2 * 2, hlo.custom_calls(text)  # two platforms, a launch each way at least
    assert_no_paths("\n".join(line for line in text.splitlines() if not line.startswith("#loc")))
    results, gradients = jax.export.deserialize(exported.serialize()).call(args, cts)
    op.check(args, results)
    op.check_gradients(args, cts, gradients, "exported")


@pytest.mark.compile
def test_export_without_the_checks_is_refused(kernels):
    args, _ = data(OPS[0], 4)
    with pytest.raises(ValueError, match=r"[Cc]ustom call"):
        jax.export.export(jax.jit(OPS[0].function("triton")), platforms=["rocm"])(*args)


@pytest.mark.compile
@ops
@pytest.mark.parametrize("platform, target", TARGETS, ids=[t for _, t in TARGETS])
def test_lowering_for_a_target(op, platform, target, kernels):
    """Triton kernels for a named target: one launch forward, two backward; another target is another program."""
    args, cts = data(op, 4, 3)
    with jaxnorm.use_target({platform: target}):
        forward = lower(op.function("triton"), platform, *args)
        both = lower(with_gradients(op.function("triton")), platform, args, cts)
    assert hlo.launches(forward.as_text()) == 1, hlo.custom_calls(forward.as_text())
    assert 2 <= hlo.launches(both.as_text()) <= 3, hlo.custom_calls(both.as_text())
    assert "API_VERSION_TYPED_FFI" in forward.as_text(dialect="hlo")
    assert_no_paths(both.as_text())
    other = "gfx90a" if platform == "rocm" else "sm_80"
    with jaxnorm.use_target({platform: other}):
        assert lower(op.function("triton"), platform, *args).as_text() != forward.as_text()


POSITIONS, TABLE = np.arange(5, dtype=np.int32), np.ones((5, 64), np.float32)
GRADIENTS = {  # function, shapes of its rows, how many vectors are behind them
    "rmsnorm": (jaxnorm.rmsnorm, [(12, 64)], 1),
    "add_rmsnorm": (jaxnorm.add_rmsnorm, [(12, 64)] * 2, 1),
    "layernorm": (jaxnorm.layernorm, [(12, 64)], 2),
    "add_layernorm": (lambda *a, **kw: jaxnorm.add_layernorm(*a[:4], x_bias=a[4], **kw), [(12, 64)] * 2, 3),
    "groupnorm": (functools.partial(jaxnorm.groupnorm, num_groups=4, activation="silu"), [(2, 4, 4, 64)], 2),
    "qk_norm_rope": (lambda *a, **kw: jaxnorm.qk_norm_rope(*a, POSITIONS, TABLE, **kw), [(5, 3, 64)] * 2, 2),
    "qk_norm_rope_two_stream": (
        lambda *a, **kw: jaxnorm.qk_norm_rope_two_stream(*a, TABLE, TABLE, **kw), [(1, 5, 3, 64)] * 4, 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["hip", "triton"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_is_kernels_of_ours_alone(name, backend, kernels, monkeypatch):
    """The sums over the rows come out in the shape and dtype of their vectors: XLA adds no slice and no cast behind them."""
    from jaxnorm import _launch
    from jaxnorm._compile.code_object import CodeObject

    monkeypatch.setattr(_launch, "compile_launch", lambda launch, p, b: CodeObject(b"image", "k", p.target, 64, 0, ""))
    f, rows, vectors = GRADIENTS[name]
    types = ["bfloat16"] * len(rows) + ["float16", "bfloat16", "float32", "bfloat16"][:vectors]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip([*rows, *[(64,)] * vectors], types, strict=True)]
    one = lambda *a: tuple(jax.tree.leaves(f(*a, backend=backend)))  # noqa: E731
    with jaxnorm.use_target(GPUS):
        text = lower(with_gradients(one), "cuda", args, jax.eval_shape(one, *args)).as_text()
    assert hlo.launches(text) == 2, hlo.custom_calls(text)
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", "reshape", "constant"}, text


@pytest.mark.compile
@ops
def test_transformations_do_not_multiply_launches(op, kernels):
    """vmap is one more leading dim, checkpoint repeats the forward once at most, scan holds one launch."""
    args, cts = data(op, 4, 3)
    f = op.function("triton")
    axes = tuple(0 if rows else None for rows in op.per_row)
    with jaxnorm.use_target(GPUS):
        count = lambda g, *a: hlo.launches(lower(g, "rocm", *a).as_text())  # noqa: E731
        forward, both = count(f, *args), count(with_gradients(f), args, cts)
        assert forward == 1
        assert count(jax.vmap(f, axes), *args) == forward
        assert count(with_gradients(jax.vmap(f, axes)), args, cts) == both
        assert both <= count(with_gradients(jax.checkpoint(f)), args, cts) <= both + forward
        assert (
            count(
                lambda *a: jax.lax.fori_loop(0, 9, lambda i, c: (*f(*c, *a[len(c) :]), *c[len(cts) :]), a[: len(cts)]),
                *args,
            )
            == forward
        )


@pytest.mark.compile
def test_export_of_a_donated_residual_keeps_the_alias(kernels):
    op = OPS[1]
    args, _ = data(op, 16)
    with jaxnorm.use_target(GPUS):
        text = (
            jax.jit(op.function("triton"), donate_argnums=1).trace(*args).lower(lowering_platforms=("rocm",)).as_text()
        )
    assert re.search(r"tf\.aliasing_output = 1|jax\.buffer_donor = true", text)


@pytest.mark.compile
@ops
def test_eight_devices_on_an_explicit_mesh(op, kernels):
    """Exported for eight devices, with the kernels for rocm inside; it runs on eight CPU devices."""
    needs.need_devices(8)
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    args, cts = data(op, 8, 4)
    rows, vector = NamedSharding(mesh, P("dp", "tp", None)), NamedSharding(mesh, P(None))
    with jax.set_mesh(mesh), jaxnorm.use_target(GPUS):
        placed = tuple(jax.device_put(a, rows if r else vector) for a, r in zip(args, op.per_row, strict=True))
        cotangents = tuple(jax.device_put(c, rows) for c in cts)
        exported = export(with_gradients(op.function()), ["cpu", "rocm"], placed, cotangents)
        assert exported.nr_devices == 8
        assert hlo.launches(exported.mlir_module()) >= 2
        again = jax.export.deserialize(exported.serialize())
        results, gradients = jax.jit(again.call)(placed, cotangents)
    op.check(args, [np.asarray(r) for r in results])
    op.check_gradients(args, cts, [np.asarray(g) for g in gradients], "exported")


LOWER = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import jax, jaxnorm
from registry import OPS, with_gradients
from transforms import data
with jaxnorm.use_target({"rocm": "gfx942", "cuda": "sm_90"}):
    for op in OPS:
        for platform in ("rocm", "cuda"):
            args, cts = data(op, 4, 6)
            text = jax.jit(with_gradients(op.function("triton"))).trace(args, cts).lower(lowering_platforms=(platform,)).as_text()
            print(hashlib.sha256(text.encode()).hexdigest(), len(text))
"""


@pytest.mark.compile
def test_two_processes_lower_kernels_to_the_same_bytes(kernels, tmp_path):
    """Different hash seeds, working directories and (empty) caches."""
    here = str(Path(__file__).parent)
    root = str(Path(jaxnorm.__file__).parents[1])
    outputs = []
    for seed in ("1", "2"):
        cwd = tmp_path / seed
        cwd.mkdir()
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        caches = {"JAXNORM_CACHE_DIR": str(cwd / "cache"), "TRITON_CACHE_DIR": str(cwd / "triton")}
        env = os.environ | caches | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", LOWER, here], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] and outputs[0] == outputs[1]
