"""Times every candidate configuration of the kernels on chosen cells and ranks them.

    python -m benchmarks.sweep --stages fwd,add,bwd --backends hip,triton --cells 8192x8192,16x4096 --out DIR

The candidates are ``kernels/configs/rmsnorm_{hip,triton}.candidates(problem)``; the one that ``plan(problem)`` picks is marked.
All are compiled first (in threads with --jobs), then checked against the float32 reference, then timed as in ``run``, the copy
and XLA beside them. A candidate that fails is listed with its error. --compile-only stops after the compiler, for a machine
without a GPU: it finds what does not compile and fills the disk cache of code objects (JAXNORM_CACHE_DIR), which can be carried.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import os
import pathlib
import sys
import time
from typing import Any

from jaxnorm._bench.store import write_json
from jaxnorm._tune.search import describe_launch
from jaxnorm._tune.search import label_of as label

from . import cells, run, store, timing
from .cells import EPS, Cell

FORMAT = "jaxnorm-sweep/1"
STAGES = {
    "fwd": "rmsnorm",
    "fwd_train": "rmsnorm",
    "add": "add_rmsnorm",
    "add_train": "add_rmsnorm",
    "bwd": "rmsnorm_bwd",
    "add_bwd": "add_rmsnorm_bwd",
}
RESULTS = {
    "fwd": ("y",), "fwd_train": ("y", "rstd"), "add": ("y", "residual_out"), "add_train": ("y", "residual_out", "rstd"),
    "bwd": ("dx", "dweight"), "add_bwd": ("dx", "dweight"),
}  # fmt: skip
DEFAULT_CELLS = "8192x8192,1x4096,16x4096,128x4096,1024x8192,8192x4096,8192x2048,131072x1024,8192x16384,4096x65536"


def make_problem(stage: str, cell: Cell, target: str) -> Any:
    """The Problem of a stage as dispatch builds it for the public functions with default options."""
    from jaxnorm.kernels.configs import Problem

    m, n, dtype = cell.rows, cell.features, cell.dtype
    wide, row, vector = (m, n), (m,), (n,)
    backward = stage.endswith("bwd")
    shapes: dict[str, tuple[int, ...]] = {}
    if backward:
        shapes |= {"n": wide, "weight": vector, "rstd": row, "dy": wide}
        if stage == "add_bwd":
            shapes["dresidual_out"] = wide
        shapes |= {"dx": wide, "dweight": vector}
        options: tuple[tuple[str, Any], ...] = (("weight_offset", 0.0),)
    else:
        shapes["x"] = wide
        if stage.startswith("add"):
            shapes["residual"] = wide
        shapes |= {"weight": vector, "y": wide}
        if stage.startswith("add"):
            shapes["residual_out"] = wide
        if stage.endswith("train"):
            shapes["rstd"] = row
        options = (("eps", EPS), ("weight_offset", 0.0), ("cast", "output"), ("residual_rounding", "float32"))
    dtypes = tuple((name, "float32" if name == "rstd" else dtype) for name in shapes)
    kind = "rmsnorm_bwd" if backward else "rmsnorm_fwd"
    return Problem(
        stage=kind, rows=m, features=n, shapes=tuple(shapes.items()), dtypes=dtypes, options=options, target=target
    )


def operands(stage: str, data: Any) -> list[dict[str, Any]]:
    """The operands of a stage from the input sets of its operator; what the forward saves is computed here."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def saved(s: dict[str, Any]) -> tuple[Any, Any]:
        n = (
            s["x"].astype(jnp.float32) + s["residual"].astype(jnp.float32)
            if "residual" in s
            else s["x"].astype(jnp.float32)
        )
        n = n.astype(s["x"].dtype)
        n32 = n.astype(jnp.float32)
        return n, jax.lax.rsqrt(jnp.mean(n32 * n32, axis=-1) + EPS)

    out = []
    for s in data.sets:
        if stage.endswith("bwd"):
            n, rstd = saved(s)
            s = {"n": n, "weight": s["weight"], "rstd": rstd, **{k: s[k] for k in ("dy", "dresidual_out") if k in s}}
        out.append(s)
    return out


def candidates(backend: str, problem: Any, limit: int = 0) -> list[tuple[Any, ...]]:
    """The plans to try; the first is the one that ``plan`` picks. Above ``limit``, every so many of the others are taken."""
    module = importlib.import_module(f"jaxnorm.kernels.configs.rmsnorm_{backend}")
    picked = module.plan(problem)
    others = [p for p in dict.fromkeys(module.candidates(problem)) if p != picked]
    if limit and len(others) >= limit:
        others = [others[i * len(others) // (limit - 1)] for i in range(limit - 1)]
    return [picked, *others]


def compile_all(backend: str, problem: Any, plans: list[tuple[Any, ...]], jobs: int) -> dict[int, str]:
    """Compiles every launch into the cache; index of a plan -> error. A parallel failure is tried again alone."""
    compiler = importlib.import_module(f"jaxnorm._compile.{backend}")

    def build(i: int) -> None:
        for launch in plans[i]:
            compiler.compile(launch, problem)

    errors: dict[int, str] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {i: pool.submit(build, i) for i in range(len(plans))}
    for i, future in futures.items():
        if future.exception() is not None:
            try:
                build(i)
            except Exception as e:
                errors[i] = run.describe(e)
    return errors


def program(
    backend: str, stage: str, problem: Any, plan: tuple[Any, ...], sets: list[dict[str, Any]], name: str
) -> timing.Program:
    import jax

    from jaxnorm._launch import run_plan

    @jax.jit
    def call(arrays: dict[str, Any]) -> tuple[Any, ...]:
        out = run_plan(plan, problem, arrays, backend)
        return tuple(out[r] for r in RESULTS[stage])

    return timing.Program(name, [functools.partial(call, s) for s in sets], jax.block_until_ready)


def sweep_cell(
    args: argparse.Namespace, stage: str, cell: Cell, backend: str, timer: timing.Timer, target: str
) -> dict[str, Any]:
    """Ranking of all candidates of one backend for one cell."""
    from . import inputs as inp
    from . import jax_programs as j

    problem = make_problem(stage, cell, target)
    plans = candidates(backend, problem, args.limit)
    start = time.perf_counter()
    errors = compile_all(backend, problem, plans, args.jobs)
    compile_seconds = time.perf_counter() - start
    data = inp.make_inputs(cell)
    sets = operands(stage, data)
    programs, distances = [], {}
    for i, plan in enumerate(plans):
        if i in errors:
            continue
        try:
            p = program(backend, stage, problem, plan, sets, str(i))
            # each candidate is checked on another input set: what an earlier one left in memory is not its answer
            out = p.calls[i % len(sets)]()
            p.wait(out)
            checked = [o for o, name in zip(out, RESULTS[stage], strict=True) if name != "rstd"]
            distances[i] = inp.distances(cell, checked, data.sets[i % len(sets)])
            programs.append(p)
        except Exception as e:
            errors[i] = run.describe(e)
            if timing.is_fatal(e):
                raise run.DeviceLost(label(plan, tuple(plans)), e) from e

    def failed(name: str, e: BaseException) -> None:
        if name.isdigit():
            errors[int(name)] = run.describe(e)
        if timing.is_fatal(e):
            raise run.DeviceLost(name, e)

    extra = [j.copy_program(cell), j.xla_program(data)]
    timed = timing.measure(timer, [*extra, *programs], cell.bytes, cell.input_bytes, failed)
    copy_us = timed.pop("copy-xla", {}).get("median_us")
    xla_us = timed.pop("xla", {}).get("median_us")
    ranking = []
    for name, summary in sorted(timed.items(), key=lambda e: e[1]["median_us"]):
        i = int(name)
        entry = {
            "us": summary["median_us"],
            "min_us": summary["min_us"],
            "max_us": summary["max_us"],
            "picked": i == 0,
        }
        entry |= {
            "label": label(plans[i], tuple(plans)),
            "right": inp.is_right(cell, distances[i]),
            "errors": distances[i],
        }
        entry |= {"kernels": summary["kernels"], "launches": [describe_launch(launch) for launch in plans[i]]}
        ranking.append(entry)
    return {
        "stage": stage, "shape": cell.shape, "dtype": cell.dtype, "backend": backend, "bytes": cell.bytes, "copy_us": copy_us,
        "xla_us": xla_us, "candidates": len(plans), "compile_seconds": round(compile_seconds, 1), "ranking": ranking,
        "failed": [{"label": label(plans[i], tuple(plans)), "error": e} for i, e in sorted(errors.items())],
    }  # fmt: skip


def show(record: dict[str, Any], top: int = 5) -> str:
    """The first of the ranking, the picked one, the last, as ratios to the copy."""
    copy = record["copy_us"] or float("nan")
    xla = record["xla_us"]
    head = (
        f"{record['stage']} {record['shape']} {record['backend']}: copy {copy:.2f} us, xla {xla / copy:.2f}"
        if xla
        else f"{record['shape']}"
    )
    lines = [f"{head}, {record['candidates']} candidates, compiled in {record['compile_seconds']} s"]
    ranking = record["ranking"]
    for i, e in enumerate(ranking):
        if i < top or e["picked"] or not e["right"] or i == len(ranking) - 1:
            mark = ("* " if e["picked"] else "  ") + ("" if e["right"] else f"WRONG {e['errors']} ")
            lines.append(f"  {i + 1:3d} {e['us']:9.2f} us {e['us'] / copy:6.3f} {mark}{e['label']}")
    lines += [f"  failed: {f['label']}: {f['error'][:200]}" for f in record["failed"][:4]]
    if len(record["failed"]) > 4:
        lines.append(f"  and {len(record['failed']) - 4} more failed")
    return "\n".join(lines)


def compile_only(args: argparse.Namespace, todo: list[tuple[str, Cell, str]]) -> int:
    bad = 0
    for stage, cell, backend in todo:
        problem = make_problem(stage, cell, args.target)
        try:
            plans = candidates(backend, problem, args.limit)
            errors = compile_all(backend, problem, plans, args.jobs)
        except Exception as e:
            bad += 1
            print(f"{stage} {cell.shape} {backend}: {run.describe(e)}", flush=True)
            continue
        bad += len(errors)
        print(f"{stage} {cell.shape} {backend}: {len(plans)} candidates, {len(errors)} failed", flush=True)
        for i, e in errors.items():
            print(f"  {label(plans[i], tuple(plans))}: {e}", flush=True)
    return 1 if bad else 0


def plan_of_work(args: argparse.Namespace) -> list[tuple[str, Cell, str]]:
    """(stage, cell, backend), the first cell of every stage before the second of any; small backwards are left out."""
    shapes = [cells.parse_shape(s) for s in args.cells.split(",")]
    stages = args.stages.split(",")
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise SystemExit(f"--stages: got {', '.join(unknown)}, expected some of {', '.join(STAGES)}")
    work = [
        (stage, Cell(STAGES[stage], *shape, args.dtype), b)
        for shape in shapes
        for stage in stages
        for b in args.backends.split(",")
    ]
    return [w for w in work if not (w[0].endswith("bwd") and w[1].rows < 128)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--stages", default="fwd,add,bwd", help=f"comma list of {', '.join(STAGES)}")
    p.add_argument("--backends", default="hip,triton")
    p.add_argument("--cells", default=DEFAULT_CELLS, help="comma list of ROWSxFEATURES")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--budget-seconds", type=float, default=450)
    p.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="threads that compile")
    p.add_argument("--out", help="directory of the JSON files; cells that are there are not measured again")
    p.add_argument(
        "--limit", type=int, default=64, help="most candidates a cell and backend; 0 = all (default: %(default)s)"
    )
    p.add_argument("--compile-only", action="store_true")
    p.add_argument("--target", default="", help="with --compile-only: gfx942, sm_90, ...; else the device's")
    p.add_argument("--timer", default="auto", choices=("auto", "cupti", "wall"))
    return p


def device_target() -> str:
    """The target of the first device: ``sm_90``, ``gfx942``."""
    import jax

    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return capability.split(":")[0] if capability.startswith("gfx") else "sm_" + capability.replace(".", "")


def main() -> int:
    args = parser().parse_args()
    todo = plan_of_work(args)
    if args.compile_only:
        args.target = args.target or "sm_90"
        return compile_only(args, todo)
    if not args.out:
        raise SystemExit("--out is needed")
    started = time.time()
    path = pathlib.Path(args.out) / "sweep.json"
    results = store.read_json(path) or {"format": FORMAT, "cells": {}}
    timer = timing.make_timer(args.timer)
    results["environment"] = store.environment()
    target = args.target or device_target()
    longest = 0.0
    for i, (stage, cell, backend) in enumerate(todo):
        key = f"{stage} {cell.key} {backend}"
        if key in results["cells"] and "error" not in results["cells"][key]:
            continue
        if time.time() - started + 1.3 * longest > args.budget_seconds:
            print(f"budget: {len(todo) - i} cells left; the same command goes on from here", flush=True)
            break
        begin = time.time()
        try:
            record = sweep_cell(args, stage, cell, backend, timer, target)
            results["cells"][key] = record
            print(show(record), flush=True)
        except run.DeviceLost as e:
            results["cells"][key] = {"error": str(e)}
            write_json(path, results)
            print(
                f"{key}: the device is lost after {e}; run the command again, it goes on with the next cell", flush=True
            )
            return 3
        except Exception as e:
            results["cells"][key] = {"error": run.describe(e)}
            print(f"{key}: {run.describe(e)}", flush=True)
        write_json(path, results)
        longest = max(longest, time.time() - begin)
    print(summary(results))
    return 0


def summary(results: dict[str, Any]) -> str:
    """One line a cell: the best candidate against the picked one."""
    lines = ["best candidate of each cell (ratio to copy; * = the plan's own choice):"]
    for key, r in results["cells"].items():
        right = [e for e in r.get("ranking", []) if e["right"]]
        if not right:
            lines.append(f"{key}: {r.get('error', 'nothing right')[:150]}")
            continue
        copy = r["copy_us"] or float("nan")
        own = next((e for e in right if e["picked"]), None)
        loss = f", picked {own['us'] / copy:.3f}" if own and own is not right[0] else ""
        best, mark = right[0], "*" if own is right[0] else " "
        lines.append(f"{key:28s} {best['us']:9.2f} us {best['us'] / copy:.3f}{loss} {mark} {best['label']}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
