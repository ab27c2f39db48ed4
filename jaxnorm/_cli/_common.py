"""What the commands share: how they fail, how they print, how they show progress, how they read shapes."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

DTYPES = ("bfloat16", "float16", "float32", "int32", "int8")
_ARRAY = re.compile(r"(?P<dtype>[a-z0-9_]+)\[(?P<shape>[0-9, ]*)\]")


class CommandError(Exception):
    """Ends a command with one line on stderr and an exit code: 1 = it cannot be done here, 2 = the arguments are wrong."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def new_app(**options: Any) -> typer.Typer:
    """A Typer app as all commands have it: our own errors, no installer of shell completions."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", **options)


def run(app: typer.Typer, name: str, argv: list[str]) -> int:
    """Runs a command's app; its exit code."""
    from ..errors import CompileError, UnsupportedError

    try:
        typer.main.get_command(app).main(args=argv, prog_name=name, standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except CommandError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.code
    except (UnsupportedError, CompileError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def wrong(argument: str, got: object, expected: object, remedy: str = "") -> NoReturn:
    """Ends the command: an argument that cannot be meant."""
    raise CommandError(f"{argument}: got {got}, expected {expected}." + (f" {remedy}" if remedy else ""), 2)


def names(argument: str, text: str, known: Any) -> list[str]:
    """A comma list of names, each of them known."""
    found = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in found if n not in known]
    if unknown or not found:
        wrong(argument, ", ".join(map(repr, unknown)) or "nothing", f"some of {', '.join(known)}")
    return list(dict.fromkeys(found))


def ops() -> dict[str, Any]:
    """Every registered op by its public name."""
    import jaxnorm

    from .. import _stage

    for name in jaxnorm.__all__:
        getattr(jaxnorm, name)  # loading the families registers their ops
    return _stage.OPS


def array_type(text: str) -> Any:
    """``bfloat16[8,4096]`` as a ``jax.ShapeDtypeStruct``."""
    import jax
    import jax.numpy as jnp

    match = _ARRAY.fullmatch(text.strip())
    if match is None:
        wrong("--arg", repr(text), "DTYPE[DIM,DIM,...] such as bfloat16[8,4096]")
    try:
        dtype = jnp.dtype(match["dtype"])
    except TypeError:
        wrong("--arg", f"dtype {match['dtype']!r}", f"one of {', '.join(DTYPES)}, ... as jax.numpy names it")
    return jax.ShapeDtypeStruct(tuple(int(d) for d in match["shape"].replace(" ", "").split(",") if d), dtype)


def platform_of(target: str) -> str:
    return "rocm" if target.startswith("gfx") else "cuda"


@contextlib.contextmanager
def as_for(target: str | None) -> Any:
    """Inside ``use_target`` of that target, or unchanged."""
    import jaxnorm

    if target is None:
        yield
        return
    try:
        context = jaxnorm.use_target({platform_of(target): target})
    except ValueError as error:
        raise CommandError(f"--target: {error}", 2) from None
    with context:
        yield


def console(stderr: bool = False) -> Console:
    """Where results go; wide enough for a table when it is written to a file."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def progress() -> Progress:
    """A bar on stderr that leaves stdout to the results; silent where stderr is no terminal."""
    err = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def size(nbytes: float) -> str:
    """``1.5 MiB``"""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024 or unit == "MiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("the last unit always fits")


def require_writable(folder: Any, argument: str) -> None:
    """Ends the command unless files can be made in ``folder``; makes it if it is not there."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"{argument}: cannot write to {folder} ({reason}). Name another one.", 2) from None
