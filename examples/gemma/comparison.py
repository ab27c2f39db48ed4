"""What quantisation costs: the logits of a model with quantised weights or keys and values against the float32 one's, on a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from . import model
from .model import Config, Params

TEXT = (
    "The lighthouse stood at the end of a long stone pier, and every evening the keeper walked out to light the lamp. When the "
    "weather was bad, the waves broke over the wall and he had to wait for hours before he could go home.\n"
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air pressure is lower, so the boiling point is "
    "lower as well, and food takes longer to cook.\n"
    "The first railways were built to carry coal from the mines to the rivers. Within thirty years, trains were carrying "
    "passengers between the largest cities in the country, and towns that had been a day apart were now separated by an hour."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Over all positions of the text and the whole vocabulary: the error of the logits, and their own root mean square.

    top1 is the share of positions whose most likely next token is the same.
    """

    positions: int
    largest_error: float
    rms_error: float
    rms_logit: float
    top1: float

    def __str__(self) -> str:
        return (
            f"logit error against float32 on {self.positions} positions of text: max {self.largest_error:.3f}, "
            f"rms {self.rms_error:.4f} (logits: rms {self.rms_logit:.3f}); top-1 agreement {self.top1:.1%}"
        )


@functools.partial(jax.jit, static_argnums=(1, 4))
def all_logits(params: Params, config: Config, ids: jax.Array, table: jax.Array, kv_cache: str | None) -> jax.Array:
    """float32 [T, V] for token ids [T], in the dtype of the embedding; keys and values through a cache of this kind, or without."""
    slots = table.shape[0] // 2
    cache = None if kv_cache is None else model.init_cache(config, 1, slots, kv_cache)
    hidden, _ = model.forward(params, config, ids[None], table, cache, jnp.int32(0))
    return model.logits(params, hidden)[0]


@jax.jit
def statistics(exact: jax.Array, got: jax.Array) -> tuple[jax.Array, ...]:
    error = got - exact
    same = jnp.argmax(exact, axis=-1) == jnp.argmax(got, axis=-1)
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
    return jnp.max(jnp.abs(error)), rms(error), rms(exact), jnp.mean(same.astype(jnp.float32))


def compare(reference: Params, params: Params, config: Config, tokens: Sequence[int]) -> Comparison:
    """Runs both models, neither with a cache, over `tokens`, cut to the context."""
    ids, table = _inputs(config, tokens)
    exact = all_logits(reference, config, ids, table, None)
    return Comparison(len(ids), *map(float, statistics(exact, all_logits(params, config, ids, table, None))))


def compare_caches(
    params: Params, config: Config, tokens: Sequence[int], kinds: Sequence[str] = ("bf16", "fp8", "int8")
) -> dict[str, Comparison]:
    """The model with a cache of each kind against itself without one, over `tokens`: what rounding keys and values costs alone."""
    ids, table = _inputs(config, tokens)
    exact = all_logits(params, config, ids, table, None)
    found = {kind: statistics(exact, all_logits(params, config, ids, table, kind)) for kind in kinds}
    return {kind: Comparison(len(ids), *map(float, values)) for kind, values in found.items()}


def _inputs(config: Config, tokens: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    ids = jnp.asarray(list(tokens)[: config.context], jnp.int32)
    return ids, model.rope_tables(config, -(-len(ids) // model.PAGE) * model.PAGE)
