"""A model of Gemma 3 270M's sizes without a file: time depends on the sizes alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..gemma.model import Config, Layer, Params, layer_shapes

GEMMA_3_270M = Config(
    vocab=262144, width=640, layers=18, heads=4, kv_heads=1, head_dim=256, mlp_width=2048, context=32768, window=512
)


def params(config: Config, dtype: jnp.dtype, seed: int = 0) -> Params:
    """Matrices with rows of length about 1, norm weights about 1, in float32."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 + len(Layer._fields)))

    def array(*shape: int, vector: bool = False) -> jax.Array:
        noise = jax.random.normal(next(keys), shape, jnp.float32)
        return 1 + 0.3 * noise if vector else (noise * shape[-1] ** -0.5).astype(dtype)

    layers = Layer(*(array(config.layers, *s, vector=len(s) == 1) for s in layer_shapes(config)))
    return Params(array(config.vocab, config.width), array(config.width, vector=True), layers)


def prompt(config: Config, tokens: int) -> list[int]:
    return jax.random.randint(jax.random.key(tokens), (tokens,), 0, config.vocab).tolist()
