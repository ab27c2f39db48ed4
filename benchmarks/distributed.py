"""Fused distributed calls, their composite and plain collectives, on 2, 4 or 8 GPUs of one host.

    python -m benchmarks.distributed --out DIR [--ranks 4,2] [--features 8192,7168] [--rows 16,128,...] [--budget-seconds 240]

Microseconds of one call of ``reduce_scatter_rmsnorm_quant_all_gather`` (bfloat16 in and weight, fp8 with a scale a row out),
as the slope between two lengths of a chain: a jitted program of K calls, each of which needs codes and scales of the one before:
they make the first element of x, which a kernel of one element writes in place; it is in every contestant's figure (``tie``: one
more of it a call, measured the same way). That no call of a chain was merged with another is checked in the compiled program.
Wall clock, in nine rounds over all contestants of a cell, each beginning with another one: the shortest of four runs of each
length, in turns, and the difference of the two by that of the lengths: what a program enqueues once, and what its first kernel
waits for, is in neither. A figure is the median of the rounds' slopes; ``spread_us`` has the smallest and the largest. ``fused``,
``auto`` and one of the schedules are the same program: what they differ by is noise. (Timed one after the other, as before
format 4, equal programs differed by up to 4 us at few rows, by 25 at 8192.)
XLA's default flags unless XLA_FLAGS says otherwise: fused calls are then replayed in CUDA graphs, NCCL's are not. All calls read
the same partial sums, which few rows leave in the L2 as the product before them would. Kernel durations would not do: a kernel
that waits for another GPU is long. Each pair of ranks and features runs in a process of its own that is killed when its time is
up; it compiles all of its programs before it times the first. ``distributed.json`` is written after every cell, and a second run
goes on from there. At the end: what the figures suggest for ``jaxnorm/distributed/schedule.py``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxnorm._bench import store

FORMAT = "jaxnorm-distributed-bench/4"
MAIN = (1, 16, 128, 1024, 8192)
OTHERS = (4, 64, 256, 512, 2048, 4096, 2, 8, 32)
LENGTHS = {1024: (8, 32), 8192: (4, 12)}
"""Calls of the two chains, up to so many rows."""
ROUNDS, REPEATS = 9, 4
LINK = 450e9
"""Bytes a second and direction of NVLink 4."""


def floor_us(rows: int, n: int, ranks: int) -> dict[str, float]:
    """What the links alone need, by schedule."""
    two = (ranks - 1) / ranks * rows * (2 * n + n + 4)
    return {"one-shot": (ranks - 1) * rows * n * 2 / LINK * 1e6, "two-shot": two / LINK * 1e6}


Contestant = tuple[str, dict[str, Any], dict[str, Any] | None]
"""(name, arguments of the call, arguments of ``schedule.force``)"""


def contestants(rows: int) -> list[Contestant]:
    fused = {"impl": "fused"}
    found: list[Contestant] = [
        ("composite", {"impl": "composite"}, {}),
        ("fused", fused, {}),
        ("auto", {}, {}),
        ("psum-then-norm", {}, {}),
        ("one-shot", fused, {"schedule": "one-shot"}),
        ("two-shot", fused, {"schedule": "two-shot"}),
    ]
    if rows in MAIN:
        found += [
            ("composite-gathering-partials", {"impl": "composite"}, {"few": True}),
            ("composite-exchanging", {"impl": "composite"}, {"few": False}),
            ("composite-native", {"impl": "composite", "reduce": "native"}, {}),
            ("fused, two ties", fused, {}),
        ]
    return found


def local(name: str, options: dict[str, Any], spec: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The call of one rank: x [M, N] and weight -> codes and scales."""
    import jax

    import jaxnorm as jn

    if name == "psum-then-norm":
        return lambda x, w: _parts(jn.rmsnorm_quant(jax.lax.psum(x, "tp"), w, spec))
    return lambda x, w: _parts(
        jn.distributed.reduce_scatter_rmsnorm_quant_all_gather(x, w, spec, axis_name="tp", **options)
    )


def _parts(q: Any) -> tuple[Any, Any]:
    return q.values, q.scale


def compiled(contestant: Contestant, mesh: Any, rows: int, n: int, calls: int) -> Any:
    """The chain, compiled: (x [W, M, N], weight) -> the last call's results, one a rank."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxnorm as jn
    from jaxnorm.distributed import schedule

    name, options, force = contestant
    call = jax.jit(local(name, options, jn.QuantSpec("float8_e4m3fn")))  # traced once, inlined by XLA

    def rank(x: Any, w: Any) -> Any:
        x = x[0]
        for _ in range(calls):
            q, s = call(x, w)
            for _ in range(2 if "two ties" in name else 1):
                tied = (q[-1, -1].astype(jnp.float32) * 0 + s[-1, 0] * 0 + 1).astype(x.dtype)
                x = jax.lax.optimization_barrier(x.at[0, 0].set(tied))
        return q[None], s[None], x[None, :1, :1]

    f = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp"), check_vma=False))
    ranks = mesh.devices.size
    x = jax.ShapeDtypeStruct((ranks, rows, n), jnp.bfloat16, sharding=NamedSharding(mesh, P("tp")))
    w = jax.ShapeDtypeStruct((n,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with schedule.force(**(force or {})):
        return f.lower(x, w).compile()


def inputs(mesh: Any, rows: int, n: int) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    make = functools.partial(jax.random.normal, shape=(mesh.devices.size, rows, n), dtype=jnp.bfloat16)
    x = jax.jit(make, out_shardings=NamedSharding(mesh, P("tp")))(jax.random.key(rows))
    return x, jax.device_put(np.linspace(0.5, 1.5, n).astype(jnp.bfloat16), NamedSharding(mesh, P()))


def seconds(run: Callable[[Any, Any], Any], x: Any, w: Any) -> float:
    """Of one run. Its results are dropped before the next, which then finds the same memory."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run(x, w))
    return time.perf_counter() - start


def slopes(
    pairs: dict[str, list[Any]], calls: tuple[int, int], run: Callable[[Any], float], errors: dict[str, str]
) -> dict[str, list[float]]:
    """Microseconds of a call in each round, by contestant: a pair of programs of ``calls`` calls. ``run`` gives the seconds
    of a program. A contestant that fails is named in ``errors`` and runs no more."""
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for i in range(ROUNDS):
        start = i % max(len(pairs), 1)
        names = [*list(pairs)[start:], *list(pairs)[:start]]
        best = {name: [float("inf")] * 2 for name in names}
        for _ in range(REPEATS):
            for name in names:
                if name in errors:
                    continue
                try:
                    best[name] = [min(b, run(p)) for b, p in zip(best[name], pairs[name], strict=True)]
                except Exception as e:
                    errors[name] = failure(e)
        for name in names:
            found[name].append((best[name][1] - best[name][0]) / (calls[1] - calls[0]) * 1e6)
    return {name: each for name, each in found.items() if name not in errors}


def failure(e: Exception) -> str:
    return f"{type(e).__name__}: {e}"[:600]


def exchanges(program: Any) -> int:
    """Collectives and fused calls in a compiled program."""
    kinds = r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    text = program.as_text()
    return len(re.findall(rf" (?:{kinds})(?:-start)?\(", text)) + text.count('custom_call_target="jaxnorm_fused"')


def lengths(rows: int) -> tuple[int, int]:
    return next((v for limit, v in LENGTHS.items() if rows <= limit), LENGTHS[max(LENGTHS)])


def first(pair: list[Any], calls: tuple[int, int], x: Any, w: Any) -> tuple[float, tuple[Any, Any]]:
    """Runs the two chains once: exchanges of a call, and the bits that the short one ends with on every rank."""
    import jax
    import numpy as np

    from jaxnorm.distributed import check

    moves, other = (exchanges(p) / k for p, k in zip(pair, calls, strict=True))
    if moves != other or moves < 1:
        raise RuntimeError(f"a call has {moves} exchanges in the short chain, {other} in the long one")
    out = jax.block_until_ready(pair[0](x, w))
    last = np.asarray(out[0]).view(np.uint8), np.asarray(out[1])
    jax.block_until_ready(pair[1](x, w))
    check()
    return moves, last


Jobs = dict[str, list["concurrent.futures.Future[Any]"]]
"""The programs of a cell while they are compiled: both chains of each contestant."""


def measure(mesh: Any, rows: int, n: int, jobs: Jobs) -> dict[str, Any]:
    """One cell: microseconds by contestant, and what failed."""
    from jaxnorm.distributed import check

    calls = lengths(rows)
    errors: dict[str, str] = {}
    moves: dict[str, float] = {}
    last: dict[str, Any] = {}
    pairs: dict[str, list[Any]] = {}
    x, w = inputs(mesh, rows, n)
    for name, two in jobs.items():
        try:
            pair = [p.result() for p in two]
            moves[name], last[name] = first(pair, calls, x, w)
            pairs[name] = pair
        except Exception as e:
            errors[name] = failure(e)
    found = slopes(pairs, calls, lambda program: seconds(program, x, w), errors)
    try:
        check()
    except Exception as e:  # a wait has failed: whose times it is in is not known
        errors |= dict.fromkeys(found, failure(e))
    errors |= wrong(last)
    found = {name: each for name, each in found.items() if name not in errors}
    times, spread = summary(found)
    return {"rows": rows, "features": n, "ranks": mesh.devices.size, "calls": list(calls), "us": times, "spread_us": spread,
            "errors": errors, "exchanges": moves,
            "floor_us": {k: round(v, 2) for k, v in floor_us(rows, n, mesh.devices.size).items()}}  # fmt: skip


def summary(found: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Median, and smallest and largest, of the rounds. The tie is what a second one adds in the same round."""
    found = dict(found)
    twice = found.pop("fused, two ties", None)
    if twice and "fused" in found:
        found["tie"] = [b - a for a, b in zip(found["fused"], twice, strict=True)]
    middle = {name: round(statistics.median(each), 2) for name, each in found.items()}
    return middle, {name: [round(min(each), 2), round(max(each), 2)] for name, each in found.items()}


def wrong(last: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """Timed programs that are wrong: other bits on another rank or schedule, or scales that are not near the composite's."""
    import numpy as np

    found = {}
    codes, scales = last.get("fused", (None, None))
    for name, (q, s) in last.items():
        if not ((q == q[0]).all() and (s == s[0]).all()):
            found[name] = "its ranks differ"
        elif "composite" in last and not np.allclose(s, last["composite"][1], rtol=2e-2):
            found[name] = "its scales are not the composite's"
        elif "shot" in name and codes is not None and not ((q == codes).all() and (s == scales).all()):
            found[name] = "another schedule gives other bits"
    return found


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
    found = store.read_json(path) or {"format": FORMAT, "method": " ".join((__doc__ or "").split()), "cells": {}}
    if found["format"] != FORMAT:
        raise SystemExit(f"{path} is of another method ({found['format']}, this is {FORMAT}): name another --out")
    return found


def worker(path: pathlib.Path, ranks: int, n: int, rows: list[int], budget: float) -> None:
    """The cells of one number of ranks and features, in this process."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    start = time.monotonic()
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",))
    results = read(path)
    results["environment"] = store.environment()
    todo = [m for m in rows if key(ranks, m, n) not in results["cells"]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        cells: dict[int, Jobs] = {
            m: {c[0]: [pool.submit(compiled, c, mesh, m, n, k) for k in lengths(m)] for c in contestants(m)}
            for m in todo
        }
    for m, jobs in cells.items():
        if time.monotonic() - start > budget:
            break
        cell = results["cells"][key(ranks, m, n)] = measure(mesh, m, n, jobs)
        store.write_json(path, results)
        errors = [f"ERROR {k}: {v[:160]}" for k, v in cell["errors"].items()]
        print(f"{key(ranks, m, n):22s}", *(f"{k} {v:.1f}" for k, v in cell["us"].items()), *errors, flush=True)


def key(ranks: int | str, rows: int, n: int | str) -> str:
    return f"{ranks} ranks {rows}x{n}"


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
    # the sizes of the targets first, over all numbers of ranks; then everything else
    for part in ([m for m in rows if m in MAIN], [m for m in rows if m not in MAIN]):
        for n in args.features.split(","):
            for ranks in args.ranks.split(","):
                left = args.budget_seconds - (time.monotonic() - start)
                todo = [m for m in part if key(ranks, m, n) not in read(path)["cells"]]
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
