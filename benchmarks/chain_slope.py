"""What one norm adds to a jitted program at decode sizes: the slope between a chain of 64 and one of 320.

    python -m benchmarks.chain_slope --out DIR [--backends hip,triton,xla]

The time of a chain holds the enqueue from the host once; the difference of two lengths does not. Run it again with
``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` to see what the command buffers (CUDA graphs) save.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jaxnorm as jn

from . import store
from .jax_programs import jnp_rmsnorm

FORMAT = "jaxnorm-chain-slope/1"
LENGTHS = (64, 320)
REPEATS = 60
Norm = Callable[[jax.Array, jax.Array], jax.Array]


def norm(backend: str) -> Norm:
    """``xla`` is plain jax.numpy, kept apart from its neighbours by a barrier."""
    if backend == "xla":
        return lambda x, w: jax.lax.optimization_barrier(jnp_rmsnorm(x, w))
    return lambda x, w: jn.rmsnorm(x, w, backend=backend)


def chain_times(f: Norm, x: jax.Array, w: jax.Array, length: int) -> list[float]:
    """Seconds of each repetition of a chain of ``length`` norms."""

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(length):
            x = f(x, w)
        return x

    compiled = jax.jit(chain).lower(x, w).compile()
    for _ in range(5):
        compiled(x, w).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        compiled(x, w).block_until_ready()
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.chain_slope", description=__doc__)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--backends", default="hip,triton,xla")
    p.add_argument("--shapes", default="1x4096,16x4096")
    args = p.parse_args()
    rows = []
    for shape in args.shapes.split(","):
        m, n = map(int, shape.split("x"))
        x, w = jax.random.normal(jax.random.key(0), (m, n), jnp.bfloat16), jnp.ones((n,), jnp.bfloat16)
        for backend in args.backends.split(","):
            short, long = (chain_times(norm(backend), x, w, length) for length in LENGTHS)
            slope = {
                f.__name__: 1e6 * (f(long) - f(short)) / (LENGTHS[1] - LENGTHS[0]) for f in (min, statistics.median)
            }
            rows.append({"shape": shape, "norm": backend, "slope_min": slope["min"], "slope_median": slope["median"],
                         "chain64_min": 1e6 * min(short) / LENGTHS[0], "chain320_min": 1e6 * min(long) / LENGTHS[1]})  # fmt: skip
            print(f"{shape:10s} {backend:8s} {slope['min']:6.2f} us a call (medians {slope['median']:.2f})", flush=True)
    path = args.out / "chain_slope.json"
    results = store.read_json(path) or {"format": FORMAT, "runs": []}
    results["environment"] = store.environment()
    results["runs"].append({"xla_flags": os.environ.get("XLA_FLAGS", ""), "us_per_call": rows})
    store.write_json(path, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
