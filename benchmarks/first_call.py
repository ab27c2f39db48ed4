"""What a user waits for: the import, the first call of a new shape, and the same call in a second process.

    python -m benchmarks.first_call --out DIR

Every number is from processes of its own, with a cache folder of its own. The first call is tracing, lowering, compiling and one
run of ``jax.jit``, after an unrelated program has started the runtime; XLA's persistent cache is off.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from . import store

IMPORT = """
import time, jax, numpy
start = time.perf_counter()
import jaxnorm
print(time.perf_counter() - start)
"""
CALL = """
import json, sys, time
import jax, jax.numpy as jnp
sys.path.insert(0, {root!r})
from benchmarks.jax_programs import jnp_rmsnorm
import jaxnorm
backend = {backend!r}
f = jnp_rmsnorm if backend == "jnp" else lambda x, w: jaxnorm.rmsnorm(x, w, backend=backend)
jax.jit(lambda a: a * 2)(jnp.ones((8, 8))).block_until_ready()
times = []
for n in (4096, 5120):
    x, w = jax.device_put((jnp.ones((128, n), jnp.bfloat16), jnp.ones((n,), jnp.bfloat16)))
    jax.block_until_ready((x, w))
    start = time.perf_counter()
    jax.jit(f)(x, w).block_until_ready()
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def process(code: str, cache: str, seconds: float = 120) -> str:
    """The last line a fresh interpreter prints; raises RuntimeError with the end of its errors."""
    env = {**os.environ, "JAXNORM_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(store.ROOT), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=seconds)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(done.stderr.strip()[-300:])
    return done.stdout.strip().splitlines()[-1]


def import_ms(count: int) -> dict[str, Any]:
    """Milliseconds of ``import jaxnorm`` after ``import jax``; the first process, which may compile bytecode, is left out."""
    with tempfile.TemporaryDirectory() as cache:
        times = [1e3 * float(process(IMPORT, cache)) for _ in range(count + 1)][1:]
    return {
        "median_ms": round(statistics.median(times), 1),
        "min_ms": round(min(times), 1),
        "max_ms": round(max(times), 1),
        "n": count,
    }


def calls(backend: str | None, count: int) -> dict[str, Any]:
    """Seconds of the first call, of a second new shape, and of the first call of a later process with the filled cache."""
    code = CALL.format(root=str(store.ROOT), backend=backend)
    fresh, second, cached = [], [], []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as cache:
            a, b = json.loads(process(code, cache))
            fresh.append(a)
            second.append(b)
            cached.append(json.loads(process(code, cache))[0])
    return {
        k: round(statistics.median(v), 3)
        for k, v in (("first_s", fresh), ("new_shape_s", second), ("second_process_s", cached))
    } | {"n": count}


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.first_call",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--backends", default="default,hip,triton,xla,jnp", help="jnp: the norm as written by hand, without jaxnorm"
    )
    p.add_argument("--processes", type=int, default=3)
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = p.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    result: dict[str, Any] = {"format": "jaxnorm-first-call/1", "calls": {}}
    try:
        result["import"] = import_ms(7)
    except Exception as e:
        result["import"] = {"error": str(e)}
    for name in args.backends.split(","):
        try:
            result["calls"][name] = calls(None if name == "default" else name, args.processes)
        except Exception as e:
            result["calls"][name] = {"error": str(e)}
        store.write_json(args.out / "first_call.json", result)
    result["environment"] = store.environment()
    store.write_json(args.out / "first_call.json", result)
    print(f"import beyond jax: {result['import']}")
    for name, entry in result["calls"].items():
        print(f"{name:8s} {entry}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
