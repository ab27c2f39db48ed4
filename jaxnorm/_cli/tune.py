"""``jaxnorm tune``: searches the kernels' configurations on this machine's GPU and writes the table that dispatch reads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ._common import CommandError, as_for, console, names, new_app, platform_of, progress, require_writable, wrong

app = new_app()


@app.command()
def tune(
    ops: Annotated[str, typer.Option(help="Comma list, or `all`; `jaxnorm bench --list` shows them.")] = "all",
    shapes: Annotated[
        str,
        typer.Option(help="The shapes you run, such as 8192x4096,rope:8192x32x128; default: usual ones of each op."),
    ] = "",
    dtypes: Annotated[str, typer.Option(help="Comma list of bfloat16, float16, float32.")] = "bfloat16",
    specs: Annotated[str, typer.Option(help="Formats of codes for the ops that quantise, as for bench.")] = "fp8",
    backends: Annotated[str, typer.Option(help="Comma list of hip and triton.")] = "hip,triton",
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no further search is begun.")] = 600,
    limit: Annotated[int, typer.Option(min=0, help="Most configurations a search tries; 0 = all.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the table; default: $JAXNORM_TUNED_DIR, else `tuned` in the cache folder."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Search again what the table holds.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Threads that compile.")] = min(8, os.cpu_count() or 1),
    timer: Annotated[str, typer.Option(help="auto, cupti (NVIDIA device time) or wall.")] = "auto",
    listing: Annotated[
        bool, typer.Option("--list", help="Count the configurations there are, and measure nothing.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="With --list: as if for this GPU (gfx942, sm_90, ...).")] = None,
) -> None:
    """Search the kernel configurations that are fastest on this GPU, for the shapes you run.

    A configuration is taken only if its results equal those of jaxnorm's own choice bit for bit, and if it is faster by 2 %
    twice. So tuning never changes a number. An entry holds for one shape, on this kind of device, with these kernels and this
    compiler; with others it is passed over, and jaxnorm explain says so.

    The table is written after each search. The same command goes on where it was stopped.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from .._bench import ops as known

    chosen = list(known.OPS) if ops == "all" else names("--ops", ops, known.OPS)
    formats, wanted = names("--specs", specs, known.SPECS), names("--backends", backends, ("hip", "triton"))
    try:
        cases = known.select(
            chosen, [s for s in shapes.split(",") if s], names("--dtypes", dtypes, known.DTYPES), formats, False
        )
    except ValueError as error:
        raise CommandError(f"--{error}.", 2) from None
    if listing:
        _list(cases, wanted, limit, target)
        return
    if target is not None:
        wrong("--target", repr(target), "no target without --list", "Tuning runs on this machine's own GPU.")
    usable = _usable(wanted)
    table = _open(out)
    _search_all(cases, usable, table, fresh, (budget, limit, jobs), timer)


def _usable(wanted: list[str]) -> list[str]:
    """The backends that can run here. Ends the command where there is none."""
    import jaxnorm

    from .._compile import target as targets

    platform = targets.default_platform()
    if platform not in targets.DEFAULT:
        raise CommandError(
            f"there is nothing to tune here: jax's default device is a {platform}, and only kernels on a GPU have configurations. "
            "--list --target gfx942 shows what a search there would try."
        )
    info = jaxnorm.backends()
    usable = [b for b in wanted if info[b].usable]
    for b in wanted:
        if b not in usable:
            console(stderr=True).print(f"{b} left out: {info[b].reason} {info[b].remedy}".rstrip(), soft_wrap=True)
    if not usable:
        raise CommandError("none of the backends is usable here; `jaxnorm doctor` says more.")
    return usable


def _list(cases: list[Any], wanted: list[str], limit: int, target: str | None) -> None:
    from .._compile import target as targets
    from .._tune import search

    platform = platform_of(target) if target else targets.default_platform()
    if platform not in targets.DEFAULT:
        raise CommandError(f"this machine's default device is a {platform}: name a GPU with --target.", 2)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("case", "backend", "configurations", "own choice"):
        table.add_column(column, overflow="fold", justify="right" if column == "configurations" else "left")
    with as_for(target):
        for case in cases:
            for backend in wanted:
                about = search.subject(case, backend, limit, platform)
                if isinstance(about, str):
                    table.add_row(case.key, backend, "0", about)
                else:
                    label = search.label_of(about.candidates[0], about.candidates)
                    table.add_row(case.key, backend, str(len(about.candidates)), label)
    console().print(table)


class _Tables:
    """The table files of this device: one for each stage and backend, rewritten after each search."""

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.environment = environment
        kind = "".join(c if c.isalnum() else "_" for c in environment["device"].lower())
        self.folder = folder / kind / "plans"
        require_writable(self.folder, "--out")

    def path(self, stage: str, backend: str) -> Path:
        return self.folder / f"{stage}.{backend}.json"

    def read(self, stage: str, backend: str) -> dict[str, Any]:
        """The file's content, or an empty table. A file that holds something else is kept aside, not overwritten."""
        from .._bench import store
        from .._tune import plans

        path = self.path(stage, backend)
        data = store.read_json(path)
        if isinstance(data, dict) and data.get("format") == plans.FORMAT and isinstance(data.get("entries"), dict):
            return data
        if path.exists():
            aside = path.with_suffix(f".json.{int(time.time())}.unread")
            path.rename(aside)
            console(stderr=True).print(f"{path} is no table of plans; it is {aside.name} now", soft_wrap=True)
        return {
            "format": plans.FORMAT,
            "device": self.environment["device"],
            "backend": backend,
            "stage": stage,
            "entries": {},
        }

    def get(self, about: Any) -> dict[str, Any] | None:
        """The entry of a subject, if it still holds."""
        from .._tune import plans

        found = self.read(about.problem.stage, about.backend)["entries"].get(plans.digest(about.problem))
        own = plans.digest(about.candidates[0])
        holds = found is not None and found["own"] == own and found["sources"] == plans.sources_digest(about.backend)
        return found if holds else None

    def lose(self, about: Any, why: str) -> None:
        """Notes that a search took the device down, so that the next run does without it."""
        self._update(about, "lost", why)

    def lost(self, about: Any) -> str:
        """Why a search of this subject lost the device; empty when none did."""
        from .._tune import plans

        return self.read(about.problem.stage, about.backend).get("lost", {}).get(plans.digest(about.problem), "")

    def put(self, about: Any, entry: dict[str, Any], method: str) -> None:
        self._update(about, "entries", entry, method=method)

    def _update(self, about: Any, part: str, value: Any, **more: str) -> None:
        from .._bench import store
        from .._tune import plans

        data = self.read(about.problem.stage, about.backend)
        data.setdefault(part, {})[plans.digest(about.problem)] = value
        store.write_json(self.path(about.problem.stage, about.backend), {**data, **self.environment, **more})


def _open(out: Path | None) -> _Tables:
    from .._bench import store
    from .._tune import plans

    return _Tables(out or plans.user_folder(), store.environment())


def _search_all(
    cases: list[Any], usable: list[str], tables: _Tables, fresh: bool, limits: tuple[float, int, int], timer: str
) -> None:
    from .._bench import timing
    from .._tune import search
    from .bench import WALL_NOTE, make_timer

    budget, limit, jobs = limits
    clock, began = make_timer(timer), time.monotonic()
    if clock.name == "wall":
        console(stderr=True).print(WALL_NOTE, soft_wrap=True)
    work = [(case, backend) for case in cases for backend in usable]
    rows: list[tuple[Any, dict[str, Any] | str]] = []
    longest, left = 0.0, 0
    with progress() as bar:
        task = bar.add_task("tune", total=len(work))
        for i, (case, backend) in enumerate(work):
            about = search.subject(case, backend, limit)
            if isinstance(about, str):
                rows.append(((case, backend), about))
            elif not fresh and (lost := tables.lost(about)):
                rows.append(((case, backend), f"left out: a search lost the device ({lost}); --fresh tries again"))
            elif not fresh and (found := tables.get(about)) is not None:
                rows.append(((case, backend), {**found, "kept": True}))
            else:
                start = time.monotonic()
                if i and start - began + longest > budget:
                    left += 1
                    continue

                def step(
                    what: str, count: int, key: str = f"{case.key} {backend}", total: int = len(about.candidates)
                ) -> None:
                    bar.update(task, description=f"{key:<46} {what} {count}/{total}")

                try:
                    found = search.search(about, clock, jobs, step, lambda: time.monotonic() - began > budget)
                    entry = search.entry(about, found)
                    tables.put(about, entry, clock.method)
                    rows.append(((case, backend), entry))
                except (RuntimeError, ValueError) as error:
                    if timing.is_fatal(error):
                        tables.lose(about, str(error)[:300])
                        again = "Run the same command again: it goes on without it."
                        raise CommandError(f"the device is lost in {case.key} {backend}: {error}. {again}") from None
                    rows.append(((case, backend), f"failed: {error}"))
                longest = max(longest, time.monotonic() - start)
            bar.advance(task)
    _report(rows, tables, left)


def _report(rows: list[tuple[Any, dict[str, Any] | str]], tables: _Tables, left: int) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("case", "backend"):
        table.add_column(column, overflow="fold")
    for column in ("tried", "other bits", "own us", "best us", "% of copy"):
        table.add_column(column, justify="right")
    table.add_column("configuration", overflow="fold")
    failures = 0
    for (case, backend), e in rows:
        if isinstance(e, str):
            failures += e.startswith("failed")
            table.add_row(case.key, backend, "", "", "", "", "", e)
            continue
        share = f"{100 * e['copy_us'] / e['us']:.0f}" if e["copy_us"] else ""
        what = "the own choice" if e["plan"] == e["own"] else e["label"]
        what += " (in the table already)" if e.get("kept") else ""
        table.add_row(
            case.key,
            backend,
            str(e["tried"]),
            str(e["other_bits"]),
            f"{e['own_us']:.2f}",
            f"{e['us']:.2f}",
            share,
            what,
        )
    out = console()
    out.print(table)
    out.print(f"tables: {tables.folder}", soft_wrap=True)
    from .._tune import plans

    if tables.folder.parent.parent.resolve() not in (plans.user_folder().resolve(), plans.SHIPPED):
        out.print(f"to use them: export JAXNORM_TUNED_DIR={tables.folder.parent.parent}", soft_wrap=True)
    if left:
        console(stderr=True).print(f"budget: {left} searches left; the same command goes on from here")
    if failures:
        raise CommandError(f"{failures} searches failed; their cases keep jaxnorm's own choice.")
