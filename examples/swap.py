"""A Flax model that exists, made to run on jaxnorm's kernels by one call; parameters stay the arrays they are.

    python -m examples.swap [--width 256]

Needs flax (pip install 'jaxnorm[flax]').
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

import jaxnorm as jn


class Stem(nnx.Module):
    """A convolution and a group norm, as vision models begin."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(width, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.norm(self.conv(x)))


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Model(nnx.Module):
    """Pooled features [B, width] of images [B, H, W, 3]."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.stem = Stem(width, rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean(1))


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 8, the groups of the group norm")
    options = parser.parse_args(argv)
    if options.width % 8:
        parser.error("--width: expected a multiple of 8")
    model = Model(options.width, nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    run = nnx.jit(lambda model, images: model(images))
    before = run(model, images)
    print(jn.swap(model))
    after = run(model, images)
    apart = float(jnp.abs(after - before).max())
    print(f"\nlargest difference of the outputs: {apart:.1e}\n")
    print(jn.explain(run, model, images))
    return apart


if __name__ == "__main__":
    main()
