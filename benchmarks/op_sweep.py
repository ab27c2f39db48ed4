"""Times every candidate plan of one stage of a public function, the plan's own choice first, and ranks them.

    python -m benchmarks.op_sweep quant --cases rmsnorm_quant:fp8 --backends hip --cells 8192x4096,16x4096 --out DIR

The families are the modules here that have ``sweep_cases()``. The function is called as a user calls it; only the plan of its last
stage is replaced. Every candidate's results must equal those of the plan's own choice bit for bit (the plan may look at M only
because of that); one that differs is listed as WRONG. Method of the timing as in ``timing``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from . import store, timing
from .sweep import describe_launch, label

FORMAT = "jaxnorm-op-sweep/1"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to sweep: ``function(backend)`` is what is jitted, ``arguments(shape, i)`` one set of its arguments."""

    name: str
    function: Callable[[str], Callable[..., Any]]
    arguments: Callable[[tuple[int, ...], int], tuple[Any, ...]]
    bytes: Callable[[tuple[int, ...]], tuple[int, int]]
    """(least traffic, bytes of one set of inputs) of a shape."""


def last_stage(f: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """(StageCall, Problem) of the last stage in ``f(*args)``, for the default device."""
    from jaxnorm import _explain, _launch
    from jaxnorm._compile import target

    platform = _explain._platform()
    call, avals = list(_explain._stages(jax.make_jaxpr(f)(*args).jaxpr))[-1]
    return call, _launch.problem(call, avals, target.resolve(platform, call.targets))


@contextlib.contextmanager
def forced(module: Any, problem: Any, plan: tuple[Any, ...]) -> Iterator[None]:
    """Inside, the plan of this one problem is ``plan``."""
    own = module.plan
    module.plan = lambda p: plan if p == problem else own(p)
    try:
        yield
    finally:
        module.plan = own


def compile_all(backend: str, problem: Any, plans: list[tuple[Any, ...]], jobs: int) -> dict[int, str]:
    """Compiles every launch into the cache; index of a plan -> error."""
    compiler = importlib.import_module(f"jaxnorm._compile.{backend}")

    def build(i: int) -> str:
        try:
            for launch in plans[i]:
                compiler.compile(launch, problem)
        except Exception as e:
            return f"{type(e).__name__}: {e}"[:300]
        return ""

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return {i: e for i, e in enumerate(pool.map(build, range(len(plans)))) if e}


def _same(a: Any, b: Any) -> bool:
    one, two = ([np.asarray(v) for v in jax.tree.leaves(t)] for t in (a, b))
    return all(x.tobytes() == y.tobytes() for x, y in zip(one, two, strict=True))


def sweep(
    case: Case, shape: tuple[int, ...], backend: str, timer: timing.Timer, limit: int, jobs: int
) -> dict[str, Any]:
    nbytes, reads = case.bytes(shape)
    count, _ = timing.rotation(reads)
    sets = [case.arguments(shape, i) for i in range(count)]
    call, problem = last_stage(case.function(backend), sets[0])
    module = importlib.import_module(f"jaxnorm.kernels.configs.{call.definition.plans[backend]}")
    picked = module.plan(problem)
    others = [p for p in dict.fromkeys(module.candidates(problem)) if p != picked]
    if limit and len(others) >= limit:
        others = [others[i * len(others) // (limit - 1)] for i in range(limit - 1)]
    plans = [picked, *others]
    errors = compile_all(backend, problem, plans, jobs)
    programs, wrong, expected = [], set(), None
    for i, plan in enumerate(plans):
        if i in errors:
            continue
        with forced(module, problem, plan):
            try:
                run = jax.jit(case.function(backend)).lower(*sets[0]).compile()
                out = jax.block_until_ready(run(*sets[0]))
            except Exception as e:
                errors[i] = f"{type(e).__name__}: {e}"[:300]
                continue
        expected = out if i == 0 else expected
        if i and expected is not None and not _same(out, expected):
            wrong.add(i)
        programs.append(timing.Program(str(i), [functools.partial(run, *s) for s in sets], jax.block_until_ready))
    copy = _copy(nbytes, count)
    timed = timing.measure(
        timer,
        [copy, *programs],
        nbytes,
        reads,
        lambda who, e: errors.update({int(who) if who.isdigit() else -1: str(e)[:300]}),
    )
    copy_us = timed.pop("copy", {}).get("median_us")
    ranking = [
        {
            "us": t["median_us"], "min_us": t["min_us"], "max_us": t["max_us"], "picked": i == "0", "right": int(i) not in wrong,
            "label": label(plans[int(i)], tuple(plans)), "kernels": t["kernels"],
            "launches": [describe_launch(launch) for launch in plans[int(i)]],
        }
        for i, t in sorted(timed.items(), key=lambda e: e[1]["median_us"])
    ]  # fmt: skip
    failed = [{"label": label(plans[i], tuple(plans)) if i >= 0 else "copy", "error": e} for i, e in errors.items()]
    return {"stage": call.stage, "bytes": nbytes, "copy_us": copy_us, "ranking": ranking, "failed": failed}


def _copy(nbytes: int, count: int) -> timing.Program:
    from .quant import copy

    return copy(nbytes, count)


def show(key: str, record: dict[str, Any], top: int = 4) -> str:
    copy = record["copy_us"] or float("nan")
    lines = [f"{key}: copy {copy:.2f} us, {len(record['ranking'])} candidates, {len(record['failed'])} failed"]
    for i, e in enumerate(record["ranking"]):
        if i < top or e["picked"] or not e["right"]:
            mark = ("* " if e["picked"] else "  ") + ("" if e["right"] else "WRONG ")
            lines.append(f"  {i + 1:3d} {e['us']:9.2f} us {e['us'] / copy:6.3f} {mark}{e['label']}")
    return "\n".join(lines + [f"  failed: {f['label']}: {f['error'][:160]}" for f in record["failed"][:2]])


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.op_sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("family", help="module in benchmarks/ that has sweep_cases()")
    p.add_argument("--cases", default="", help="comma list of case names; all without it")
    p.add_argument("--cells", required=True, help="comma list of shapes like 8192x4096")
    p.add_argument("--backends", default="hip")
    p.add_argument("--limit", type=int, default=48, help="most candidates a cell")
    p.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="threads that compile")
    p.add_argument("--budget-seconds", type=float, default=200)
    p.add_argument("--out", type=pathlib.Path, required=True)
    args = p.parse_args()
    start, timer = time.time(), timing.make_timer()
    path = args.out / f"sweep_{args.family}.json"
    results = store.read_json(path) or {"format": FORMAT, "method": timer.method, "cells": {}}
    results["environment"] = store.environment()
    cases = {c.name: c for c in importlib.import_module(f"benchmarks.{args.family}").sweep_cases()}
    names = args.cases.split(",") if args.cases else list(cases)
    for cell in args.cells.split(","):
        for name in names:
            for backend in args.backends.split(","):
                key = f"{name} {cell} {backend}"
                if key in results["cells"] or time.time() - start > args.budget_seconds:
                    continue
                try:
                    shape = tuple(int(d) for d in cell.split("x"))
                    results["cells"][key] = sweep(cases[name], shape, backend, timer, args.limit, args.jobs)
                    print(show(key, results["cells"][key]), flush=True)
                except Exception as e:
                    print(f"{key}: {type(e).__name__}: {e}"[:400], flush=True)
                store.write_json(path, results)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    raise SystemExit(main())
