"""Ahead of time, on the device: a directory made without a GPU serves a process that cannot compile, and kernel cases agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest

from jaxnorm import _native
from jaxnorm._compile import hip, target, triton

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
N = 2048
X, W = f"bfloat16[..., {N}]", f"bfloat16[{N}]"
CALLS = [
    {"op": "rmsnorm", "args": {"x": X, "weight": W}, "grad": True},
    {"op": "add_rmsnorm_quant", "args": {"x": X, "residual": X, "weight": W}, "options": {"spec": {"dtype": "fp8"}}},
    {"op": "layernorm", "args": {"x": X, "weight": W, "bias": W}},
]


def need_compiler(backend: str) -> None:
    usable, reason, _ = hip.available(here()) if backend == "hip" else triton.available()
    needs.need(backend, usable, reason)
    needs.need("launcher", _native.status().ok, _native.status().reason)


def here() -> str:
    """Target of this machine's device."""
    return target.in_force(())[0]


def command(*arguments: str, **env: str) -> str:
    """A process that sees this checkout; what it printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    child = os.environ | {"PYTHONPATH": path} | env
    done = subprocess.run([sys.executable, *arguments], env=child, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# Whatever would compile raises: a library of a run-time compiler, another program (clang, hipcc), triton.
SERVED = """
import sys
sys.modules["triton"] = None
import jax, jax.numpy as jnp, numpy as np
jax.devices()  # jax's own libraries are loaded now

def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn") or (event == "ctypes.dlopen" and "rtc" in str(arguments[0])):
        raise RuntimeError(f"a compiler was asked for: {event} {arguments[:2]}")

sys.addaudithook(refuse)
import jaxnorm, oracle, oracle_quant, tolerances
from jaxnorm import _explain
from jaxnorm._compile import rtc
rtc._paths = lambda api: []  # a machine without NVRTC
rtc.find.cache_clear()
features, g = int(sys.argv[1]), np.random.default_rng(5)
bf16 = lambda *shape: g.standard_normal(shape).astype(jnp.bfloat16)
w, b, spec = bf16(features), bf16(features), jaxnorm.QuantSpec("fp8")
norm, quant = jax.jit(jaxnorm.rmsnorm), jax.jit(lambda x, r, w: jaxnorm.add_rmsnorm_quant(x, r, w, spec))
with _explain.recording() as choices:
    for rows in (1, 77, 3000):
        x, r, dy = bf16(rows, features), bf16(rows, features), bf16(rows, features)
        want = oracle.rmsnorm(x, w)
        y, pull = jax.vjp(norm, x, w)
        dx, dw = pull(dy)
        back = oracle.rmsnorm_backward(want, w, dy)
        tolerances.assert_y(np.asarray(y), want)
        tolerances.assert_dx(np.asarray(dx), back)
        tolerances.assert_dweight(np.asarray(dw), back)
        q, total = quant(x, r, w)
        want = oracle.add_rmsnorm(x, r, w)
        tolerances.assert_same_bits(np.asarray(total), want.residual_out)
        codes = oracle_quant.quantize(want.y, spec, q.spec.dtype)
        oracle_quant.assert_quantized(jax.tree.map(np.asarray, q), codes, spec, f"{rows} rows")
        jax.block_until_ready(jax.jit(jaxnorm.layernorm)(x, w, b))
for c in sorted({(c.op, c.backend) for c in choices}):
    print("RAN", *c)
"""


@pytest.mark.parametrize("backend", ["hip", "triton"])
def test_a_directory_made_elsewhere_serves_without_a_compiler(backend: str, tmp_path: Path) -> None:
    """Made by a process that sees no GPU, then read only: right values from its kernels, forward and backward, and from nothing
    without it."""
    need_compiler(backend)
    (tmp_path / "calls.json").write_text(json.dumps({"calls": [c | {"backend": backend} for c in CALLS]}))
    aot = [
        "-m",
        "jaxnorm",
        "aot",
        "--target",
        here(),
        "--spec",
        str(tmp_path / "calls.json"),
        "--out",
        str(tmp_path / "made"),
    ]
    command(*aot, JAX_PLATFORMS="cpu", JAXNORM_CACHE_DIR=str(tmp_path / "cache"), JAXNORM_REQUIRE="")
    command("-m", "jaxnorm", "aot", "--check", str(tmp_path / "made"), JAX_PLATFORMS="cpu")
    before = [path.chmod(0o555 if path.is_dir() else 0o444) or path for path in sorted(tmp_path.glob("made/**/*"))]

    def backends(folder: str) -> dict[str, str]:
        env = {"JAXNORM_CACHE_DIR": str(tmp_path / folder), "JAXNORM_REQUIRE": ""}
        lines = [line.split() for line in command("-c", SERVED, str(N), **env).splitlines() if line.startswith("RAN")]
        return {" ".join(words[1:-1]): words[-1] for words in lines}

    served = backends("made")
    assert set(served.values()) == {backend} and len(served) == 4, served
    assert sorted(tmp_path.glob("made/**/*")) == before, "something was written"
    assert set(backends("empty").values()) == {"xla"}


def run_cases(folder: Path, calls: list[str]) -> str:
    """Makes a bundle and runs it with tools/run_case.py, which knows neither jax nor jaxnorm; its last line."""
    command("-m", "jaxnorm", "aot", "--target", here(), "--bundle", "--out", str(folder), *calls,
            JAX_PLATFORMS="cpu", JAXNORM_REQUIRE="")  # fmt: skip
    return command(str(ROOT / "tools" / "run_case.py"), str(folder), PYTHONPATH="").splitlines()[-1]


@pytest.mark.parametrize("backend", ["hip", "triton"])
def test_kernel_cases_agree(backend: str, tmp_path: Path) -> None:
    need_compiler(backend)
    (tmp_path / "calls.json").write_text(json.dumps({"calls": [c | {"backend": backend, "rows": [5]} for c in CALLS]}))
    last = run_cases(tmp_path / "bundle", ["--spec", str(tmp_path / "calls.json")])
    assert last.startswith(here()) and last.endswith("0 differ or fail"), last


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hip", "triton"])
def test_the_kernel_cases_of_a_release_agree(backend: str, tmp_path: Path) -> None:
    """Every op, dtype and quantisation."""
    need_compiler(backend)
    last = run_cases(tmp_path / "bundle", ["--backend", backend])
    assert last.startswith(here()) and last.endswith("0 differ or fail"), last
