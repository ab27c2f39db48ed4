"""``jaxnorm aot``: precompiled kernels for machines without a compiler, and kernel cases that check them."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ._common import CommandError, console, names, new_app, progress, require_writable, size, wrong

BACKENDS = ("hip", "triton")
app = new_app()


@app.command()
def aot(
    target: Annotated[
        list[str] | None, typer.Option(help="GPU to compile for: gfx942, gfx950, gfx90a, gfx1100, sm_90, ...; once for each.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="JSON or TOML file with the calls (docs/aot.md).")] = None,
    model: Annotated[list[str] | None, typer.Option(help="The norms of a model, e.g. llama3-8b; once for each.")] = None,
    quant: Annotated[str, typer.Option(help="With --model: per-token codes of these dtypes, too, e.g. 'int8,fp8'.")] = "",
    grad: Annotated[bool, typer.Option("--grad", help="With --model: the backward, too.")] = False,
    backend: Annotated[str | None, typer.Option(help="hip or triton; default: what the dispatch prefers.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make.")] = None,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="Write a kernel case beside each code object, for tools/run_case.py. Without --spec and "
                     "--model: of every op, dtype and quantisation."),
    ] = False,
    check: Annotated[Path | None, typer.Option(help="Directory to verify instead: hashes, ELF headers, completeness.")] = None,
) -> None:  # fmt: skip
    """Compile what a list of calls needs, for GPUs that need not be here.

    On the target machine set JAXNORM_CACHE_DIR to the directory; it may be read-only. Nothing is compiled there then.
    """
    if backend is not None and backend not in BACKENDS:
        wrong("--backend", repr(backend), "hip or triton")
    try:
        calls = _calls(spec, model or [], quant, grad)
        if check is not None:
            _check(check, calls, target or [])
            return
        if out is None or not target:
            wrong(
                "--out" if out is None else "--target",
                "nothing",
                "a directory" if out is None else "gfx942, sm_90, ...",
            )
        if calls is None and not bundle:
            wrong("--spec", "nothing", "a file with the calls, or --model with a name")
        _make(out, calls, list(dict.fromkeys(target)), backend, bundle)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), 2) from None
    except OSError as error:
        raise CommandError(f"{error.filename or out}: {error.strerror or error}.") from None


def _calls(spec: Path | None, model: list[str], quant: str, grad: bool) -> Any:
    from .._aot import models
    from .._aot import spec as specs
    from .._types import DTYPES

    if spec is None and not model:
        return None
    found = specs.load(spec) if spec is not None else []
    dtypes = names("--quant", quant, DTYPES) if quant else []
    for name in model:
        found += models.calls(name, tuple(dtypes), grad)
    return found


def _make(out: Path, calls: Any, targets: list[str], backend: str | None, bundle: bool) -> None:
    from .._aot import bundle as bundles
    from .._aot import directory, release

    require_writable(out, "--out")
    start = time.perf_counter()
    if calls is None:
        calls = release.calls()
    with progress() as bar:
        task = bar.add_task("compiling", total=None)
        step = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        made = directory.make(out, calls, targets, backend, report=console(stderr=True).print, step=step)
        if bundle:
            bar.update(task, description="cases", completed=0, total=len(made))
            bundles.write(out, made, step)
    lines = Counter((code.target, code.compiler) for _, code in made.values())
    for (target, compiler), count in sorted(lines.items()):
        bytes_ = sum(len(c.image) for _, c in made.values() if (c.target, c.compiler) == (target, compiler))
        console().print(f"{target}: {count} code objects, {size(bytes_)}, {compiler}")
    if bundle:
        console().print(f"{len(made)} kernel cases in {out / bundles.FOLDER}: python tools/run_case.py {out}")
    console().print(f"{out} made in {time.perf_counter() - start:.0f} s. On the target: JAXNORM_CACHE_DIR={out}")


def _check(folder: Path, calls: Any, targets: list[str]) -> None:
    from .._aot import bundle as bundles
    from .._aot import directory

    wrongs = directory.check(folder, calls, targets) + bundles.check(folder)
    for line in wrongs:
        print(line)
    if wrongs:
        raise CommandError(f"{folder}: {len(wrongs)} findings.")
    manifest = directory.read_manifest(folder)
    objects = manifest["objects"]
    console().print(
        f"{folder}: {len(objects)} code objects for {', '.join(targets or manifest['targets'])}, whole and complete"
    )
