"""Device time of groupnorm, forward and backward, in both layouts, beside XLA, Flax, torch.compile and a copy of the same bytes.

    python -m benchmarks.groupnorm --out DIR [--cells 2x64x64x320,...] [--layouts nhwc,nchw] [--ops fwd,silu,bwd] \\
        [--budget-seconds 120] [--sweep hip,triton]

Method as in ``timing``: kernel times from CUPTI, cold L2, medians, contestants in turns. Writes ``groupnorm.json`` after every
cell. Bytes: each input read once, each output written once, vectors and statistics left out. ``--sweep`` times the candidates of
the kernels' plans instead (``groupnorm_sweep.json``), the plan's own choice first among them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxnorm.kernels.configs import Problem

import jaxnorm as jn
from jaxnorm import _launch
from jaxnorm._compile import target

from . import store, timing
from .quant import copy
from .sweep import compile_all

FORMAT = "jaxnorm-groupnorm-bench/1"
GROUPS, EPS = 32, 1e-5
# A small, a middle and a large image first; then what moves more than 64 MiB, batches of Stable Diffusion's UNet and its VAE; then
# the rest.
LARGE = "8x64x64x640,4x128x128x320,1x512x512x128,1x256x256x512,16x64x64x320,2x256x256x256,1x512x512x256,1x1024x1024x128"
CELLS = (
    f"2x64x64x320,2x128x128x512,2x32x32x640,{LARGE},2x16x16x1280,8x64x64x320,"
    "2x8x8x1280,2x16x16x1920,2x8x8x2560,2x32x32x960,1x256x256x256"
)
OPS = ("fwd", "silu", "bwd", "silu-bwd")
Call = Callable[..., Any]


def plain(x: jax.Array, w: jax.Array, b: jax.Array, *, last: bool, silu: bool) -> jax.Array:
    """What one writes in jax.numpy: float32 inside, a two-pass variance."""
    channels = x.shape[-1] if last else x.shape[1]
    split = (GROUPS, channels // GROUPS)
    grouped = (*x.shape[:-1], *split) if last else (x.shape[0], *split, *x.shape[2:])
    a = x.astype(jnp.float32).reshape(grouped)
    axes = (*range(1, a.ndim - 2), a.ndim - 1) if last else tuple(range(2, a.ndim))
    mean = jnp.mean(a, axes, keepdims=True)
    var = jnp.mean(jnp.square(a - mean), axes, keepdims=True)
    y = ((a - mean) * jax.lax.rsqrt(var + EPS)).reshape(x.shape)
    shape = (channels,) if last else (channels, *[1] * (x.ndim - 2))
    y = y * w.astype(jnp.float32).reshape(shape) + b.astype(jnp.float32).reshape(shape)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def jax_functions(last: bool, silu: bool) -> dict[str, Call]:
    """Contestants by name; Flax where it is installed (it knows channels last only)."""
    options = {
        "num_groups": GROUPS,
        "eps": EPS,
        "activation": "silu" if silu else None,
        "channel_axis": -1 if last else 1,
    }
    found: dict[str, Call] = {
        f"jaxnorm-{b}": functools.partial(jn.groupnorm, backend=b, **options) for b in ("hip", "triton")
    }
    found["xla"] = functools.partial(plain, last=last, silu=silu)
    try:
        import flax.linen as nn
    except ImportError:
        return found
    if last:
        module = nn.GroupNorm(GROUPS, epsilon=EPS, dtype=jnp.bfloat16)

        def linen(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
            y = module.apply({"params": {"scale": w, "bias": b}}, x)
            return jax.nn.silu(y) if silu else y

        found["linen"] = linen
    return found


def backward_calls(name: str, f: Call, sets: list[tuple[Any, ...]]) -> list[Call]:
    """The backward alone, on what the forward saved; plain JAX recomputes, or its saved values would be float32 images."""
    if not name.startswith("jaxnorm"):
        pull = jax.jit(lambda x, w, b, dy: jax.vjp(f, x, w, b)[1](dy))
        return [functools.partial(pull, *s) for s in sets]
    forward = jax.jit(lambda *p: jax.vjp(f, *p)[1])
    backward = jax.jit(lambda vjp, dy: vjp(dy))
    return [functools.partial(backward, forward(*s[:3]), s[3]) for s in sets]


def jax_programs(op: str, last: bool, sets: list[tuple[Any, ...]]) -> list[tuple[str, Callable[[], timing.Program]]]:
    silu, back = "silu" in op, op.endswith("bwd")

    def make(name: str, f: Call) -> timing.Program:
        jitted = jax.jit(f)
        calls = backward_calls(name, f, sets) if back else [functools.partial(jitted, *s[:3]) for s in sets]
        return timing.Program(name, calls, jax.block_until_ready)

    return [(name, functools.partial(make, name, f)) for name, f in jax_functions(last, silu).items()]


def torch_program(op: str, last: bool, sets: list[tuple[Any, ...]]) -> timing.Program:
    """torch.compile of group_norm on the same buffers; NHWC as channels_last."""
    import torch

    from .torch_programs import _configure_compile, _to_torch

    _configure_compile(torch)
    silu = "silu" in op

    def norm(x: Any, w: Any, b: Any) -> Any:
        y = torch.nn.functional.group_norm(x, GROUPS, w, b, EPS)
        return torch.nn.functional.silu(y) if silu else y

    compiled = torch.compile(norm, dynamic=False, fullgraph=True)
    image = lambda a: _to_torch(a).permute(0, a.ndim - 1, *range(1, a.ndim - 1)) if last else _to_torch(a)  # noqa: E731
    views = [(image(s[0]), _to_torch(s[1]), _to_torch(s[2]), image(s[3])) for s in sets]

    def wait(out: Any) -> Any:
        torch.cuda.synchronize()
        return out

    def forward(x: Any, w: Any, b: Any) -> Any:
        with torch.no_grad():
            return compiled(x, w, b)

    def backward(x: Any, w: Any, b: Any, dy: Any) -> Callable[[], Any]:
        leaves = [a.detach().requires_grad_() for a in (x, w, b)]
        y = compiled(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    calls = [backward(*v) if op.endswith("bwd") else functools.partial(forward, *v[:3]) for v in views]
    torch.cuda.synchronize()
    return timing.Program("torch-compile", calls, wait, "torch")


def image_shape(cell: str, last: bool) -> tuple[int, ...]:
    batch, *spatial, channels = (int(d) for d in cell.split("x"))
    return (batch, *spatial, channels) if last else (batch, channels, *spatial)


def make_sets(shape: tuple[int, ...], channels: int, read: int) -> list[tuple[Any, ...]]:
    """(x, weight, bias, dy) for as many calls as a cold cache takes."""
    count, _ = timing.rotation(read)
    make = jax.jit(lambda k: 0.5 + 2 * jax.random.normal(k, shape, jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), 2 * count)
    w = (1 + 0.1 * jax.random.normal(jax.random.key(1), (channels,))).astype(jnp.bfloat16)
    b = (0.1 * jax.random.normal(jax.random.key(2), (channels,))).astype(jnp.bfloat16)
    return [(make(keys[2 * i]), w, b, make(keys[2 * i + 1])) for i in range(count)]


def agree(op: str, last: bool, out: Any, s: tuple[Any, ...]) -> float:
    """Root mean square error relative to plain JAX in float32."""
    f = functools.partial(plain, last=last, silu="silu" in op)
    wide = [a.astype(jnp.float32) for a in s]
    want = jax.vjp(f, *wide[:3])[1](wide[3])[0] if op.endswith("bwd") else f(*wide[:3])
    got = (out[0] if op.endswith("bwd") else out).astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))


def measure(timer: timing.Timer, op: str, cell: str, last: bool) -> dict[str, Any]:
    shape = image_shape(cell, last)
    channels, size = int(cell.split("x")[-1]), 2 * math.prod(shape)
    back = op.endswith("bwd")
    nbytes, read = (3 if back else 2) * size, (2 if back else 1) * size
    sets = make_sets(shape, channels, read)
    errors: dict[str, str] = {}
    distances: dict[str, float] = {}
    runs = []
    for name, make in [*jax_programs(op, last, sets), ("torch-compile", lambda: torch_program(op, last, sets))]:
        try:
            p = make()
            outs = [p.wait(call()) for call in p.calls]
            if p.framework == "jax":
                distances[name] = agree(op, last, outs[0], sets[0])
            runs.append(p)
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"[:400]
    timed = timing.measure(
        timer, [copy(nbytes, len(sets)), *runs], nbytes, read, lambda who, e: errors.update({who: str(e)[:400]})
    )
    return {"op": op, "shape": shape, "bytes": nbytes, "times": timed, "distances": distances, "errors": errors}


def problem(op: str, cell: str, last: bool) -> Problem:
    """The stage of a cell as a plan sees it, statistics saved in the forward as for training only if it is a backward."""
    shape, channels = image_shape(cell, last), int(cell.split("x")[-1])
    back, silu = op.endswith("bwd"), "silu" in op
    c, bf16, f32 = (channels,), "bfloat16", "float32"
    buffers: list[tuple[str, tuple[int, ...], str]] = [("x", shape, bf16), ("weight", c, bf16)]
    if back:
        buffers += [("bias", c, bf16)] if silu else []
        buffers += [("stats", (shape[0], 3, channels), f32), ("dy", shape, bf16), ("dx", shape, bf16)]
        buffers += [("dweight", c, bf16), ("dbias", c, bf16)]
    else:
        buffers += [("bias", c, bf16), ("y", shape, bf16)]
    size = channels // GROUPS
    options = {"group_channels": size, "count": size * math.prod(shape) // shape[0] // channels}
    options |= {"last": last, "silu": silu} | ({} if back else {"eps": EPS})
    device = target.of_device(jax.devices()[0])
    assert device is not None
    names = tuple((n, s) for n, s, _ in buffers), tuple((n, d) for n, _, d in buffers)
    return Problem(
        "groupnorm_bwd" if back else "groupnorm_fwd", shape[0], channels, *names, tuple(options.items()), device
    )


def describe(plan: tuple[Any, ...]) -> list[str]:
    """Each launch with what differs between candidates."""
    names = ("TILE", "Q", "K", "PART", "LANES", "LINES", "MIN_BLOCKS", "POS", "CH", "STAGES")
    found = []
    for launch in plan:
        shown = {n.removeprefix("JN_"): v for n, v in launch.constants if n.removeprefix("JN_") in names}
        threads = launch.threads or f"{launch.num_warps}w"
        found.append(f"{launch.kernel.split(':')[1]} {launch.grid[0]}x{threads} {shown}")
    return found


def sweep(timer: timing.Timer, op: str, cell: str, last: bool, backend: str) -> dict[str, Any]:
    """Every candidate of a backend's plan: microseconds, launches, and the distance from plain JAX."""
    p = problem(op, cell, last)
    plans = importlib.import_module(f"jaxnorm.kernels.configs.groupnorm_{backend}").candidates(p)
    shape, channels = image_shape(cell, last), int(cell.split("x")[-1])
    size, back = 2 * math.prod(shape), op.endswith("bwd")
    nbytes, read = (3 if back else 2) * size, (2 if back else 1) * size
    sets = make_sets(shape, channels, read)
    inputs = [dict(zip(("x", "weight", "bias", "dy"), s, strict=True)) for s in sets]
    if back:
        act = "silu" if "silu" in op else None
        norm = functools.partial(
            jn.groupnorm, num_groups=GROUPS, eps=EPS, channel_axis=-1 if last else 1, activation=act, backend="hip"
        )
        saved = jax.jit(lambda *a: jax.tree.leaves(jax.vjp(norm, *a)[1]))
        for i in inputs:
            leaves = saved(i["x"], i["weight"], i["bias"])
            i["stats"] = next(a for a in leaves if a.shape == (shape[0], 3, channels))
    names = [n for n, _ in p.dtypes if n not in ("y", "dx", "dweight", "dbias")]
    runs, distances = [], {}
    errors = {str(k): e for k, e in compile_all(backend, p, plans, min(16, os.cpu_count() or 1)).items()}
    for k, plan in enumerate(plans):
        if str(k) in errors:
            continue
        run = jax.jit(lambda a, plan=plan: _launch.run_plan(plan, p, a, backend)["dx" if back else "y"])
        calls = [functools.partial(run, {n: i[n] for n in names}) for i in inputs]
        try:
            out = calls[k % len(calls)]()
            distances[str(k)] = agree(op, last, (out,) if back else out, sets[k % len(sets)])
            runs.append(timing.Program(str(k), calls, jax.block_until_ready))
        except Exception as e:
            errors[str(k)] = f"{type(e).__name__}: {e}"[:300]
    timed = timing.measure(
        timer, [copy(nbytes, len(sets)), *runs], nbytes, read, lambda who, e: errors.update({who: str(e)[:300]})
    )
    copy_us = timed.pop("copy", {}).get("median_us")
    ranking = []
    for k, t in sorted(timed.items(), key=lambda e: e[1]["median_us"]):
        entry = {"us": t["median_us"], "picked": k == "0", "distance": distances[k], "kernels": t["kernels"]}
        ranking.append(entry | {"plan": describe(plans[int(k)])})
    record = {"op": op, "shape": shape, "backend": backend, "copy_us": copy_us}
    return record | {"ranking": ranking, "errors": errors}


def show(key: str, record: dict[str, Any]) -> str:
    if "ranking" in record:
        best = [f"{e['us']:.2f}{'*' if e['picked'] else ''} {'; '.join(e['plan'])}" for e in record["ranking"][:3]]
        own = [f"plan {e['us']:.2f}" for e in record["ranking"] if e["picked"]]
        bad = [f"WRONG {e['distance']:.1e} {e['plan']}" for e in record["ranking"] if not e["distance"] < 0.01]
        return "\n    ".join(
            [f"{key} copy {record['copy_us']:.2f}", *own, *best, *bad, *list(record["errors"].values())[:2]]
        )
    times = {k: v["median_us"] for k, v in record["times"].items()}
    copy_us = times.pop("copy", float("nan"))
    shown = [f"{k} {v:.2f} ({v / copy_us:.2f})" for k, v in times.items()]
    shown += [f"WRONG {k} {d:.1e}" for k, d in record["distances"].items() if not d < 0.01]
    shown += [f"ERROR {k}: {e[:100]}" for k, e in record["errors"].items()]
    return " ".join([f"{key:34s} copy {copy_us:8.2f}", *shown])


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.groupnorm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--cells", default=CELLS, help="comma list of BATCHxSPATIAL...xCHANNELS")
    p.add_argument("--layouts", default="nhwc,nchw")
    p.add_argument("--ops", default=",".join(OPS))
    p.add_argument("--sweep", default="", help="comma list of backends whose candidates are timed instead")
    p.add_argument("--budget-seconds", type=float, default=120)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / ("groupnorm_sweep.json" if args.sweep else "groupnorm.json")
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    todo = [
        (op, cell, layout, backend)
        for cell in args.cells.split(",")
        for op in args.ops.split(",")
        for layout in args.layouts.split(",")
        for backend in args.sweep.split(",")
    ]
    longest = 0.0
    for op, cell, layout, backend in todo:
        key = " ".join(filter(None, (op, layout, cell, backend)))
        if key in results["cells"]:
            continue
        if time.time() - start + longest > args.budget_seconds:
            print(f"budget: stopped before {key}; the same command goes on from here")
            break
        began, last = time.time(), layout == "nhwc"
        try:
            record = sweep(timer, op, cell, last, backend) if backend else measure(timer, op, cell, last)
            print(show(key, record), flush=True)
        except Exception as e:
            record = {"errors": {"cell": f"{type(e).__name__}: {e}"[:400]}, "times": {}}
            print(key, record["errors"]["cell"], flush=True)
        results["cells"][key] = record
        store.write_json(path, results)
        longest = max(longest, time.time() - began)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
