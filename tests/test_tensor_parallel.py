"""examples/tensor_parallel on host devices: token for token the single-device model, in float32."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from jax.sharding import Mesh

sys.path[:0] = [str(Path(__file__).parents[1])]
_missing = [name for name in ("gguf", "sentencepiece", "typer", "rich") if not importlib.util.find_spec(name)]
if _missing:
    pytest.skip(f"needs demo: {', '.join(_missing)} not installed: pip install -e '.[demo]'", allow_module_level=True)

from examples.gemma import model  # noqa: E402
from examples.gemma.errors import DemoError  # noqa: E402
from examples.tensor_parallel import model as tensor_parallel  # noqa: E402
from examples.tensor_parallel.generate import Generator  # noqa: E402
from examples.tensor_parallel.sharding import AXIS, Plan  # noqa: E402

# Key/value heads that divide, one that all ranks read, two that pairs of ranks read, query heads that do not divide;
# seeds whose models do not repeat one token.
CONFIGS = {
    "2 kv heads over 2": (2, {"heads": 4, "kv_heads": 2}, 2),
    "1 kv head over 4": (4, {"heads": 4, "kv_heads": 1}, 5),
    "2 kv heads over 4": (4, {"heads": 8, "kv_heads": 2}, 3),
    "3 heads over 2": (2, {"heads": 3, "kv_heads": 1}, 5),
}
TINY = {"vocab": 200, "width": 32, "layers": 3, "head_dim": 16, "mlp_width": 48, "context": 64, "window": 5}
PROMPT, NEW = [3, 17, 150, 9, 88, 41, 7], 10


def params_of(config: model.Config, seed: int) -> model.Params:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        norm = len(shape) == 1
        return jnp.asarray(rng.normal(1.0 if norm else 0.0, 0.3 if norm else shape[-1] ** -0.5, shape), jnp.float32)

    layers = model.Layer(*(jnp.stack([array(*s) for _ in range(config.layers)]) for s in model.layer_shapes(config)))
    return model.Params(array(config.vocab, config.width), array(config.width), layers)


def alone(params: model.Params, config: model.Config) -> list[int]:
    """The single-device model, examples/gemma's own forward: all tokens again for each that is added, so that it is one program."""
    length = len(PROMPT) + NEW
    slots = -(-length // model.PAGE) * model.PAGE
    table, cache = model.rope_tables(config, slots), model.init_cache(config, 1, slots, "float32")

    @jax.jit
    def following(tokens: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, config, tokens, table, cache, jnp.int32(0))
        return jnp.argmax(model.logits(params, hidden), -1)

    tokens = list(PROMPT)
    while len(tokens) < length:
        padded = jnp.asarray([tokens + [0] * (length - len(tokens))])  # attention is causal: what follows is not seen
        tokens.append(int(following(padded)[0, len(tokens) - 1]))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_token_for_token(name, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "FEW_ROWS", 4)  # the prompt has more, a step has one
    ranks, heads, seed = CONFIGS[name]
    needs.need_devices(ranks)
    config = model.Config(**TINY, **heads)
    params, plan = params_of(config, seed), Plan(config, ranks)
    assert plan.shards_heads == (name != "3 heads over 2")
    mesh = Mesh(np.array(jax.devices()[:ranks]), (AXIS,))
    want = alone(params, config)
    assert len(set(want)) > 2
    assert Generator(params, plan, mesh)(PROMPT, NEW).tokens == want
    if ranks == 2 and plan.shards_heads:
        assert Generator(params, plan, mesh, plain=True)(PROMPT, NEW).tokens == want


def test_columns_that_do_not_divide():
    with pytest.raises(DemoError, match="48 columns"):
        Plan(model.Config(**TINY, heads=4, kv_heads=2), 5)


@pytest.mark.slow
def test_real_weights():
    """The command: the package's weights on 2 host devices."""
    import os
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "examples.tensor_parallel", "--devices", "2", "--max-tokens", "8"], capture_output=True, text=True,
        cwd=Path(__file__).parents[1], env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0 and "of one: the same" in done.stdout, done.stdout + done.stderr
