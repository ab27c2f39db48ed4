"""Device time of rope and qk_norm_rope, forward and backward, beside plain XLA and a copy of the same bytes.

    python -m benchmarks.rope --out DIR [--tokens 1,16,128,1024,8192] [--ops rope,rope_bwd,...] [--budget-seconds 120]

Method as in ``timing``: kernel durations from CUPTI, cold L2, medians, contestants in turns. Writes ``rope.json`` after every
cell. 64 q heads, 8 kv heads, D 128, bfloat16, a float32 table (two streams: batch 2, 24 heads, 1/9 of the tokens text). Bytes: each
input read once, each output written once, a row of the table once a token.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn

from . import store, timing
from .quant import copy

FORMAT = "jaxnorm-rope-bench/1"
D, HQ, HK, MAX = 128, 64, 8, 8192
TOKENS = (1, 16, 128, 1024, 8192)
OPS = ("qk_norm_rope", "rope", "qk_norm_rope_bwd", "rope_bwd", "qk_norm_rope_two_stream", "mrope")
Call = Callable[..., Any]


def plain_rope(x: jax.Array, positions: jax.Array, table: jax.Array) -> jax.Array:
    row = table[positions][:, None, :]
    c, s = row[..., : D // 2], row[..., D // 2 :]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1).astype(x.dtype)


def plain_qk(x: jax.Array, w: jax.Array, positions: jax.Array, table: jax.Array) -> jax.Array:
    n = x.astype(jnp.float32)
    n = n * jax.lax.rsqrt(jnp.mean(n * n, -1, keepdims=True) + 1e-6) * w.astype(jnp.float32)
    return plain_rope(n.astype(x.dtype), positions, table)


def backward(f: Call, weights: bool) -> Call:
    """The gradient alone: what the forward pass computes is not used and goes."""

    def run(q: Any, k: Any, wq: Any, wk: Any, positions: Any, table: Any, dq: Any, dk: Any) -> Any:
        if weights:
            return jax.vjp(lambda *a: f(*a, positions, table), q, k, wq, wk)[1]((dq, dk))
        return jax.vjp(lambda q, k: f(q, k, wq, wk, positions, table), q, k)[1]((dq, dk))

    return run


def functions(op: str) -> tuple[Callable[[str], Call], Call | None]:
    """(function of the backend, plain XLA) of ``(q, k, wq, wk, positions, table[, dq, dk])``."""
    if op.startswith("rope"):
        ours = lambda b: lambda q, k, wq, wk, p, t: jn.rope((q, k), p, t, backend=b)  # noqa: E731
        plain = lambda q, k, wq, wk, p, t: (plain_rope(q, p, t), plain_rope(k, p, t))  # noqa: E731
    elif op == "mrope":
        ours = lambda b: (
            lambda q, k, wq, wk, p, t: jn.mrope((q, k), p, t, sections=(24, 20, 20), interleaved=True, backend=b)
        )  # noqa: E731
        return ours, None
    elif op == "qk_norm_rope_two_stream":
        ours = lambda b: (
            lambda q0, k0, q1, k1, w, t0, t1: jn.qk_norm_rope_two_stream(  # noqa: E731
                q0, k0, q1, k1, w, w, w, w, t0, t1, backend=b
            )
        )
        return ours, None
    else:
        ours = lambda b: lambda q, k, wq, wk, p, t: jn.qk_norm_rope(q, k, wq, wk, p, t, backend=b)  # noqa: E731
        plain = lambda q, k, wq, wk, p, t: (plain_qk(q, wq, p, t), plain_qk(k, wk, p, t))  # noqa: E731
    if op.endswith("_bwd"):
        weights = op.startswith("qk")
        return (lambda b: backward(ours(b), weights)), backward(plain, weights)
    return ours, plain


def inputs(op: str, tokens: int) -> tuple[list[tuple[Any, ...]], int, int]:
    """(sets of arguments that together are larger than the cache, bytes moved, bytes read)."""
    two = op == "qk_norm_rope_two_stream"
    heads = (24, 24) if two else (HQ, HK)
    size = 2 * D * tokens * sum(heads)
    reads = size * (2 if op == "qk_norm_rope_bwd" else 1) + 4 * D * tokens
    count, _ = timing.rotation(reads)
    table, w = jn.rope_table(MAX, D), jnp.ones(D, jnp.bfloat16) * 1.25
    normal = jax.jit(lambda i, h: jax.random.normal(jax.random.key(i), (tokens, h, D), jnp.bfloat16), static_argnums=1)
    sets: list[tuple[Any, ...]] = []
    for i in range(count):
        q, k, dq, dk = (normal(4 * i + j, h) for j, h in enumerate((*heads, *heads)))
        positions = (jnp.arange(tokens, dtype=jnp.int32) * 7 + i) % MAX
        if two:
            text = max(1, tokens // 2 // 9)
            pair = [a.reshape(2, tokens // 2, 24, D) for a in (q, k)]
            parts = [a[:, s] + 0 for s in (slice(0, text), slice(text, None)) for a in pair]
            sets.append((*parts, w, table[:text], table[text : tokens // 2]))
        elif op == "mrope":
            sets.append((q, k, w, w, jnp.stack([positions, positions // 2, positions // 3]), table))
        else:
            sets.append((q, k, w, w, positions, table, *((dq, dk) if op.endswith("_bwd") else ())))
    return sets, reads + size, reads


def measure(timer: timing.Timer, op: str, tokens: int) -> dict[str, Any]:
    sets, nbytes, reads = inputs(op, tokens)
    ours, plain = functions(op)
    named = [(f"jaxnorm-{b}", jax.jit(ours(b))) for b in ("hip", "triton")]
    if plain is not None:
        named.append(("xla", jax.jit(plain)))
    runs = [timing.Program(n, [functools.partial(f, *s) for s in sets], jax.block_until_ready) for n, f in named]
    errors: dict[str, str] = {}
    for p in list(runs):
        try:
            jax.block_until_ready([call() for call in p.calls])
        except Exception as e:
            errors[p.name] = f"{type(e).__name__}: {e}"[:400]
            runs.remove(p)
    timed = timing.measure(
        timer, [copy(nbytes, len(sets)), *runs], nbytes, reads, lambda who, e: errors.update({who: str(e)[:400]})
    )
    return {"op": op, "tokens": tokens, "bytes": nbytes, "times": timed, "errors": errors}


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.rope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--tokens", default=",".join(map(str, reversed(TOKENS))))
    p.add_argument("--ops", default=",".join(OPS))
    p.add_argument("--budget-seconds", type=float, default=120)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / "rope.json"
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    for tokens in map(int, args.tokens.split(",")):
        for op in args.ops.split(","):
            key = f"{op} T={tokens}"
            if key in results["cells"] or (op == "qk_norm_rope_two_stream" and tokens < 4):
                continue
            if time.time() - start > args.budget_seconds:
                print(f"budget: stopped before {key}; the same command goes on from here")
                return 0
            try:
                results["cells"][key] = measure(timer, op, tokens)
            except Exception as e:
                results["cells"][key] = {"errors": {"cell": f"{type(e).__name__}: {e}"[:400]}, "times": {}}
            store.write_json(path, results)
            times = {k: v["median_us"] for k, v in results["cells"][key]["times"].items()}
            copy_us = times.get("copy", float("nan"))
            print(f"{key:34s} copy {copy_us:8.2f}", *(f"{k} {v:.2f} ({v / copy_us:.2f})" for k, v in times.items() if k != "copy"),
                  *(f"ERROR {k}: {e[:120]}" for k, e in results["cells"][key]["errors"].items()), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
