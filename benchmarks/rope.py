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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn

from . import op_sweep, store, timing
from .quant import copy

FORMAT = "jaxnorm-rope-bench/1"
D, HQ, HK, MAX = 128, 64, 8, 8192
TOKENS = (1, 16, 128, 1024, 8192)
TWO = "qk_norm_rope_two_stream"
OPS = ("qk_norm_rope", "rope", "qk_norm_rope_bwd", "rope_bwd", TWO, "mrope")
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


def ours(op: str, backend: str) -> Call:
    """The public function, of ``(q, k, wq, wk, positions, table[, dq, dk])``."""
    if op.startswith("rope"):
        f: Call = lambda q, k, wq, wk, p, t: jn.rope((q, k), p, t, backend=backend)  # noqa: E731
    elif op == "mrope":
        options = {"sections": (24, 20, 20), "interleaved": True, "backend": backend}
        return lambda q, k, wq, wk, p, t: jn.mrope((q, k), p, t, **options)
    elif op == TWO:
        return lambda q0, k0, q1, k1, w, t0, t1: jn.qk_norm_rope_two_stream(
            q0, k0, q1, k1, w, w, w, w, t0, t1, backend=backend
        )
    else:
        f = functools.partial(jn.qk_norm_rope, backend=backend)
    return backward(f, op.startswith("qk")) if op.endswith("_bwd") else f


def plain(op: str) -> Call | None:
    """The same as one writes it in jax.numpy."""
    if op in ("mrope", TWO):
        return None
    if op.startswith("rope"):
        f: Call = lambda q, k, wq, wk, p, t: (plain_rope(q, p, t), plain_rope(k, p, t))  # noqa: E731
    else:
        f = lambda q, k, wq, wk, p, t: (plain_qk(q, wq, p, t), plain_qk(k, wk, p, t))  # noqa: E731
    return backward(f, op.startswith("qk")) if op.endswith("_bwd") else f


def sweep_cases() -> Iterator[op_sweep.Case]:
    """``qk_norm_rope`` and so on, for ``op_sweep``; a shape is tokens x D."""
    for op in OPS:

        def function(backend: str, op: str = op) -> Any:
            f = ours(op, backend)
            # the weights' gradients have another order of sums in each plan
            return (lambda *a: f(*a)[:2]) if op.endswith("_bwd") else f

        yield op_sweep.Case(
            op, function, lambda s, i, op=op: arguments(op, s[0], i), lambda s, op=op: traffic(op, s[0])
        )


def traffic(op: str, tokens: int) -> tuple[int, int]:
    """(bytes moved, bytes of one set of inputs)."""
    size = 2 * D * tokens * sum(heads(op))
    reads = size * (2 if op == "qk_norm_rope_bwd" else 1) + 4 * D * tokens
    return reads + size, reads


def heads(op: str) -> tuple[int, int]:
    return (24, 24) if op == TWO else (HQ, HK)


@functools.cache
def table() -> jax.Array:
    return jn.rope_table(MAX, D)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(i: int, tokens: int, count: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), (tokens, count, D), jnp.bfloat16)


def arguments(op: str, tokens: int, i: int) -> tuple[Any, ...]:
    """The i-th set of arguments."""
    w = jnp.ones(D, jnp.bfloat16) * 1.25
    q, k, dq, dk = (normal(4 * i + j, tokens, h) for j, h in enumerate((*heads(op), *heads(op))))
    positions = (jnp.arange(tokens, dtype=jnp.int32) * 7 + i) % MAX
    if op == TWO:
        text = max(1, tokens // 2 // 9)
        pair = [a.reshape(2, tokens // 2, 24, D) for a in (q, k)]
        parts = [a[:, s] + 0 for s in (slice(0, text), slice(text, None)) for a in pair]
        return (*parts, w, table()[:text], table()[text : tokens // 2])
    if op == "mrope":
        positions = jnp.stack([positions, positions // 2, positions // 3])
    return (q, k, w, w, positions, table(), *((dq, dk) if op.endswith("_bwd") else ()))


def measure(timer: timing.Timer, op: str, tokens: int) -> dict[str, Any]:
    nbytes, reads = traffic(op, tokens)
    sets = [arguments(op, tokens, i) for i in range(timing.rotation(reads)[0])]
    named = [(f"jaxnorm-{b}", jax.jit(ours(op, b))) for b in ("hip", "triton")]
    if (written := plain(op)) is not None:
        named.append(("xla", jax.jit(written)))
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
            if key in results["cells"] or (op == TWO and tokens < 4):
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
