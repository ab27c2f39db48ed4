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
from ._common import CommandError, as_for, console, names, new_app, platform_of, progress, require_writable, size, wrong

UNFINISHED_SECONDS = 3600
"""A half-written file older than this was left by a process that is gone."""

app = new_app(no_args_is_help=True, help="Show, clear or fill the folder of compiled kernels ($JAXNORM_CACHE_DIR).")


def _groups(entries: Iterable[store.Entry]) -> dict[tuple[str, str], list[store.Entry]]:
    found: dict[tuple[str, str], list[store.Entry]] = {}
    for e in entries:
        found.setdefault(
            (e.target, e.name) if not e.damage else ("", "damaged, unfinished, or of another version"), []
        ).append(e)
    return dict(sorted(found.items()))


def _problem() -> str:
    """Why nothing would be loaded from the folder; empty when all is well."""
    folder = store.directory()
    return "" if not folder.is_dir() or store.trusted(folder) else store.problem()


@app.command()
def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the compiled kernels by target and name, and the tables of tuned plans."""
    from .._tune import plans

    entries, problem = store.entries(), _problem()
    groups, tables, notes = _groups(entries), plans.tables(), plans.notes()
    if as_json:
        rows: list[dict[str, Any]] = [
            {"target": target, "kernel": name, "files": len(group), "bytes": sum(e.bytes for e in group)}
            for (target, name), group in groups.items()
        ]
        tuned = [{"file": str(path), "device": d, "backend": b, "entries": n} for path, d, b, n in tables]
        shown = {"folder": str(store.directory()), "problem": problem, "kernels": rows, "tuned": tuned, "notes": notes}
        print(json.dumps(shown, indent=1))
        return
    out = console()
    out.print(f"[bold]{store.directory()}[/bold]" + ("" if store.directory().is_dir() else " (not there yet)"))
    if problem:
        out.print(f"[red]{problem}[/red]")
    if entries:
        _print_kernels(out, groups)
    else:
        out.print("no compiled kernel")
    for path, device, backend, count in tables:
        out.print(f"tuned plans: {count} for {backend} on {device}, {path}", soft_wrap=True)
    for note in notes:
        out.print(f"[red]passed over: {note}[/red]", soft_wrap=True)


def _print_kernels(out: Any, groups: dict[tuple[str, str], list[store.Entry]]) -> None:
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
    everything = [e for group in groups.values() for e in group]
    out.print(f"{len(everything)} files, {size(sum(e.bytes for e in everything))}")


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


@app.command()
def prewarm(
    ops: Annotated[str, typer.Option(help="Comma list, or `all`; `jaxnorm bench --list` shows them.")] = "all",
    shapes: Annotated[
        str,
        typer.Option(
            help="Comma list such as 8192x4096,rope:8192x32x128, as for bench; default: usual ones of each op."
        ),
    ] = "",
    dtypes: Annotated[str, typer.Option(help="Comma list of bfloat16, float16, float32.")] = "bfloat16",
    specs: Annotated[str, typer.Option(help="Formats of codes for the ops that quantise, as for bench.")] = "fp8",
    backends: Annotated[
        str, typer.Option(help="Comma list of triton, hip, auto (what a call without backend= gets).")
    ] = "auto",
    target: Annotated[
        str | None, typer.Option(help="GPU to compile for: gfx942, sm_90, ...; default: this machine's.")
    ] = None,
) -> None:
    """Compile the kernels of these ops now, so that no first call has to.

    Works on a machine without a GPU, too, for a folder that is carried to one: set JAXNORM_CACHE_DIR. A kernel is found again by
    programs of the same jaxnorm and the same compiler version.
    """
    require_writable(store.directory(), "JAXNORM_CACHE_DIR")
    from .._bench import ops as known
    from .._compile import target as targets

    platform = platform_of(target) if target else targets.default_platform()
    if platform not in targets.DEFAULT:
        raise CommandError(
            f"this machine's default device is a {platform}: name the GPU to compile for with --target.", 2
        )
    chosen = list(known.OPS) if ops == "all" else names("--ops", ops, known.OPS)
    formats = names("--specs", specs, known.SPECS)
    wanted = names("--backends", backends, ("triton", "hip", "auto"))
    try:
        cases = known.select(
            chosen, [s for s in shapes.split(",") if s], names("--dtypes", dtypes, known.DTYPES), formats, False
        )
    except ValueError as error:
        raise CommandError(f"--{error}.", 2) from None
    before, earlier = {e.path for e in store.entries()}, store.problem()
    served, refused = _compile_all(cases, wanted, platform, target)
    new = [e for e in store.entries() if e.path not in before]
    out = console()
    out.print(
        f"{served} of {served + len(refused)} programs compiled for {platform}; {len(new)} new kernels, "
        f"{size(sum(e.bytes for e in new))}, in {store.directory()}"
    )
    for why, count in refused.items():
        out.print(f"not compiled ({count}): {why}", soft_wrap=True)
    if store.problem() != earlier:
        raise CommandError(store.problem())
    if not served:
        raise CommandError("no kernel was compiled")


def _compile_all(cases: list[Any], wanted: list[str], platform: str, target: str | None) -> tuple[int, dict[str, int]]:
    """Lowers every case for the platform, which compiles its kernels; (number served, reason -> how many were not)."""
    from .. import _explain
    from ..errors import UnsupportedError

    served, refused = 0, dict[str, int]()
    with progress() as bar, as_for(target):
        task = bar.add_task("compile", total=len(cases) * len(wanted))
        for case in cases:
            for backend in wanted:
                bar.update(task, description=f"{case.key:<40} {backend}")
                with _explain.recording() as choices:
                    try:
                        _lower(case, None if backend == "auto" else backend, platform)
                        reasons = [f"{n}: {why}" for c in choices if c.backend == "xla" for n, why in c.rejected]
                    except UnsupportedError as error:
                        reasons = [f"{backend}: {error.reason} {error.remedy}"]
                served += not reasons
                for reason in reasons[:1]:
                    refused[reason] = refused.get(reason, 0) + 1
                bar.advance(task)
    return served, refused


def _lower(case: Any, backend: str | None, platform: str) -> None:
    import jax

    from .._bench.ops import OPS, input_types

    op, spec = OPS[case.op], case.quant_spec()
    f = op.ours(backend, spec)

    def gradients(*a: Any) -> Any:
        out, vjp = jax.vjp(f, *a)
        return vjp(out)

    jax.jit(gradients if op.gradients else f).trace(*input_types(case)).lower(lowering_platforms=(platform,))
