"""``python -m examples.unet_block``: the block with jaxnorm's norms beside the block with Flax's."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

try:
    import flax  # noqa: F401
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"unet_block: {error}. Install what the example needs: pip install 'jaxnorm[unet]'") from error

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def main(
    batch: Annotated[int, typer.Option(min=1)] = 2,
    height: Annotated[int, typer.Option(min=1)] = 64,
    width: Annotated[int, typer.Option(min=1)] = 64,
    channels: Annotated[int, typer.Option(min=1, help="Of the input.")] = 320,
    out_channels: Annotated[int, typer.Option(min=0, help="Of the output; 0: those of the input.")] = 0,
    groups: Annotated[int, typer.Option(min=1, help="Of both norms.")] = 32,
    dtype: Annotated[DType, typer.Option(help="auto: float32 on the CPU, bfloat16 on a GPU.")] = DType.auto,
    backend: Annotated[str | None, typer.Option(help="xla, triton or hip; default: jaxnorm's own choice.")] = None,
    times: Annotated[int, typer.Option(min=1, help="Calls that are timed.")] = 5,
    explain: Annotated[bool, typer.Option(help="Show which backend and kernel each norm ran on.")] = True,
) -> None:
    """One residual block of Stable Diffusion's UNet, forward and gradient, by default at the size of its first level."""
    import jax
    import jax.numpy as jnp

    import jaxnorm

    from .comparison import Shape, compare, inputs, parameters, programs
    from .model import ResidualBlock

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    out_channels = out_channels or channels
    for name, count in (("--channels", channels), ("--out-channels", out_channels)):
        if count % groups:
            errors.print(f"unet_block: {name}: got {count}, expected a multiple of {groups} (--groups).", style="red")
            raise typer.Exit(1)
    if backend is not None:
        known = jaxnorm.backends()
        info = known.get(backend)
        if info is None or not info.usable:
            why = f"expected one of {', '.join(known)}" if info is None else f"{info.reason} {info.remedy}"
            errors.print(f"unet_block: --backend: got {backend!r}: {why}", style="red", soft_wrap=True)
            raise typer.Exit(1)
    device = jax.devices()[0]
    if dtype is DType.auto:
        dtype = DType.float32 if device.platform == "cpu" else DType.bfloat16
    shape = Shape(batch, height, width, channels, out_channels, groups)
    console.print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), {dtype.value}, {shape}")
    table = Table(title="against the block in float32; wall clock, convolutions included")
    for heading in ("norms", "output error", "gradient error", "forward", "gradient"):
        table.add_column(heading, justify="left" if heading == "norms" else "right")
    for r in compare(shape, jnp.dtype(dtype.value), backend=backend, times=times):
        cost = (f"{1e3 * s:.2f} ms" for s in (r.forward_seconds, r.gradient_seconds))
        table.add_row(r.norm, f"{r.output_error:.1e}", f"{r.gradient_error:.1e}", *cost)
    console.print(table)
    if explain:
        _, gradient = programs(ResidualBlock(out_channels, groups, "jaxnorm", jnp.dtype(dtype.value), backend))
        x, step, dy = inputs(shape, jnp.dtype(dtype.value))
        chosen = Table(title="jaxnorm.explain: the norms of one gradient")
        for heading in ("op", "backend", "kernel", "config", "reason"):
            chosen.add_column(heading, overflow="fold")
        for c in jaxnorm.explain(gradient, parameters(shape), x, step, dy):
            chosen.add_row(c.op, c.backend, c.kernel, c.config, c.reason)
        console.print(chosen)
