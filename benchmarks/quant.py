"""Device time of the quantising ops beside plain XLA and a copy of the same bytes.

    python -m benchmarks.quant --out DIR [--cells 8192x4096,...] [--specs fp8,int8,fp8-g128,...] [--budget-seconds 120]

Method as in ``timing``: kernel durations from CUPTI, cold L2, medians, contestants in turns. Writes ``quant.json`` after every
cell. Bytes: each input read once, each output written once, scales and weight included.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn
from jaxnorm._bench import plain as plain_ops
from jaxnorm._bench.programs import copy

from . import op_sweep, store, timing
from .cells import EPS, parse_shape

FORMAT = "jaxnorm-quant-bench/1"
SPECS = {
    "fp8": jn.QuantSpec("float8_e4m3fn"),
    "int8": jn.QuantSpec("int8"),
    "fp8-g128": jn.QuantSpec("float8_e4m3fn", group_size=128),
    "mxfp8": jn.QuantSpec("float8_e4m3fn", group_size=32, scale_dtype="e8m0"),
    "mxfp4": jn.QuantSpec("fp4", group_size=32, scale_dtype="e8m0"),
}
CELLS = "8192x4096,16x4096,131072x1024,8192x8192,16x8192,1x4096,1024x8192"
OPS = ("add_rmsnorm_quant", "rmsnorm_quant")


def _bytes(op: str, spec: jn.QuantSpec, m: int, n: int) -> tuple[int, int]:
    """(least traffic, bytes of the inputs that rotate)"""
    add = op.startswith("add")
    reads = 2 * m * n * (2 if add else 1)
    codes = m * n // 2 if spec.dtype == "fp4" else m * n
    scales = m * spec.groups(n) * (1 if spec.scale_dtype == "e8m0" else 4)
    return reads + codes + scales + (2 * m * n if add else 0) + 2 * n, reads


def _rows(op: str, m: int, n: int, i: int) -> tuple[jax.Array, ...]:
    """Set i of the arguments in bfloat16; all sets share the weight."""
    w = (1 + 0.1 * jax.random.normal(jax.random.key(0), (n,))).astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(i + 1), 2 if op.startswith("add") else 1)
    return (*(jax.random.normal(k, (m, n), jnp.bfloat16) for k in keys), w)


def sweep_cases() -> Iterator[op_sweep.Case]:
    """``rmsnorm_quant:fp8`` and so on, for ``op_sweep``."""
    for op in OPS:
        for name, spec in SPECS.items():

            def function(backend: str, op: str = op, spec: jn.QuantSpec = spec) -> Any:
                return lambda *a: getattr(jn, op)(*a, spec, eps=EPS, backend=backend)

            yield op_sweep.Case(
                f"{op}:{name}",
                function,
                lambda s, i, op=op: _rows(op, *s, i),
                lambda s, op=op, spec=spec: _bytes(op, spec, *s),
            )


def programs(op: str, spec: jn.QuantSpec, sets: list[tuple[Any, ...]]) -> list[timing.Program]:
    add = op.startswith("add")

    def ours(backend: str | None, *a: Any) -> Any:
        return (
            jn.add_rmsnorm_quant(*a, spec, eps=EPS, backend=backend)
            if add
            else jn.rmsnorm_quant(*a, spec, eps=EPS, backend=backend)
        )

    def plain(*a: Any) -> Any:
        s = a[0].astype(jnp.float32) + (a[1].astype(jnp.float32) if add else 0.0)
        y = s * jax.lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + EPS) * a[-1].astype(jnp.float32)
        return plain_ops.quantize(y, spec), s.astype(a[1].dtype) if add else None

    found = [(f"jaxnorm-{b}", jax.jit(functools.partial(ours, b))) for b in ("hip", "triton")]
    if spec.scale_dtype == "float32":
        found.append(("xla", jax.jit(plain)))
    return [timing.Program(name, [functools.partial(f, *s) for s in sets], jax.block_until_ready) for name, f in found]


def measure(timer: timing.Timer, op: str, name: str, m: int, n: int) -> dict[str, Any]:
    spec = SPECS[name]
    nbytes, reads = _bytes(op, spec, m, n)
    count, _ = timing.rotation(reads)
    sets = [_rows(op, m, n, i) for i in range(count)]
    errors: dict[str, str] = {}
    runs = programs(op, spec, sets)
    for p in list(runs):
        try:
            jax.block_until_ready([call() for call in p.calls])
        except Exception as e:
            errors[p.name] = f"{type(e).__name__}: {e}"[:400]
            runs.remove(p)
    timed = timing.measure(
        timer, [copy(nbytes, count, "copy"), *runs], nbytes, reads, lambda who, e: errors.update({who: str(e)[:400]})
    )
    return {"op": op, "spec": name, "rows": m, "features": n, "bytes": nbytes, "times": timed, "errors": errors}


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--cells", default=CELLS)
    p.add_argument("--specs", default=",".join(SPECS))
    p.add_argument("--ops", default=",".join(OPS))
    p.add_argument("--budget-seconds", type=float, default=120)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / "quant.json"
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    todo = [
        (op, s, *parse_shape(c))
        for c in args.cells.split(",")
        for s in args.specs.split(",")
        for op in args.ops.split(",")
    ]
    for op, name, m, n in todo:
        key = f"{op} {name} {m}x{n}"
        if key in results["cells"]:
            continue
        if time.time() - start > args.budget_seconds:
            print(f"budget: stopped before {key}; the same command goes on from here")
            break
        try:
            results["cells"][key] = measure(timer, op, name, m, n)
        except Exception as e:
            results["cells"][key] = {"errors": {"cell": f"{type(e).__name__}: {e}"[:400]}, "times": {}}
        store.write_json(path, results)
        times = {k: v["median_us"] for k, v in results["cells"][key]["times"].items()}
        copy_us = times.get("copy", float("nan"))
        print(f"{key:40s} copy {copy_us:8.2f}", *(f"{k} {v:.2f} ({v / copy_us:.2f})" for k, v in times.items() if k != "copy"),
              *(f"ERROR {k}: {e[:120]}" for k, e in results["cells"][key]["errors"].items()), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
