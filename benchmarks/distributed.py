"""Fused distributed calls, their composite and plain collectives, on 2, 4 or 8 GPUs of one host.

    python -m benchmarks.distributed --out DIR [--ranks 4,2] [--features 8192,7168] [--rows 16,128,...] [--budget-seconds 240]

Microseconds of one call of ``reduce_scatter_rmsnorm_quant_all_gather`` (bfloat16 in, fp8 with a scale a row out, bfloat16 weight):
the wall clock of a jitted loop of K calls, each fed by the one before, divided by K; the best of 5. ``loop`` is the same with
nothing called: its cost is in every figure. Kernel durations would not do: a kernel that waits for another GPU is long. Each pair
of ranks and features runs in a process of its own that is killed when its time is up; ``distributed.json`` is written after every
cell, and a second run goes on from there. At the end: what the figures suggest for ``jaxnorm/distributed/schedule.py``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxnorm._bench import store

FORMAT = "jaxnorm-distributed-bench/1"
MAIN = (16, 128, 1024, 8192)
OTHERS = (1, 4, 64, 256, 512, 2048, 4096, 2, 8, 32)
GRIDS = (66, 132, 264, 528)
LINK = 450e9
"""Bytes a second and direction of NVLink 4."""


def floor_us(rows: int, n: int, ranks: int) -> dict[str, float]:
    """What the links alone need, by schedule."""
    two = (ranks - 1) / ranks * rows * (2 * n + n + 4)
    return {"one-shot": (ranks - 1) * rows * n * 2 / LINK * 1e6, "two-shot": two / LINK * 1e6}


def contestants(rows: int, n: int) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(name, arguments of the call, arguments of ``schedule.force``)"""
    yield "composite", {"impl": "composite"}, {}
    yield "fused", {"impl": "fused"}, {}
    yield "one-shot", {"impl": "fused"}, {"schedule": "one-shot"}
    if rows not in MAIN:
        yield "two-shot", {"impl": "fused"}, {"schedule": "two-shot"}
        return
    for grid in GRIDS if n == 8192 and rows > 128 else (None,):
        yield f"two-shot/{grid}" if grid else "two-shot", {"impl": "fused"}, {"schedule": "two-shot", "blocks": grid}
    if n == 8192:
        yield "composite-gathering-partials", {"impl": "composite"}, {"few": True}
        yield "composite-exchanging", {"impl": "composite"}, {"few": False}
        yield "composite-native", {"impl": "composite", "reduce": "native"}, {}
        yield "psum-then-norm", {}, None
        yield "loop", {}, None


def local(name: str, options: dict[str, Any], spec: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The call of one rank: x [M, N] and weight -> codes and scales."""
    import jax
    import jax.numpy as jnp

    import jaxnorm as jn

    if name == "psum-then-norm":
        return lambda x, w: _parts(jn.rmsnorm_quant(jax.lax.psum(x, "tp"), w, spec))
    if name == "loop":
        return lambda x, w: (jnp.zeros(x.shape, spec.dtype), x[:, :1].astype(jnp.float32))
    return lambda x, w: _parts(
        jn.distributed.reduce_scatter_rmsnorm_quant_all_gather(x, w, spec, axis_name="tp", **options)
    )


def _parts(q: Any) -> tuple[Any, Any]:
    return q.values, q.scale


def compiled(name: str, options: dict[str, Any], force: Any, mesh: Any, rows: int, n: int, calls: int) -> Any:
    """The loop, compiled: (x [W, M, N], weight) -> the last call's results, one a rank."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxnorm as jn
    from jaxnorm.distributed import schedule

    spec = jn.QuantSpec("float8_e4m3fn")
    call = local(name, options, spec)

    def rank(x: Any, w: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            x, _, s = state
            return x.at[0, 0].add((s[0, 0] * 0).astype(x.dtype)), *call(x, w)

        start = (x[0], jnp.zeros((rows, n), spec.dtype), jnp.zeros((rows, 1), jnp.float32))
        _, q, s = jax.lax.fori_loop(0, calls, body, start)
        return q[None], s[None]

    f = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp"), check_vma=False))
    ranks = mesh.devices.size
    x = jax.ShapeDtypeStruct((ranks, rows, n), jnp.bfloat16, sharding=NamedSharding(mesh, P("tp")))
    w = jax.ShapeDtypeStruct((n,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with schedule.force(**(force or {})):
        return f.lower(x, w).compile()


def measure(mesh: Any, rows: int, n: int) -> dict[str, Any]:
    """Microseconds by contestant, and what failed."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxnorm.distributed import check

    ranks = mesh.devices.size
    calls = 200 if rows <= 1024 else 60
    make = functools.partial(jax.random.normal, shape=(ranks, rows, n), dtype=jnp.bfloat16)
    x = jax.jit(make, out_shardings=NamedSharding(mesh, P("tp")))(jax.random.key(rows))
    w = jax.device_put(np.linspace(0.5, 1.5, n).astype(jnp.bfloat16), NamedSharding(mesh, P()))
    found = list(contestants(rows, n))
    times: dict[str, float] = {}
    errors: dict[str, str] = {}
    last: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = {name: pool.submit(compiled, name, o, force, mesh, rows, n, calls) for name, o, force in found}
        for name, program in programs.items():
            try:
                run = program.result()
                out = jax.block_until_ready(run(x, w))
                best = float("inf")
                for _ in range(5):
                    start = time.perf_counter()
                    jax.block_until_ready(run(x, w))
                    best = min(best, (time.perf_counter() - start) / calls)
                check()
                times[name] = round(best * 1e6, 2)
                last[name] = np.asarray(out[1][:, :, 0])
            except Exception as e:
                errors[name] = f"{type(e).__name__}: {e}"[:600]
    for name, scales in last.items():  # a timed program that is wrong is no contestant
        want = last.get("composite")
        off = name != "loop" and want is not None and not np.allclose(scales, want, rtol=2e-2)
        if off or (not (scales == scales[0]).all() and name != "loop"):
            errors[name] = "its scales are not the composite's"
            times.pop(name)
    return {"rows": rows, "features": n, "ranks": ranks, "calls": calls, "us": times, "errors": errors,
            "floor_us": {k: round(v, 2) for k, v in floor_us(rows, n, ranks).items()}}  # fmt: skip


def suggest(cells: dict[str, Any]) -> list[str]:
    """Lines on what the figures say about the thresholds."""
    lines = []
    for ranks in sorted({c["ranks"] for c in cells.values()}):
        mine = [c for c in cells.values() if c["ranks"] == ranks and "composite" in c["us"]]
        ahead, behind = [], []
        for c in mine:
            two = min((v for k, v in c["us"].items() if k.startswith("two-shot")), default=float("inf"))
            side = ahead if c["us"].get("one-shot", float("inf")) <= two else behind
            side.append(c["rows"] * c["features"] * 2)
        lines.append(
            f"{ranks} ranks: one shot ahead up to {max(ahead, default=0)} bytes, behind from {min(behind, default=0)}"
        )
        lost = [
            f"{c['rows']}x{c['features']}" for c in mine if c["us"].get("fused", float("inf")) >= c["us"]["composite"]
        ]
        lines.append(
            f"{ranks} ranks: fused ahead of the composite at {len(mine) - len(lost)} of {len(mine)}, not at: {lost}"
        )
        lines += [_line(c) for c in sorted(mine, key=lambda c: (c["features"], c["rows"]))]
    return lines


def _line(cell: dict[str, Any]) -> str:
    us = cell["us"]
    fused = {k: v for k, v in us.items() if k in ("fused", "one-shot") or k.startswith("two-shot")}
    best = min(fused, key=lambda k: fused[k], default="")
    ratio = us["composite"] / fused[best] if best else float("nan")
    return f"  {cell['rows']:5d}x{cell['features']} composite {us['composite']:8.1f}  {best} {fused.get(best, 0):.1f}  x{ratio:.2f}"


def read(path: pathlib.Path) -> dict[str, Any]:
    return store.read_json(path) or {"format": FORMAT, "method": " ".join((__doc__ or "").split()), "cells": {}}


def worker(path: pathlib.Path, ranks: int, n: int, rows: list[int], seconds: float) -> None:
    """The cells of one number of ranks and features, in this process."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    start = time.monotonic()
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",))
    results = read(path)
    results["environment"] = store.environment()
    for m in rows:
        key = f"{ranks} ranks {m}x{n}"
        if key in results["cells"]:
            continue
        if time.monotonic() - start > seconds:
            break
        results["cells"][key] = measure(mesh, m, n)
        store.write_json(path, results)
        cell = results["cells"][key]
        errors = [f"ERROR {k}: {v[:160]}" for k, v in cell["errors"].items()]
        print(f"{key:22s}", *(f"{k} {v:.1f}" for k, v in cell["us"].items()), *errors, flush=True)


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--ranks", default="4,2")
    p.add_argument("--features", default="8192,7168")
    p.add_argument("--rows", default=",".join(map(str, (*MAIN, *OTHERS))))
    p.add_argument("--budget-seconds", type=float, default=240)
    p.add_argument("--worker", action="store_true", help="run the one pair of ranks and features in this process")
    args = p.parse_args()
    path = args.out / "distributed.json"
    rows = [int(m) for m in args.rows.split(",")]
    if args.worker:
        worker(path, int(args.ranks), int(args.features), rows, args.budget_seconds)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    env = os.environ | {"JAXNORM_REQUIRE": "fused,launcher", "JAXNORM_FUSED_COMM": "1", "NCCL_NVLS_ENABLE": "0",
                        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}  # fmt: skip
    # the four sizes of the targets first, over all numbers of ranks; then everything else
    for part in ([m for m in rows if m in MAIN], [m for m in rows if m not in MAIN]):
        for n in args.features.split(","):
            for ranks in args.ranks.split(","):
                left = args.budget_seconds - (time.monotonic() - start)
                todo = [m for m in part if f"{ranks} ranks {m}x{n}" not in read(path)["cells"]]
                if not todo:
                    continue
                if left < 20:
                    print(f"budget: stopped before {ranks} ranks, N={n}; the same command goes on from here")
                    continue
                command = [sys.executable, "-m", "benchmarks.distributed", "--worker", "--out", str(args.out), "--ranks", ranks,
                           "--features", n, "--rows", ",".join(map(str, todo)), "--budget-seconds", str(left - 15)]  # fmt: skip
                child = subprocess.Popen(command, env=env, start_new_session=True)
                try:
                    child.wait(timeout=min(left, 100))
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    print(f"KILLED {ranks} ranks, N={n}", flush=True)
    print("\n".join(suggest(read(path)["cells"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
