"""``jaxnorm explain``: which backend and kernel the jaxnorm ops of a function, a script or a compiled program get."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from . import hlo
from ._common import CommandError, array_type, as_for, console, new_app, ops, wrong

app = new_app()


@app.command()
def explain(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A script (train.py), a function (model.py:block or package.module:block), or the text of a program "
            "as XLA dumps it (*.txt, *.hlo, *.mlir).",
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="A script's own arguments.")
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", help="Type of a function's next argument, e.g. 'bfloat16[8,4096]'; once for each."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="As if for this GPU: gfx942, sm_90, ...; default: the machine's device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which backend and kernel each jaxnorm op of a program gets, and why the others were not taken.

    A function is traced, not run. A script is run as python runs it, and every choice made meanwhile is listed. A dump is read: it
    shows the launches, and the ops that XLA compiled itself.

    Make a dump with XLA_FLAGS=--xla_dump_to=FOLDER, or write jax.jit(f).lower(...).compile().as_text() to a file.
    """
    path, _, function = source.rpartition(":")
    if function.isidentifier() and path:
        _show_choices(_of_function(path, function, arg or [], target), as_json)
    elif source.endswith(".py"):
        if target or arg:
            wrong("SOURCE", f"a script with {'--target' if target else '--arg'}", "file.py:function with these")
        _show_choices(_of_script(Path(source), arguments or []), as_json)
    else:
        _show_program(_text(Path(source)), as_json)


def _text(path: Path) -> str:
    if path.is_dir():
        wrong("SOURCE", f"the folder {path}", "one file of it, e.g. *after_optimizations.txt")
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise CommandError(f"SOURCE: cannot read {path}: {error.strerror}.", 2) from None
    if not hlo.is_program(text):
        wrong("SOURCE", str(path), "a script *.py, FILE.py:FUNCTION, or the text of an HLO or StableHLO program")
    return text


def _load(path: str, name: str) -> Any:
    if path.endswith(".py") or "/" in path:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise CommandError(f"SOURCE: there is no file {path}.", 2)
        module = importlib.util.module_from_spec(spec)
        with _first_on_path(str(Path(path).resolve().parent)):
            spec.loader.exec_module(module)
    else:
        with _first_on_path(""):
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                raise CommandError(f"SOURCE: {error}.", 2) from None
    if not callable(found := getattr(module, name, None)):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        wrong("SOURCE", f"no function {name!r} in {path}", f"one of {', '.join(public) or 'none there'}")
    return found


@contextlib.contextmanager
def _first_on_path(folder: str) -> Any:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _of_function(path: str, name: str, types: list[str], target: str | None) -> list[Any]:
    import jaxnorm

    function, arguments = _load(path, name), [array_type(t) for t in types]
    with as_for(target):
        try:
            return list(jaxnorm.explain(function, *arguments))
        except (TypeError, ValueError) as error:
            shown = ", ".join(types) or "no arguments (give them with --arg)"
            raise CommandError(f"{name} cannot be traced with {shown}: {error}", 2) from error


def _of_script(path: Path, arguments: list[str]) -> list[Any]:
    from .. import _explain

    if not path.is_file():
        raise CommandError(f"SOURCE: there is no file {path}.", 2)
    before, sys.argv = sys.argv, [str(path), *arguments]
    with _explain.recording() as found, _first_on_path(str(path.resolve().parent)):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code:
                print(f"jaxnorm explain: {path} ended with {end.code!r}", file=sys.stderr)
        finally:
            sys.argv = before
    return list(found)


def _show_choices(choices: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(c) for c in choices], indent=1))
        return
    out = console()
    if not choices:
        out.print("no jaxnorm op was lowered")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "backend", "kernel", "configuration", "why"):
        table.add_column(column, overflow="fold")
    for c in choices:
        why = "\n".join([c.reason, *(f"not {name}: {reason}" for name, reason in c.rejected)])
        table.add_row(c.op, c.backend, c.kernel, c.config, why)
    out.print(table)


def _show_program(text: str, as_json: bool) -> None:
    found, moved = hlo.find(text, list(ops())), hlo.collectives(text)
    if as_json:
        print(json.dumps({"ops": [asdict(f) for f in found], "collectives": moved}, indent=1))
        return
    out = console()
    if not found:
        out.print(
            "no jaxnorm op found. StableHLO needs names: write lowered.as_text(debug_info=True), "
            "or dump the optimised program."
        )
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("op", "runs as", "kernel", "target", "configuration", "where"):
            table.add_column(column, overflow="fold")
        for f in found:
            runs = f"a launch by {f.road}" if f.kernel else "XLA's own code"
            table.add_row(f.op or "not named", runs, f.kernel or "-", f.target or "-", f.config or "-", f.where or "-")
        out.print(table)
    total = ", ".join(f"{count} {name}" for name, count in moved.items())
    out.print(f"collectives in the whole program: {total or 'none'}")
