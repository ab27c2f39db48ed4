"""``python -m examples.tensor_parallel``: Gemma 3 270M over several devices, token for token the single-device model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from ..gemma.errors import DemoError

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"tensor_parallel: {error}. Install the demo's packages: pip install 'jaxnorm[demo]'") from error

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    devices: Annotated[int, typer.Option(min=2, help="GPUs, or host devices on a CPU.")] = 2,
    prompt: Annotated[
        str, typer.Option(help="The text to continue.")
    ] = "Once upon a time, in a small village by the sea,",
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; float32 must give the single device's tokens.")
    ] = "float32",
    gguf: Annotated[Path | None, typer.Option(help="Another Gemma 3 text model; default: the package's file.")] = None,
    random: Annotated[
        int,
        typer.Option(
            min=0, help="No file: random weights of Gemma 3 270M's sizes and so many prompt tokens. For timing."
        ),
    ] = 0,
) -> None:
    """Continue PROMPT on one device, and on DEVICES with jaxnorm.distributed and with plain collectives; compare and time."""
    console = Console(highlight=False)
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:  # before JAX starts: host devices, in case there is no GPU
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    try:
        run(console, devices, prompt, max_tokens, dtype, gguf, random)
    except DemoError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False, soft_wrap=True, style="red")
        raise typer.Exit(1) from error


def run(
    console: Console, devices: int, prompt: str, max_tokens: int, dtype: str, gguf: Path | None, random: int
) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from ..gemma import model
    from ..gemma.cli import TERMS, open_model, stages
    from . import random_weights
    from .generate import Generator
    from .sharding import AXIS, Plan

    if not random:
        console.print(TERMS, soft_wrap=True)
    if dtype not in ("float32", "bfloat16"):
        raise DemoError(f"tensor_parallel: --dtype: got {dtype!r}, expected float32 or bfloat16")
    if len(jax.devices()) < devices:
        raise DemoError(
            f"tensor_parallel: --devices {devices}: JAX has {len(jax.devices())} ({jax.devices()[0].platform})"
        )
    tokenizer = None
    if random:
        config = random_weights.GEMMA_3_270M
        params = random_weights.params(config, jnp.dtype(dtype))
        ids = random_weights.prompt(config, random)
    else:
        with stages(console) as progress:
            file, tokenizer, config = open_model(gguf, progress)
            task = progress.add_task("load weights", total=model.elements(config))
            params = model.load(file, config, jnp.dtype(dtype), lambda count: progress.advance(task, count))
        ids = tokenizer.encode(prompt)
    console.print(f"jax {jax.__version__}, {devices} of {len(jax.devices())} x {jax.devices()[0].device_kind}, {dtype}")
    found = {}
    ways = {"1 device": (1, True), "jaxnorm.distributed": (devices, False), "plain collectives": (devices, True)}
    for name, (ranks, plain) in ways.items():
        mesh = Mesh(np.array(jax.devices()[:ranks]), (AXIS,))
        generator = Generator(params, Plan(config, ranks), mesh, plain=plain)
        for _ in range(2):  # compiles, then still warms up: a second prompt took up to 2 ms longer than later ones
            generator(ids, max_tokens)
        found[name] = generator(ids, max_tokens, tokenizer.eos_id if tokenizer else None)
        one = found[name]
        console.print(
            f"{name:20s} prompt {1e3 * one.prefill_seconds:8.2f} ms, {1e3 * one.seconds_per_token:8.3f} ms a token"
        )
    if tokenizer:
        console.print(
            f"\n{prompt}{tokenizer.decode(found['jaxnorm.distributed'].tokens)}\n", markup=False, soft_wrap=True
        )
    same = found["jaxnorm.distributed"].tokens == found["1 device"].tokens
    console.print(f"tokens of {devices} devices and of one: {'the same' if same else 'different'}")
    if not same and dtype == "float32":
        raise DemoError("tensor_parallel: float32 must give the single device's tokens.")
