"""``jaxnorm cache``: the folder of compiled kernels, shown, cleared, filled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from .._compile import cache as store
from ._common import CommandError, console, new_app, size, wrong

UNFINISHED_SECONDS = 3600
"""A half-written file older than this was left by a process that is gone."""

app = new_app(no_args_is_help=True, help="Show, clear or fill the folder of compiled kernels ($JAXNORM_CACHE_DIR).")


def _groups(entries: Iterable[store.Entry]) -> dict[tuple[str, str], list[store.Entry]]:
    found: dict[tuple[str, str], list[store.Entry]] = {}
    for e in entries:
        found.setdefault((e.target, e.name) if not e.damage else ("", "damaged or unfinished"), []).append(e)
    return dict(sorted(found.items()))


def _problem() -> str:
    """Why nothing would be loaded from the folder; empty when all is well."""
    folder = store.directory()
    return "" if not folder.is_dir() or store.trusted(folder) else store.problem()


@app.command()
def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the compiled kernels by target and name, with their number and size."""
    entries, problem = store.entries(), _problem()
    groups = _groups(entries)
    if as_json:
        rows: list[dict[str, Any]] = [
            {"target": target, "kernel": name, "files": len(group), "bytes": sum(e.bytes for e in group)}
            for (target, name), group in groups.items()
        ]
        print(json.dumps({"folder": str(store.directory()), "problem": problem, "kernels": rows}, indent=1))
        return
    out = console()
    out.print(f"[bold]{store.directory()}[/bold]" + ("" if store.directory().is_dir() else " (not there yet)"))
    if problem:
        out.print(f"[red]{problem}[/red]")
    if not entries:
        out.print("no compiled kernel")
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("target")
    table.add_column("kernel", overflow="fold")
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    table.add_column("newest")
    for (target, name), group in groups.items():
        newest = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(e.modified for e in group)))
        table.add_row(target, name, str(len(group)), size(sum(e.bytes for e in group)), newest)
    out.print(table)
    out.print(f"{len(entries)} files, {size(sum(e.bytes for e in entries))}")


@app.command()
def clear(
    target: Annotated[str | None, typer.Option(help="Only this target's kernels, e.g. sm_90.")] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, help="Only files not written for so many days.")
    ] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Only what would not be loaded.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
) -> None:
    """Delete compiled kernels. They are compiled again when needed; tuned tables and other files stay."""
    now = time.time()
    entries = store.entries()
    known = {e.target for e in entries if e.target}
    if target is not None and entries and target not in known:
        wrong("--target", repr(target), f"one of {', '.join(sorted(known)) or 'none'} (those in the cache)")
    chosen = [
        e
        for e in entries
        if (target is None or e.target == target)
        and (older_than is None or now - e.modified > older_than * 86400)
        and (not damaged or e.damage)
        and not (e.path.name.startswith(".new-") and now - e.modified < UNFINISHED_SECONDS)
    ]
    total = size(sum(e.bytes for e in chosen))
    if dry_run:
        console().print(f"would delete {len(chosen)} of {len(entries)} files, {total}, in {store.directory()}")
        return
    failed = store.remove(chosen)
    console().print(f"deleted {len(chosen) - len(failed)} of {len(entries)} files, {total}, in {store.directory()}")
    if failed:
        raise CommandError(f"{len(failed)} files could not be deleted, the first: {failed[0]}")
