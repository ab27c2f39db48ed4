"""jaxnorm in five minutes: norms, their gradients, quantised results, rotary embedding, and what ran where.

    python -m examples.quickstart [--rows 8] [--features 4096]

Runs on a CPU, too: the same calls, the same numerics.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import jaxnorm as jn


def block_end(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The residual add and the norm of a transformer block, one kernel instead of two."""
    return jn.add_rmsnorm(x, residual, weight, eps=1e-6)


def loss(x: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
    y, residual_out = block_end(x, residual, weight)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(residual_out.astype(jnp.float32))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--features", type=int, default=4096, help="a multiple of 128")
    options = parser.parse_args(argv)
    if options.features % 128:
        parser.error("--features: expected a multiple of 128, the group of the quantised example")
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (options.rows, options.features)
    x, residual = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2])
    weight = 1 + 0.1 * jax.random.normal(keys[2], shape[-1:])  # float32, read as it is beside a bfloat16 x

    print("1. a norm with its residual, and gradients")
    y, residual_out = jax.jit(block_end)(x, residual, weight)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, residual, weight)
    print(
        f"   y {y.dtype}{list(y.shape)}, residual_out {residual_out.dtype}, gradients {[str(g.dtype) for g in grads]}"
    )

    print("2. the same row gives the same bits, alone or in a batch")
    alone, _ = jax.jit(block_end)(x[:1], residual[:1], weight)
    print(f"   equal: {bool((alone == y[:1]).all())}")

    print("3. quantised in the same pass over memory")
    for spec in (jn.QuantSpec("int8"), jn.QuantSpec("fp8"), jn.QuantSpec("fp8", group_size=128)):
        q, _ = jn.add_rmsnorm_quant(x, residual, weight, spec)
        error = jnp.sqrt(jnp.mean((q.dequantize() - y.astype(jnp.float32)) ** 2) / jnp.mean(y.astype(jnp.float32) ** 2))
        groups = f"groups of {spec.group_size}" if spec.group_size else "a row"
        print(f"   {q.values.dtype}, one scale for {groups}: scale {list(q.scale.shape)}, error {float(error):.2%}")

    print("4. q/k norm and rotary embedding, one kernel")
    q, k = (jax.random.normal(keys[3], (options.rows, heads, 128), jnp.bfloat16) for heads in (8, 2))
    table = jn.rope_table(1024, 128)
    q, k = jn.qk_norm_rope(q, k, jnp.ones(128), jnp.ones(128), jnp.arange(options.rows), table)
    print(f"   q {list(q.shape)}, k {list(k.shape)}")

    print("5. what ran, and why")
    print(jn.explain(loss, x, residual, weight))


if __name__ == "__main__":
    main()
