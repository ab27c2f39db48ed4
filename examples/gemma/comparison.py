"""What quantisation costs: the logits of a quantised model against those of the float32 one, on a text."""

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


@functools.partial(jax.jit, static_argnums=1)
def all_logits(params: Params, config: Config, ids: jax.Array) -> jax.Array:
    """float32 [T, V] for token ids [T], in the dtype of the embedding."""
    cache = model.init_cache(config, 1, ids.shape[0], params.embedding.dtype)
    hidden, _ = model.forward(params, config, ids[None], cache, jnp.int32(0))
    return model.logits(params, hidden)[0]


@jax.jit
def statistics(exact: jax.Array, got: jax.Array) -> tuple[jax.Array, ...]:
    error = got - exact
    same = jnp.argmax(exact, axis=-1) == jnp.argmax(got, axis=-1)
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
    return jnp.max(jnp.abs(error)), rms(error), rms(exact), jnp.mean(same.astype(jnp.float32))


def compare(reference: Params, params: Params, config: Config, tokens: Sequence[int]) -> Comparison:
    """Runs both models over `tokens`, cut to the context."""
    ids = jnp.asarray(list(tokens)[: config.context], jnp.int32)
    values = statistics(all_logits(reference, config, ids), all_logits(params, config, ids))
    return Comparison(len(ids), *map(float, values))
