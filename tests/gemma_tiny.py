"""examples/gemma on small random weights, without the files and packages that the real ones need."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from examples.gemma import comparison, model

TINY = model.Config(
    vocab=300, width=32, layers=7, heads=4, kv_heads=2, head_dim=16, mlp_width=48, context=96, window=5
)  # fmt: skip
# Kind of cache, what a decode may differ by from the prefill of the same text through the same kind, and by from no cache at all.
# Seen on a CPU: 8e-7 and 0, 1e-4 and 4e-3, 5e-7 and 6.5e-2, 4e-4 and 1.3e-2.
CACHES = [("float32", 1e-5, 1e-5), ("bf16", 1e-3, 1e-2), ("fp8", 1e-2, 0.1), ("int8", 5e-3, 3e-2)]


def tiny_params(config: model.Config, seed: int = 0) -> model.Params:
    rng = np.random.default_rng(seed)

    def array(shape: tuple[int, ...]) -> jax.Array:
        norm = len(shape) == 1
        return jnp.asarray(rng.normal(1.0 if norm else 0.0, 0.3 if norm else shape[-1] ** -0.5, shape), jnp.float32)

    shapes = model.layer_shapes(config)
    layers = model.Layer(*(jnp.stack([array(shape) for _ in range(config.layers)]) for shape in shapes))
    return model.Params(array((config.vocab, config.width)), array((config.width,)), layers)


def relative(got: jax.Array, exact: jax.Array) -> float:
    """Root mean square of the error by that of the logits."""
    return float(jnp.sqrt(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2)))


def check_decode(config: model.Config, kind: str, decode: float, rounding: float) -> jax.Array:
    """A decode of 64 tokens against the prefill of the same text, and that against no cache; the prefill's logits.

    Another order of summation rounds a key or a value the other way now and then; that is all there is between the two.
    """
    params = tiny_params(config)
    tokens = jnp.asarray(np.random.default_rng(2).integers(4, config.vocab, 64), jnp.int32)
    table = model.rope_tables(config, 64)

    @jax.jit
    def by_token(params, cache):
        def step(cache, item):
            hidden, cache = model.forward(params, config, item[1][None, None], table, cache, item[0])
            return cache, model.logits(params, hidden)[0, 0]

        return jax.lax.scan(step, cache, (jnp.arange(64), tokens))

    cache, got = by_token(params, model.init_cache(config, 1, 64, kind))
    prefilled = comparison.all_logits(params, config, tokens, table, kind)
    exact = comparison.all_logits(params, config, tokens, table, None)
    found = relative(got, prefilled), relative(prefilled, exact)
    print(f"{kind}: decode against prefill {found[0]:.1e}, prefill against no cache {found[1]:.1e}")
    assert found[0] < decode and found[1] < rounding
    assert found[1] > 1e-4 or kind == "float32"
    assert cache.k.dtype.name.startswith({"bf16": "bfloat16", "fp8": "float8_e4m3"}.get(kind, kind))
    return prefilled
