"""``jaxnorm bench``: times ops on this machine beside plain XLA and a copy of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ._common import CommandError, console, names, new_app, progress, require_writable, wrong

app = new_app()
CPU_NOTE = (
    "This is a CPU: the times are wall clock of the xla backend, dispatch included, and say nothing about the kernels, "
    "which need a GPU."
)
WALL_NOTE = "Wall clock of a queue of calls: short calls show the cost of a launch, not the kernel's time."


@app.command()
def bench(
    ops: Annotated[
        str,
        typer.Option(
            help="Comma list, or `all`; --list shows them. Default: rmsnorm,add_rmsnorm; with --from all there are."
        ),
    ] = "",
    shapes: Annotated[
        str, typer.Option(help="Comma list such as 8192x4096,rope:8192x32x128; default: usual ones of each op.")
    ] = "",
    dtypes: Annotated[str, typer.Option(help="Comma list of bfloat16, float16, float32.")] = "bfloat16",
    specs: Annotated[
        str, typer.Option(help="Formats of codes for the ops that quantise: int8, fp8, fp8-g128, mxfp8, mxfp4.")
    ] = "fp8",
    backends: Annotated[
        str, typer.Option(help="Comma list of xla, triton, hip, auto (what a call without backend= gets).")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON file. One that is there is gone on with, not measured again.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline to this .png or .svg file.")] = None,
    replot: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: show, or plot, the results of this JSON file.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no further case is begun.")] = 300,
    timer: Annotated[str, typer.Option(help="auto, cupti (NVIDIA device time) or wall.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the JSON file holds.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the ops with their shapes, and stop.")] = False,
) -> None:
    """Time jaxnorm's ops on this machine, beside plain jax.numpy and a copy of the same bytes.

    On an NVIDIA GPU the times are kernel durations from CUPTI with a cold L2 cache. Elsewhere they are wall-clock times, and the
    table says so. A result that does not agree with the formula is marked and makes the exit code 1.
    """
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        wrong("--plot", str(plot), "a name that ends with .png or .svg")
    if plot is not None:
        _require_matplotlib()
        require_writable(plot.parent, "--plot")
    if replot is not None:
        finish(_only(_read(replot), ops), plot)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from .._bench import ops as known

    if listing:
        _list(known)
        return
    import jax

    on_cpu = jax.default_backend() == "cpu"
    chosen = list(known.OPS) if ops == "all" else names("--ops", ops or "rmsnorm,add_rmsnorm", known.OPS)
    formats = names("--specs", specs, known.SPECS)
    try:
        cases = known.select(
            chosen, [s for s in shapes.split(",") if s], names("--dtypes", dtypes, known.DTYPES), formats, on_cpu
        )
    except ValueError as error:
        raise CommandError(f"--{error}.", 2) from None
    ours = _backends(backends, on_cpu)
    results, where = _results(out, fresh)
    from .._bench.measure import DeviceLost

    try:
        left = _measure(cases, ours, make_timer(timer), results, where, budget)
    except DeviceLost as error:
        again = "Run the same command again: it goes on without it." if out else ""
        raise CommandError(f"the device is lost after {error}. {again}".strip()) from None
    finish(results, plot, [c.key for c in cases])
    if left:
        again = "the same command goes on from here" if out else "name a file with --out to go on from there next time"
        console(stderr=True).print(f"budget: {left} of {len(cases)} cases left; {again}")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(f"--plot: needs matplotlib ({error}). Run: pip install 'jaxnorm[bench]'.", 2) from None


def _list(known: Any) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "shape", "usual shapes", "on a CPU"):
        table.add_column(column, overflow="fold")
    for op in known.OPS.values():
        table.add_row(op.name, op.dims, ", ".join(op.shapes), ", ".join(op.small))
    console().print(table)
    console().print(
        "_bwd: the gradients alone, on what the forward saved. qk_norm_rope_cache is left out: it updates its cache in place, "
        "so that the same call cannot be repeated.",
        soft_wrap=True,
    )


def _backends(text: str, on_cpu: bool) -> list[str]:
    import jaxnorm

    info = jaxnorm.backends()
    if not text:
        return ["xla"] if on_cpu else [*(b for b in ("hip", "triton") if info[b].usable), "auto"]
    found = names("--backends", text, (*info, "auto"))
    for name in found:
        if name != "auto" and not info[name].usable:
            raise CommandError(
                f"--backends: {name} is not usable here: {info[name].reason} {info[name].remedy}".rstrip()
            )
    return found


def make_timer(kind: str) -> Any:
    from .._bench import timing

    if kind not in ("auto", "cupti", "wall"):
        wrong("--timer", repr(kind), "auto, cupti or wall")
    try:
        return timing.make_timer(kind)
    except (ImportError, RuntimeError, AttributeError, ValueError) as error:
        raise CommandError(f"--timer: {kind}: no device times here ({error}). Use --timer wall.") from None


def _read(path: Path) -> dict[str, Any]:
    from .._bench import measure, store

    data = store.read_json(path)
    if not isinstance(data, dict) or data.get("format") != measure.FORMAT:
        wrong("--from" if path.exists() else "file", str(path), f"results of jaxnorm bench ({measure.FORMAT})")
    return data


def _only(results: dict[str, Any], ops: str) -> dict[str, Any]:
    """The cases of these ops; all where none is named."""
    if ops in ("", "all"):
        return results
    chosen = names("--ops", ops, sorted({r["op"] for r in results["cases"].values()}))
    return {**results, "cases": {k: r for k, r in results["cases"].items() if r["op"] in chosen}}


def _results(out: Path | None, fresh: bool) -> tuple[dict[str, Any], Path | None]:
    """Results to go on with, and where they are saved.

    Ends the command where the file belongs to another device, other versions or other sources: they must not mix.
    """
    from .._bench import measure, store

    here = {"format": measure.FORMAT, "environment": store.environment(), "cases": {}}
    if out is None:
        return here, None
    require_writable(out.parent, "--out")
    if not out.exists() or fresh:
        return here, out
    data = store.read_json(out)
    if not isinstance(data, dict) or data.get("format") != measure.FORMAT:
        wrong("--out", f"{out}, which holds something else", f"a new file, or one of {measure.FORMAT}")
    for name in ("device", "versions", "source"):
        if data["environment"].get(name) != here["environment"].get(name):
            wrong("--out", f"{out} with results of another {name}", "results of this machine and these sources",
                  "Name another file, or measure all again with --fresh.")  # fmt: skip
    return data, out


def _measure(cases: Any, ours: list[str], timer: Any, results: dict[str, Any], out: Path | None, budget: float) -> int:
    from .._bench import measure, store

    with progress() as bar:
        task = bar.add_task("compile and measure", total=len(cases))
        bar.advance(task, sum(measure.done(results, c, ours) for c in cases))

        def step(case: Any, record: dict[str, Any] | None) -> None:
            bar.update(task, description=f"{case.key:<40}", advance=int(record is not None))

        def save(now: dict[str, Any]) -> None:
            if out is not None:
                store.write_json(out, now)

        return measure.run(cases, ours, timer, results, save, budget, step)


def finish(results: dict[str, Any], plot: Path | None, keys: list[str] | None = None) -> None:
    """Prints the table, draws the plot, and ends with exit code 1 where a result was wrong or a contestant failed."""
    from .._bench import plot as plots

    records = [r for k, r in results["cases"].items() if keys is None or k in keys]
    out = console()
    if not records:
        raise CommandError("no case was measured")
    out.print(_table(records))
    e = results["environment"]
    if any(r["timer"] != "cupti" for r in records):
        out.print(CPU_NOTE if e["platform"] == "cpu" else WALL_NOTE, soft_wrap=True)
    out.print(plots.caption(results), soft_wrap=True, style="dim")
    bad = [(r, n, c) for r in records for n, c in r["contestants"].items() if "error" in c or not c.get("right", True)]
    if plot is not None:
        try:
            plots.save(results, plot)
        except (OSError, ValueError) as error:
            raise CommandError(f"--plot: {error}") from None
        out.print(f"plot: {plot}")
    for r, name, c in bad:
        reason = c.get("error") or f"differs from the formula by {c['distance']}"
        console(stderr=True).print(
            f"{r['op']} {'x'.join(map(str, r['shape']))} {name}: {reason}", style="red", soft_wrap=True
        )
    if bad:
        raise typer.Exit(1)


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "shape", "type"):
        table.add_column(column, overflow="fold")
    table.add_column("backend")
    for column in ("time us", "GB/s", "% of copy", "time / XLA's"):
        table.add_column(column, justify="right")
    for r in records:
        kind = " ".join(filter(None, (r["dtype"], r["spec"])))
        plain = r["contestants"].get("plain", {}).get("median_us")
        copy = r["copy_us"]
        head = (r["op"], "x".join(map(str, r["shape"])), kind)
        rows = [("copy", {"median_us": copy})] if copy else []
        for i, (name, c) in enumerate([*rows, *r["contestants"].items()]):
            t = c.get("median_us")
            shown = {"plain": "plain XLA"}.get(name, name)
            if t is None:
                cells = ["skipped" if "skipped" in c else "failed", "", "", ""]
            else:
                ratio = f"{t / plain:.2f}" if plain and name != "copy" else ""
                cells = [f"{t:.1f}", f"{r['bytes'] / t / 1e3:.3g}", f"{100 * copy / t:.0f}" if copy else "", ratio]
            if not c.get("right", True):
                shown += " (WRONG)"
            table.add_row(*(head if i == 0 else ("", "", "")), shown, *cells)
        table.add_section()
    return table
