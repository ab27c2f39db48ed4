"""Inference over several devices: rows sharded without a collective, and a tensor-parallel block whose end is one fused call.

    python -m examples.sharded_inference [--devices 8] [--tokens 64] [--width 512]

On a CPU the devices are simulated. Printed are the collectives in the compiled programs, and the largest difference from one
device.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

COLLECTIVES = re.compile(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
Arrays = tuple[jax.Array, ...]


def mlp(h: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return jax.nn.silu(h @ up) @ down


def block(x: jax.Array, residual: jax.Array, weight: jax.Array, up: jax.Array, down: jax.Array) -> Arrays:
    """Two norms around an MLP, on one device: (h, residual)."""
    h, residual = jn.add_rmsnorm(x, residual, weight)
    return jn.add_rmsnorm(mlp(h, up, down), residual, weight)


def tensor_parallel(mesh: jax.sharding.Mesh) -> Callable[..., Arrays]:
    """The same with ``up`` split by columns and ``down`` by rows: each device has a partial sum, which the last norm adds up."""

    def local(x: jax.Array, residual: jax.Array, weight: jax.Array, up: jax.Array, down: jax.Array) -> Any:
        h, residual = jn.add_rmsnorm(x, residual, weight)
        partial = mlp(h, up, down)
        return jn.distributed.allreduce_add_rmsnorm(partial, residual, weight, axis_name="model")

    specs = (P(), P(), P(), P(None, "model"), P("model"))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P())))


def collectives(function: Callable[..., Any], *args: Any) -> list[str]:
    """Kinds of the collectives in the compiled program, in order."""
    return COLLECTIVES.findall(jax.jit(function).lower(*args).compile().as_text())


def arrays(tokens: int, width: int) -> Arrays:
    keys = jax.random.split(jax.random.key(0), 5)
    x, residual = (jax.random.normal(k, (tokens, width)) for k in keys[:2])
    weight = 1 + 0.1 * jax.random.normal(keys[2], (width,))
    up = jax.random.normal(keys[3], (width, 4 * width)) / width**0.5
    down = jax.random.normal(keys[4], (4 * width, width)) / (4 * width) ** 0.5
    return x, residual, weight, up, down


def simulate(devices: int) -> None:
    """That many CPU devices; without effect once JAX has started, or where there are GPUs."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[list[str], float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args(argv)
    simulate(options.devices)
    found = jax.devices()
    if len(found) < options.devices:
        parser.error(f"--devices: got {options.devices}, expected at most {len(found)}, those that JAX has here")
    for name in ("tokens", "width"):
        if getattr(options, name) % options.devices:
            parser.error(f"--{name}: expected a multiple of --devices")
    args = arrays(options.tokens, options.width)
    want = jax.jit(block)(*args)
    results = {}

    mesh = jax.make_mesh((options.devices,), ("rows",), axis_types=(AxisType.Auto,), devices=found[: options.devices])
    rows, whole = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
    placed = jax.device_put(args, (rows, rows, whole, whole, whole))
    results["tokens sharded"] = (collectives(block, *placed), difference(jax.jit(block)(*placed), want))

    mesh = jax.make_mesh((options.devices,), ("model",), axis_types=(AxisType.Auto,), devices=found[: options.devices])
    parallel = tensor_parallel(mesh)
    results["tensor parallel"] = (collectives(parallel, *args), difference(parallel(*args), want))

    print(f"{options.tokens} tokens, width {options.width}, {options.devices} x {found[0].device_kind}")
    for name, (kinds, apart) in results.items():
        print(f"{name:16s} collectives: {', '.join(kinds) or 'none'}; at most {apart:.1e} from one device")
    return results


def difference(got: Arrays, want: Arrays) -> float:
    return max(float(jnp.abs(jax.device_get(a) - jax.device_get(b)).max()) for a, b in zip(got, want, strict=True))


if __name__ == "__main__":
    main()
