"""Every op of the registry under every transformation, on the CPU rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from registry import OPS, device_arrays
from transforms import CHECKS, data

ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@ops
@pytest.mark.parametrize("check", CHECKS)
def test_transform(op, check):
    if check in ("shard_map_vma", "shard_map_novma", "grad_inside_shard_map", "wrong_out_specs"):
        needs.need_devices(8)
    CHECKS[check](op, None)


@ops
def test_second_derivative(op):
    """u' H v of the xla backend against central differences of the oracle's float64 gradient."""
    f32 = dict.fromkeys(("x", "residual", "weight"), "float32")
    args, cts = data(op, 4, features=24, dtypes=f32)
    u, v = op.make((4,), 24, dtypes=f32, seed=8), op.make((4,), 24, dtypes=f32, seed=9)
    f = op.function("xla")

    def directional(*args):  # <gradient, v>
        gradients = jax.vjp(f, *args)[1](device_arrays(cts))
        return sum(jnp.vdot(g, b) for g, b in zip(gradients, v, strict=True))

    hv = jax.jit(jax.grad(directional, tuple(range(len(args)))))(*args)
    got = sum(float(np.vdot(h, a)) for h, a in zip(hv, u, strict=True))

    def along(t):
        moved = [(a + t * b).astype(np.float32) for a, b in zip(args, u, strict=True)]
        return sum(float(np.vdot(g, b)) for g, b in zip(op.gradients64(moved, cts), v, strict=True))

    t = 2.0**-8
    want = (8 * (along(t) - along(-t)) - (along(2 * t) - along(-2 * t))) / (12 * t)
    size = sum(float(np.linalg.norm(h) * np.linalg.norm(a)) for h, a in zip(hv, u, strict=True))
    assert abs(got - want) < 2e-4 * size, (got, want, size)


LOWER = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import jax
from registry import OPS, with_gradients
from transforms import data
for op in OPS:
    args, cts = data(op, 4, 6)
    lowered = jax.jit(with_gradients(op.function())).lower(args, cts)
    for text in (lowered.as_text(), lowered.as_text(dialect="hlo")):
        print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_two_processes_lower_to_the_same_bytes():
    here = str(Path(__file__).parent)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOWER, here],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (child.communicate(timeout=240)[0] for child in children)
    assert all(child.returncode == 0 for child in children)
    assert first and first == second
