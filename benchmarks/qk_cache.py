"""Device time of qk_norm_rope_cache beside the jitted jnp composition and a copy of the same bytes.

    python -m benchmarks.qk_cache --out DIR [--tokens 1,16,128,...] [--caches bf16-paged,fp8-shuffled,...] [--budget-seconds 120]

Method as in ``timing``: kernel durations from CUPTI, cold L2, medians, contestants in turns; every call gets the cache donated that
it returned before. Writes ``qk_cache.json`` after every cell. 64 q heads, 8 kv heads, D 128, packed bfloat16 qkv, a float32 table,
pages of 64 slots. Up to 128 tokens are a decode, each token in a page of its own; more are prompts: whole pages, in any order.
Bytes: qkv and a row of the table a token read once, q and the token's place in the cache with its scales written once.
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
from .rope import plain_qk

FORMAT = "jaxnorm-qk-cache-bench/1"
D, HQ, HK, MAX, PAGE = 128, 64, 8, 8192, 64
TOKENS = (1, 16, 128, 1024, 8192)
CACHES = {
    "bf16-paged": ("bfloat16", None, "paged"),
    "bf16-shuffled": ("bfloat16", None, "shuffled"),
    "fp8-shuffled": ("float8_e4m3fn", "per_token", "shuffled"),
    "fp8-paged": ("float8_e4m3fn", "per_token", "paged"),
    "int8-shuffled": ("int8", "per_token", "shuffled"),
}
Call = Callable[..., Any]


def ours(backend: str) -> Call:
    """``(qkv, w, positions, table, slots, cache) -> (q, cache)``"""

    def run(qkv: Any, w: Any, positions: Any, table: Any, slots: Any, cache: Any) -> Any:
        return jn.qk_norm_rope_cache(
            qkv, w, w, positions, table, cache, slots, num_q_heads=HQ, num_kv_heads=HK, backend=backend
        )

    return run


def plain(qkv: Any, w: Any, positions: Any, table: Any, slots: Any, cache: jn.KVCache) -> Any:
    """The same as one writes it in jax.numpy."""
    q, k, v = (p.reshape(qkv.shape[0], -1, D) for p in jnp.split(qkv, [HQ * D, (HQ + HK) * D], -1))
    q, k = plain_qk(q, w, positions, table), plain_qk(k, w, positions, table)
    page, place = slots // PAGE, slots % PAGE
    found = []
    for name, x in (("k", k), ("v", v)):
        buffer, scale = getattr(cache, name), getattr(cache, f"{name}_scale")
        if cache.quant:
            top = 127.0 if buffer.dtype == jnp.int8 else float(jnp.finfo(buffer.dtype).max)
            s = jnp.maximum(jnp.max(jnp.abs(x.astype(jnp.float32)), -1), 1e-12) / top
            x = jnp.clip(x.astype(jnp.float32) / s[..., None], -top, top)
            x = (jnp.round(x) if buffer.dtype == jnp.int8 else x).astype(buffer.dtype)
            at = scale.at[page, :, place] if cache.layout == "shuffled" else scale.at[page, place]
            scale = at.set(s)
        width = 16 // buffer.dtype.itemsize
        if cache.layout == "paged":
            buffer = buffer.at[page, place].set(x)
        elif name == "k":
            buffer = buffer.at[page, :, :, place].set(x.reshape(*x.shape[:-1], D // width, width))
        else:
            buffer = buffer.at[page, :, place // width, :, place % width].set(x)
        found.append((buffer, scale))
    (k, k_scale), (v, v_scale) = found
    return q, jax.tree.unflatten(jax.tree.structure(cache), [a for a in (k, v, k_scale, v_scale) if a is not None])


def traffic(kind: str, tokens: int) -> tuple[int, int]:
    """(bytes moved, bytes of one set of inputs)."""
    dtype, quant, _ = CACHES[kind]
    reads = tokens * (2 * D * (HQ + 2 * HK) + 4 * D)
    stored = tokens * 2 * HK * (D * jnp.dtype(dtype).itemsize + (4 if quant else 0))
    return reads + tokens * 2 * D * HQ + stored, reads


@functools.cache
def table() -> jax.Array:
    return jn.rope_table(MAX, D)


@functools.partial(jax.jit, static_argnums=1)
def normal(i: int, tokens: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), (tokens, (HQ + 2 * HK) * D), jnp.bfloat16)


def arguments(kind: str, tokens: int, i: int) -> tuple[Any, ...]:
    """The i-th set of arguments."""
    dtype, quant, layout = CACHES[kind]
    pages = -(-tokens // PAGE) if tokens > 128 else tokens
    order = jax.random.permutation(jax.random.key(1000 + i), pages).astype(jnp.int32)
    number = jnp.arange(tokens, dtype=jnp.int32)
    if tokens > 128:
        slots = order[number // PAGE] * PAGE + number % PAGE
    else:
        slots = order * PAGE + (number * 29 + i) % PAGE
    cache = jn.KVCache.create(pages, PAGE, HK, D, dtype=dtype, quant=quant, layout=layout)
    w = jnp.ones(D, jnp.bfloat16) * 1.25
    return normal(i, tokens), w, (number * 7 + i) % MAX, table(), slots, cache


def sweep_cases() -> Iterator[op_sweep.Case]:
    """For ``op_sweep``; a shape is tokens x D. The cache is not donated there, and its copy counted for every plan alike."""
    for kind in CACHES:
        yield op_sweep.Case(
            kind, ours, lambda s, i, kind=kind: arguments(kind, s[0], i), lambda s, kind=kind: traffic(kind, s[0])
        )


def program(name: str, f: Call, kind: str, tokens: int, count: int) -> timing.Program:
    """Calls on sets of arguments, each with the cache that it returned the last time."""
    jitted = jax.jit(f, donate_argnums=5)

    def call(held: list[Any]) -> Any:
        q, held[5] = jitted(*held)
        return q, held[5].k

    sets = [list(arguments(kind, tokens, i)) for i in range(count)]
    return timing.Program(name, [functools.partial(call, s) for s in sets], jax.block_until_ready)


def measure(timer: timing.Timer, kind: str, tokens: int) -> dict[str, Any]:
    nbytes, reads = traffic(kind, tokens)
    count = timing.rotation(reads)[0]
    errors: dict[str, str] = {}
    runs = []
    for name, f in (("jaxnorm-hip", ours("hip")), ("jaxnorm-triton", ours("triton")), ("xla", plain)):
        try:
            p = program(name, f, kind, tokens, count)
            for call in p.calls:
                jax.block_until_ready(call())
            runs.append(p)
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"[:400]
    timed = timing.measure(
        timer, [copy(nbytes, count), *runs], nbytes, reads, lambda who, e: errors.update({who: str(e)[:400]})
    )
    return {"cache": kind, "tokens": tokens, "bytes": nbytes, "times": timed, "errors": errors}


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.qk_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--tokens", default=",".join(map(str, reversed(TOKENS))))
    p.add_argument("--caches", default=",".join(CACHES))
    p.add_argument("--budget-seconds", type=float, default=120)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / "qk_cache.json"
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    for tokens in map(int, args.tokens.split(",")):
        for kind in args.caches.split(","):
            key = f"{kind} T={tokens}"
            if key in results["cells"]:
                continue
            if time.time() - start > args.budget_seconds:
                print(f"budget: stopped before {key}; the same command goes on from here")
                return 0
            try:
                results["cells"][key] = measure(timer, kind, tokens)
            except Exception as e:
                results["cells"][key] = {"errors": {"cell": f"{type(e).__name__}: {e}"[:400]}, "times": {}}
            store.write_json(path, results)
            times = {k: v["median_us"] for k, v in results["cells"][key]["times"].items()}
            copy_us = times.get("copy", float("nan"))
            print(f"{key:24s} copy {copy_us:8.2f}", *(f"{k} {v:.2f} ({v / copy_us:.2f})" for k, v in times.items() if k != "copy"),
                  *(f"ERROR {k}: {e[:120]}" for k, e in results["cells"][key]["errors"].items()), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
