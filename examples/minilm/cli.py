"""``python -m examples.minilm``: which sentence means what the query means, every LayerNorm computed by jaxnorm."""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from .weights import ModelError

try:
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"minilm: {error}. Install what the example needs: pip install 'jaxnorm[minilm]'") from error

QUERY = "How do I make a neural network train faster?"
SENTENCES = (
    "Fusing the residual add with the layer norm saves a pass over memory.",
    "A larger batch keeps the GPU busy and shortens each epoch.",
    "Mixed precision halves the traffic of the activations.",
    "The recipe needs two eggs, flour and a pinch of salt.",
    "Bake the bread at 220 degrees for half an hour.",
    "Our train to the coast leaves at nine in the morning.",
    "Gradient clipping keeps training stable.",
    "The match was decided by a penalty in extra time.",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def main(
    query: Annotated[str, typer.Argument(help="What to look for.")] = QUERY,
    sentences: Annotated[
        Path | None, typer.Option(help="A text file, one sentence a line; default: a few built in.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Sentences shown.")] = 10,
    dtype: Annotated[
        DType, typer.Option(help="Of the matrices and activations; norms are float32 inside.")
    ] = DType.float32,
    backend: Annotated[str | None, typer.Option(help="xla, triton or hip; default: jaxnorm's own choice.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another BERT sentence encoder's folder; default: the package's.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Show which backend and kernel each norm ran on.")] = False,
) -> None:
    """Rank sentences by their similarity to QUERY with all-MiniLM-L6-v2 in JAX, on the GPU where JAX has one."""
    console = Console(highlight=False)
    try:
        run(console, query, sentences, top, dtype, backend, model, explain)
    except ModelError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True, style="red")
        raise typer.Exit(1) from error


def run(
    console: Console,
    query: str,
    path: Path | None,
    top: int,
    dtype: DType,
    backend: str | None,
    model: Path | None,
    explain: bool,
) -> None:
    """Everything after the arguments are parsed; raises ModelError for what the user can put right."""
    import jax

    import jaxnorm

    from .embed import Encoder, ranked

    texts = read(path)
    check_backend(backend)
    with jaxnorm.use_backend(backend) if backend else contextlib.nullcontext():
        began = time.perf_counter()
        encoder = Encoder(model, dtype.value)
        loaded = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("embed", total=len(texts) + 1)
            vectors = encoder([query, *texts], progress=lambda done: progress.advance(task, done))
        ended = time.perf_counter()
        console.print(table(query, texts, ranked(vectors[1:], vectors[0])[:top]))
        device = jax.devices()[0]
        console.print(
            f"{len(texts) + 1} sentences, {vectors.shape[1]} features, {dtype.value} on {device.device_kind}: "
            f"load {loaded - began:.1f} s, compile and embed {ended - loaded:.1f} s"
        )
        if explain:
            ids, mask = encoder.tokens([query])
            found = jaxnorm.explain(lambda p: encoder.function(p, tokens=ids, mask=mask), encoder.params)
            console.print(str(found), markup=False, soft_wrap=True)


def read(path: Path | None) -> list[str]:
    """The sentences of a file, or those built in."""
    if path is None:
        return list(SENTENCES)
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"minilm: --sentences: {error}, expected a UTF-8 text file, one sentence a line") from error
    if not found:
        raise ModelError(f"minilm: --sentences: {path} is empty, expected one sentence a line")
    return found


def check_backend(backend: str | None) -> None:
    """Raises ModelError unless ``backend`` is None or can run on this process's default device."""
    import jaxnorm

    if backend is None:
        return
    known = jaxnorm.backends()
    if backend not in known:
        raise ModelError(f"minilm: --backend: got {backend!r}, expected one of {', '.join(known)}")
    if not known[backend].usable:
        info = known[backend]
        raise ModelError(f"minilm: --backend {backend} is not usable here: {info.reason} {info.remedy}".rstrip())


def table(query: str, texts: list[str], found: list[tuple[int, float]]) -> Table:
    out = Table(title=f"closest to: {query}", title_style="bold", title_justify="left")
    out.add_column("cosine", justify="right")
    out.add_column("sentence", overflow="fold")
    for index, cosine in found:
        out.add_row(f"{cosine:.3f}", texts[index])
    return out
