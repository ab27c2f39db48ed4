"""Token-by-token generation: prefill in chunks, then a jitted loop of decode steps; the KV cache is donated to both."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import KVCache

from . import model
from .errors import DemoError
from .model import Config, Params

LARGEST_CHUNK = 512
CHUNK_MULTIPLE = 64
SLOT_MULTIPLE = 64
BLOCK = 16
"""Decode steps in one call of the loop: as many tokens appear at once."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_k 0 samples from the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """logits [..., V] -> token ids [...]."""
        if self.temperature == 0.0:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        if self.top_k == 0:
            return jax.random.categorical(key, logits)
        best, ids = jax.lax.top_k(logits, self.top_k)
        choice = jax.random.categorical(key, best)
        return jnp.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]


class Step(NamedTuple):
    """A generated token and the float32 logits [V] it was chosen from (on the device until read)."""

    token: int
    logits: jax.Array


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_length(config: Config, prompt_tokens: int, max_tokens: int) -> None:
    """Raises DemoError when prompt and new tokens together exceed the model's context."""
    if prompt_tokens + max_tokens > config.context:
        raise DemoError(
            f"gemma: the prompt has {prompt_tokens} tokens and {max_tokens} more were asked for; the model's context "
            f"holds {config.context}. Shorten the prompt or lower --max-tokens."
        )


class Generator:
    """Compiled prefill and decode for prompts of up to `prompt_tokens` tokens and up to `max_tokens` new ones.

    The prompt goes through in chunks of one size, so memory stays bounded and one program serves all of them; the
    padding of the last chunk lands in cache slots that no token sees before they are overwritten.

    Raises:
      DemoError: prompt and new tokens together exceed the model's context.
    """

    def __init__(
        self,
        params: Params,
        config: Config,
        *,
        prompt_tokens: int,
        max_tokens: int,
        kv_cache: str = "bf16",
        sampling: Sampling | None = None,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> None:
        check_length(config, prompt_tokens, max_tokens)
        self.config = config
        self.params = params
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.kv_cache = kv_cache
        self.chunk = min(LARGEST_CHUNK, round_up(prompt_tokens, CHUNK_MULTIPLE))
        self.slots = round_up(max(round_up(prompt_tokens, self.chunk), prompt_tokens + max_tokens), SLOT_MULTIPLE)
        self.table = model.rope_tables(config, self.slots)
        sampling = sampling or Sampling()

        def prefill(
            params: Params,
            table: jax.Array,
            tokens: jax.Array,
            cache: KVCache,
            start: jax.Array,
            last: jax.Array,
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array, KVCache]:
            hidden, cache = model.forward(params, config, tokens, table, cache, start)
            logits = model.logits(params, jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False))
            return sampling(logits, jax.random.fold_in(key, start + last)), logits[0], cache

        def decode(
            params: Params,
            table: jax.Array,
            token: jax.Array,
            cache: KVCache,
            start: jax.Array,
            count: jax.Array,
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
            """`count` steps, at most BLOCK: (the last token, the tokens, their logits, the cache)."""

            def step(i: jax.Array, state: tuple) -> tuple:
                token, tokens, rows, cache = state
                hidden, cache = model.forward(params, config, token[:, None], table, cache, start + i)
                logits = model.logits(params, hidden[:, 0])
                token = sampling(logits, jax.random.fold_in(key, start + i))
                return token, tokens.at[i].set(token[0]), rows.at[i].set(logits[0]), cache

            rows = jnp.zeros((BLOCK, config.vocab), jnp.float32)
            return jax.lax.fori_loop(0, count, step, (token, jnp.zeros(BLOCK, token.dtype), rows, cache))

        self.decode_function = decode
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        chunk = jax.ShapeDtypeStruct((1, self.chunk), jnp.int32)
        shapes, table, _, cache, _, _, key = self.decode_arguments
        progress("prefill")
        lowered = jax.jit(prefill, donate_argnames="cache").lower(shapes, table, chunk, cache, scalar, scalar, key)
        self._prefill = lowered.compile()
        progress("decode")
        self._decode = jax.jit(decode, donate_argnames="cache").lower(*self.decode_arguments).compile()

    @property
    def decode_arguments(self) -> tuple:
        """Shapes and dtypes of `decode_function`'s arguments."""
        arrays = (
            self.params,
            self.table,
            jnp.zeros(1, jnp.int32),
            jax.eval_shape(lambda: model.init_cache(self.config, 1, self.slots, self.kv_cache)),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jax.random.key(0),
        )
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)

    def __call__(self, prompt_ids: Sequence[int], *, seed: int = 0, stop_id: int | None = None) -> Iterator[Step]:
        """Yields up to `max_tokens` steps; `stop_id` ends the text and is not yielded.

        Raises:
          ValueError: the prompt is empty, or longer than the generator was compiled for.

        The next steps are dispatched before the tokens are read back, so reading and printing cost the device no time.
        """
        if not 0 < len(prompt_ids) <= self.prompt_tokens:
            raise ValueError(
                f"Generator: prompt_ids: got {len(prompt_ids)} tokens, expected 1 to {self.prompt_tokens}."
            )
        key = jax.random.key(seed)
        cache = model.init_cache(self.config, 1, self.slots, self.kv_cache)
        count = len(prompt_ids)
        padded = np.zeros((1, round_up(count, self.chunk)), np.int32)
        padded[0, :count] = prompt_ids
        token, logits = None, None
        for start in range(0, count, self.chunk):
            last = np.int32(min(self.chunk, count - start) - 1)
            piece = padded[:, start : start + self.chunk]
            token, logits, cache = self._prefill(self.params, self.table, piece, cache, np.int32(start), last, key)
        assert token is not None and logits is not None
        tokens, rows, made = token, logits[None], 1
        while made:
            found, found_rows, here = tokens, rows, made
            count += made
            made = min(BLOCK, len(prompt_ids) + self.max_tokens - count)
            if made:
                at = np.int32(count - 1), np.int32(made)
                token, tokens, rows, cache = self._decode(self.params, self.table, token, cache, *at, key)
            for value, row in zip(np.asarray(found[:here]).tolist(), found_rows, strict=False):
                if value == stop_id:
                    return
                yield Step(value, row)


@dataclasses.dataclass
class Stopwatch:
    """Time to the first token, and the rate of those after it."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def first_token_seconds(self) -> float:
        return (self.first or self.started) - self.started

    @property
    def tokens_per_second(self) -> float:
        """0 until there are two tokens."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 and self.first is not None else 0.0
