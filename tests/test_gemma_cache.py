"""examples/gemma and its KV cache: what each kind costs, decode against prefill, slots, the loop in place."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from gemma_tiny import CACHES, TINY, check_decode, tiny_params
from test_gemma import TOKENS, whole

from examples.gemma import model
from examples.gemma.generate import Generator


@pytest.mark.parametrize(("kind", "decode", "rounding"), CACHES)
def test_decode_of_64_tokens_equals_prefill(kind, decode, rounding):
    check_decode(TINY, kind, decode, rounding)


def test_sequences_and_blocks_have_slots_of_their_own():
    """Two sequences in one cache, each as if it were alone."""
    params, table = tiny_params(TINY), model.rope_tables(TINY, 32)
    tokens = jnp.asarray([TOKENS, TOKENS[::-1]])
    hidden, _ = model.forward(params, TINY, tokens, table, model.init_cache(TINY, 2, 32, "float32"), jnp.int32(0))
    for row, text in zip(model.logits(params, hidden), (TOKENS, TOKENS[::-1]), strict=True):
        np.testing.assert_allclose(row, whole(params, TINY, text), rtol=1e-4, atol=1e-4)


def test_the_decode_loop_updates_the_cache_in_place():
    generator = Generator(tiny_params(TINY), TINY, prompt_tokens=4, max_tokens=4, kv_cache="int8")
    text = generator._decode.as_text()
    shape = ",".join(map(str, generator.decode_arguments[3].k.shape))
    made = re.findall(rf" = \w+\[{shape}\]\S* ([\w-]+)\(", text)
    assert {"scatter", "dynamic-update-slice"} & set(made) and "copy" not in made, made
    assert len(re.findall(r"(?:may|must)-alias", text.split("\n", 1)[0])) >= 4
