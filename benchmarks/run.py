"""Measures cells (operator x shape) with every contestant and writes one JSON file per operator.

    python -m benchmarks.run --ops rmsnorm,add_rmsnorm --cells table --budget-seconds 450 --out DIR

A cell is written as soon as it is measured. A second run with the same --out skips the cells that are there (--earlier DIR
takes them from further directories, --fresh measures all again). What fails is recorded beside what worked. If a contestant
leaves the device unusable, the run notes that and goes on without it in a new process.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from . import cells, compare, store, timing
from .cells import Cell

CRASHES = "JAXNORM_BENCH_CRASHED"
STARTED = "JAXNORM_BENCH_STARTED"


def contestants() -> dict[str, Callable[[Any], timing.Program]]:
    """Every contestant by name, ours first; a builder raises when its library is missing or has no such op."""
    from . import jax_programs as j
    from . import torch_programs as t

    table: dict[str, Callable[[Any], timing.Program]] = {
        "jaxnorm": lambda i: j.jaxnorm_program(None, i),
        "jaxnorm-hip": lambda i: j.jaxnorm_program("hip", i),
        "jaxnorm-triton": lambda i: j.jaxnorm_program("triton", i),
        "jaxnorm-xla": lambda i: j.jaxnorm_program("xla", i),
        "xla": j.xla_program,
        "xla-saved": j.xla_saved_program,
    }
    for library in t.LIBRARIES:
        table[library] = lambda i, name=library: t.torch_program(name, i)
    for implementation in ("triton", "xla"):
        table[f"tokamax-{implementation}"] = lambda i, name=implementation: j.tokamax_program(name, i)
    return table


DEFAULT = (
    "jaxnorm,jaxnorm-hip,jaxnorm-triton,xla,xla-saved,quack,liger,torch-compile,torch-eager,tokamax-triton,tokamax-xla"
)


def skip_reason(name: str, cell: Cell) -> str | None:
    """Contestants that cost compile time where nothing is to be learned; None = measure."""
    if name == "torch-compile" and cell.rows < 1024:
        return "not measured below 1024 rows (compile time)"
    if name == "liger" and cell.features > 65536:
        return "liger ends at 65536 features"
    if name == "tokamax-xla" and cell.op == "rmsnorm" and cell.rows > 16:
        return "the xla contestant stands for it"
    return None


def describe(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({pathlib.Path(last.filename).name}:{last.lineno})" if last else ""
    return f"{type(error).__name__}: {str(error)[:400]}{where}"


class DeviceLost(Exception):
    def __init__(self, contestant: str, error: BaseException) -> None:
        super().__init__(f"{contestant}: {describe(error)}")
        self.contestant = contestant


def measure_cell(
    cell: Cell, names: list[str], timer: timing.Timer, skipped: dict[str, str] | None = None
) -> dict[str, Any]:
    """One cell with all contestants: built, checked against the reference, timed in turns."""
    from . import inputs as inp

    start = time.perf_counter()
    notes: dict[str, dict[str, Any]] = {name: {"error": reason} for name, reason in (skipped or {}).items()}
    data = inp.make_inputs(cell)
    programs: list[timing.Program] = []

    def failed(name: str, error: BaseException) -> None:
        entry = notes.setdefault(name, {})
        if isinstance(error, ImportError | NotImplementedError):
            entry["skipped"] = describe(error)
        else:
            entry["error"] = describe(error)
        if timing.is_fatal(error):
            raise DeviceLost(name, error)

    table = contestants()
    for index, name in enumerate(n for n in names if n not in notes):
        reason = skip_reason(name, cell)
        if reason:
            notes[name] = {"skipped": reason}
            continue
        try:
            program = table[name](data)
            notes[name] = _check(program, index, cell, data)
            programs.append(program)
        except Exception as e:
            failed(name, e)
    programs += _copies(cell, failed)
    timed = timing.measure(timer, programs, cell.bytes, cell.input_bytes, failed)
    copies = {n: timed.pop(n) for n in list(timed) if n.startswith("copy-")}
    for name, summary in timed.items():
        notes[name] = {**summary, **notes.get(name, {})}
    return {
        "op": cell.op, "shape": cell.shape, "rows": cell.rows, "features": cell.features, "dtype": cell.dtype, "bytes": cell.bytes,
        "copy_us": min((c["median_us"] for c in copies.values()), default=None), "copies": copies, "contestants": notes,
        "cold": "flush" if timing.rotation(cell.input_bytes)[1] else f"{len(data.sets)} input sets",
        "timer": timer.name, "method": timer.method, "clocks": store.clocks(), "chosen": chosen_backends(cell),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def _check(program: timing.Program, index: int, cell: Cell, data: Any) -> dict[str, Any]:
    """Runs the contestant on one input set, each on another one, and compares with the float32 reference."""
    from . import inputs as inp
    from . import jax_programs, torch_programs

    out = jax_programs.outputs_of(program, index, cell)
    if program.framework == "torch":
        out = torch_programs.to_jax(out)
    errors = inp.distances(cell, out, data.sets[index % len(data.sets)])
    rounded = {k: float(f"{v:.3g}") for k, v in errors.items()}
    return {"errors": rounded, "right": inp.is_right(cell, errors)}


def _copies(cell: Cell, failed: Callable[[str, BaseException], None]) -> list[timing.Program]:
    from . import jax_programs, torch_programs

    programs = []
    for name, build in (("copy-xla", jax_programs.copy_program), ("copy-torch", torch_programs.torch_copy_program)):
        try:
            programs.append(build(cell))
        except Exception as e:
            failed(name, e)
    return programs


def run(args: argparse.Namespace) -> int:
    started = float(os.environ.setdefault(STARTED, str(time.time())))
    out = pathlib.Path(args.out)
    results = store.Store(out, [] if args.fresh else [pathlib.Path(d) for d in args.earlier])
    todo = cells.select(args.ops, args.cells, args.dtype)
    todo = [c for c in todo if not is_done(results, c, started if args.fresh else 0.0)]
    names = [n for n in args.contestants.split(",") if n]
    unknown = sorted(set(names) - set(contestants()))
    if unknown:
        raise SystemExit(f"--contestants: got {', '.join(unknown)}, expected some of {', '.join(contestants())}")
    timer = timing.make_timer(args.timer)
    environment = store.environment()
    longest = 0.0
    for i, cell in enumerate(todo):
        spent = time.time() - started
        if spent + 1.3 * longest > args.budget_seconds:
            print(
                f"budget: {len(todo) - i} cells left after {spent:.0f} s; the same command goes on from here",
                flush=True,
            )
            break
        begin = time.time()
        try:
            crashed = crashes(cell)
            record = measure_cell(cell, names, timer, crashed)
            results.put(cell.op, cell.key, {**record, **environment, "time": int(time.time())})
            print(compare.line(record), f"[{record['seconds']:.0f} s]", flush=True)
        except DeviceLost as e:
            restart_without(cell, e)
        except Exception as e:
            print(f"{cell.op} {cell.key}: {describe(e)}", flush=True)
            traceback.print_exc()
            if timing.is_fatal(e):
                restart_without(cell, DeviceLost("*", e))
        release()
        longest = max(longest, time.time() - begin)
    results.write_all()
    chosen = [r for c in cells.select(args.ops, args.cells, args.dtype) if (r := results.get(c.op, c.key))]
    print(compare.report(chosen))
    return 0


def is_done(results: store.Store, cell: Cell, since: float) -> bool:
    """Whether the cell was measured, at the time ``since`` or later, or lost the device in a way that names no contestant."""
    record = results.get(cell.op, cell.key)
    recent = record is not None and record.get("time", 0) >= int(since)
    return (recent and store.is_complete(record)) or "*" in crashes(cell)


def release() -> None:
    """Gives the memory of a cell back before the next one asks for its own."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def chosen_backends(cell: Cell) -> list[str]:
    """What ``backend=None`` picks here, as ``explain`` says; empty where that fails."""
    import jax

    try:
        import jaxnorm

        wide = jax.ShapeDtypeStruct((cell.rows, cell.features), cell.dtype)
        weight = jax.ShapeDtypeStruct((cell.features,), cell.dtype)
        if cell.op.startswith("add_"):
            choices = jaxnorm.explain(lambda x, r, w: jaxnorm.add_rmsnorm(x, r, w), wide, wide, weight)
        else:
            choices = jaxnorm.explain(lambda x, w: jaxnorm.rmsnorm(x, w), wide, weight)
        return [f"{c.backend} {c.kernel} {c.config}".strip()[:300] for c in choices]
    except Exception as e:
        return [describe(e)]


def crashes(cell: Cell) -> dict[str, str]:
    """Contestants that took the device down in this cell in an earlier process of this run."""
    entries = [e.split("|", 2) for e in os.environ.get(CRASHES, "").split("\n") if e]
    return {name: text for key, name, text in entries if key == f"{cell.op} {cell.key}"}


def restart_without(cell: Cell, lost: DeviceLost) -> None:
    """A faulting kernel ends the CUDA context: note the contestant and start this run again in place."""
    print(f"{cell.op} {cell.key}: the device is lost after {lost}; starting again without it", flush=True)
    text = str(lost).replace("\n", " ")[:300]
    os.environ[CRASHES] = f"{os.environ.get(CRASHES, '')}\n{cell.op} {cell.key}|{lost.contestant}|{text}"
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ops", default="rmsnorm,add_rmsnorm", help=f"comma list of {', '.join(cells.OPS)}")
    p.add_argument("--cells", default="table", help=f"{', '.join(cells.GROUPS)}, or a comma list of ROWSxFEATURES")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--contestants", default=DEFAULT, help="comma list (default: %(default)s)")
    p.add_argument(
        "--budget-seconds", type=float, default=450, help="start no cell that would end later (default: %(default)s)"
    )
    p.add_argument("--out", required=True, help="directory of the JSON files")
    p.add_argument(
        "--earlier", action="append", default=[], help="directory whose cells count as measured; may be repeated"
    )
    p.add_argument("--fresh", action="store_true", help="measure all cells again")
    p.add_argument("--timer", default="auto", choices=("auto", "cupti", "wall"))
    return p


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same device
    return run(parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
