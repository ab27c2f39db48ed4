"""Device time of the LayerNorm family, forward, backward and quantised, beside XLA, torch.compile and a copy of the same bytes.

    python -m benchmarks.layernorm --out DIR [--cells 8192x4096,...] [--ops layernorm,add_layernorm,...] [--budget-seconds 120]
    python -m benchmarks.op_sweep layernorm --cases layernorm,layernorm_bwd --backends hip,triton --cells 8192x4096 --out DIR

Method as in ``timing``: kernel durations from CUPTI, cold L2, medians, contestants in turns. Writes ``layernorm.json`` after every
cell. Bytes: each [M, N] input read once, each [M, N] output written once, weight, bias and scales included. Backward: dx, dweight
and dbias of jaxnorm from what its forward saved; plain JAX recomputes the statistics, as XLA would anyhow.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn
from jaxnorm._bench import plain
from jaxnorm._bench.programs import copy, distance

from . import op_sweep, store, timing
from .cells import parse_shape

FORMAT = "jaxnorm-layernorm-bench/1"
EPS = plain.EPS
INT8, FP8 = jn.QuantSpec("int8"), jn.QuantSpec("float8_e4m3fn")
SPECS = {"layernorm_quant": INT8, "add_layernorm_quant": INT8, "layernorm_fp8": FP8}
# Passes over [M, N] of the inputs and of the outputs, in bytes an element of bfloat16.
TRAFFIC = {
    "layernorm": (2, 2), "add_layernorm": (4, 4), "layernorm_bwd": (4, 2), "add_layernorm_bwd": (6, 2),
    "layernorm_quant": (2, 1), "add_layernorm_quant": (4, 3), "layernorm_fp8": (2, 1),
}  # fmt: skip
OPS = ("layernorm", "layernorm_bwd", "add_layernorm", "add_layernorm_bwd", "layernorm_quant", "add_layernorm_quant")
CELLS = "8192x4096,131072x1024,16x4096,1x4096,8192x8192,8192x16384,4096x65536,1024x4096,16x8192,8192x768"
Call = Callable[..., Any]


def traffic(op: str, m: int, n: int) -> tuple[int, int]:
    """(least traffic, bytes of the inputs that rotate)"""
    read, written = TRAFFIC[op]
    scales = 4 * m if op in SPECS else 0
    return (read + written) * m * n + 4 * n + scales, read * m * n


def arguments(op: str, m: int, n: int, i: int) -> tuple[jax.Array, ...]:
    """Set i: x(, residual), weight, bias(, dy(, dresidual_out)) in bfloat16; all sets share the vectors."""
    wide = 2 if op.startswith("add") else 1
    w, b = (a + 0.1 * jax.random.normal(jax.random.key(k), (n,)) for k, a in ((0, 1.0), (1, 0.0)))
    keys = jax.random.split(jax.random.key(i + 2), 2 * wide)
    rows = [jax.random.normal(k, (m, n), jnp.bfloat16) for k in keys[: wide * (2 if op.endswith("bwd") else 1)]]
    return (*rows[:wide], w.astype(jnp.bfloat16), b.astype(jnp.bfloat16), *rows[wide:])


def functions(op: str) -> dict[str, Call]:
    """The forward of an op by contestant."""
    base = op.removesuffix("_bwd")
    if op in SPECS:
        name, spec = op.replace("_fp8", "_quant"), SPECS[op]
        ours = {
            f"jaxnorm-{b}": lambda *a, b=b: getattr(jn, name)(*a, spec, eps=EPS, backend=b) for b in ("hip", "triton")
        }
        return {**ours, "xla": lambda *a: getattr(plain, name)(*a, spec)}
    ours = {f"jaxnorm-{b}": functools.partial(getattr(jn, base), eps=EPS, backend=b) for b in ("hip", "triton")}
    return {**ours, "xla": getattr(plain, base)}


def programs(op: str, sets: list[tuple[Any, ...]]) -> list[tuple[str, Callable[[], timing.Program]]]:
    wide = 2 if op.startswith("add") else 1
    primals = wide + 2

    def calls(name: str, f: Call) -> list[Call]:
        if not op.endswith("bwd"):
            jitted = jax.jit(f)
            return [functools.partial(jitted, *s) for s in sets]
        cotangent = lambda c: c if wide == 2 else c[0]  # noqa: E731
        keep = lambda g: (g[0], *g[wide:])  # noqa: E731  the residual's gradient is dx again
        if name == "xla":
            both = jax.jit(lambda *a: keep(jax.vjp(f, *a[:primals])[1](cotangent(a[primals:]))))
            return [functools.partial(both, *s) for s in sets]
        forward = jax.jit(lambda *p: jax.vjp(f, *p)[1])
        backward = jax.jit(lambda vjp, *c: keep(vjp(cotangent(c))))
        return [functools.partial(backward, forward(*s[:primals]), *s[primals:]) for s in sets]

    def make(name: str, f: Call) -> timing.Program:
        return timing.Program(name, calls(name, f), jax.block_until_ready)

    found = [(name, functools.partial(make, name, f)) for name, f in functions(op).items()]
    if op in ("layernorm", "layernorm_bwd"):
        found.append(("torch-compile", functools.partial(torch_program, op, sets)))
    return found


def torch_program(op: str, sets: list[tuple[Any, ...]]) -> timing.Program:
    """torch.compile of layer_norm on the same buffers."""
    import torch

    from .torch_programs import _configure_compile, _to_torch

    _configure_compile(torch)
    compiled = torch.compile(
        lambda x, w, b: torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b, EPS), dynamic=False, fullgraph=True
    )
    views = [tuple(_to_torch(a) for a in s) for s in sets]

    def wait(out: Any) -> Any:
        torch.cuda.synchronize()
        return out

    def forward(x: Any, w: Any, b: Any) -> Any:
        with torch.no_grad():
            return compiled(x, w, b)

    def backward(x: Any, w: Any, b: Any, dy: Any) -> Call:
        leaves = [a.detach().requires_grad_() for a in (x, w, b)]
        y = compiled(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    calls = [backward(*v) if op.endswith("bwd") else functools.partial(forward, *v[:3]) for v in views]
    torch.cuda.synchronize()
    return timing.Program("torch-compile", calls, wait, "torch")


def measure(timer: timing.Timer, op: str, m: int, n: int) -> dict[str, Any]:
    nbytes, read = traffic(op, m, n)
    count, _ = timing.rotation(read)
    sets = [arguments(op, m, n, i) for i in range(count)]
    errors: dict[str, str] = {}
    distances: dict[str, float] = {}
    runs, wanted = [], None
    for name, make in reversed(programs(op, sets)):  # plain JAX before ours, which are compared with it
        try:
            p = make()
            outs = [p.wait(call()) for call in p.calls]
            if name == "xla":
                wanted = outs[-1]
            elif name.startswith("jaxnorm") and wanted is not None and op not in SPECS:
                distances[name] = distance(outs[-1], wanted)
            runs.append(p)
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"[:400]
    failed = lambda who, e: errors.update({who: str(e)[:400]})  # noqa: E731
    timed = timing.measure(timer, [copy(nbytes, count, "copy"), *reversed(runs)], nbytes, read, failed)
    return {
        "op": op,
        "rows": m,
        "features": n,
        "bytes": nbytes,
        "times": timed,
        "distance_to_xla": distances,
        "errors": errors,
    }


def sweep_cases() -> Iterator[op_sweep.Case]:
    """The ops by name, for ``op_sweep``.

    A backward is timed with its forward, and its dx compared: the sums over the rows may differ from plan to plan.
    """
    for op in TRAFFIC:
        wide = 2 if op.startswith("add") else 1

        def function(backend: str, op: str = op, wide: int = wide) -> Call:
            f = functions(op)[f"jaxnorm-{backend}"]
            if not op.endswith("bwd"):
                return f
            return lambda *a: jax.vjp(f, *a[: wide + 2])[1](a[-1] if wide == 1 else a[-2:])[0]

        def bytes_(shape: tuple[int, ...], op: str = op, wide: int = wide) -> tuple[int, int]:
            total, read = traffic(op, *shape)
            return total + (traffic(op.removesuffix("_bwd"), *shape)[0] if op.endswith("bwd") else 0), read

        yield op_sweep.Case(op, function, lambda s, i, op=op: arguments(op, *s, i), bytes_)


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.layernorm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--cells", default=CELLS)
    p.add_argument("--ops", default=",".join(OPS))
    p.add_argument("--budget-seconds", type=float, default=120)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / "layernorm.json"
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    todo = [(op, *parse_shape(c)) for c in args.cells.split(",") for op in args.ops.split(",")]
    for op, m, n in todo:
        key = f"{op} {m}x{n}"
        if key in results["cells"] or (op.endswith("bwd") and m < 128):
            continue
        if time.time() - start > args.budget_seconds:
            print(f"budget: stopped before {key}; the same command goes on from here")
            break
        try:
            results["cells"][key] = measure(timer, op, m, n)
        except Exception as e:
            results["cells"][key] = {"errors": {"cell": f"{type(e).__name__}: {e}"[:400]}, "times": {}}
        store.write_json(path, results)
        times = {k: v["median_us"] for k, v in results["cells"][key]["times"].items()}
        copy_us = times.get("copy", float("nan"))
        print(f"{key:32s} copy {copy_us:8.2f}", *(f"{k} {v:.2f} ({v / copy_us:.2f})" for k, v in times.items() if k != "copy"),
              *(f"ERROR {k}: {e[:120]}" for k, e in results["cells"][key]["errors"].items()), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
