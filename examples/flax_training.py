"""A small character-level transformer, trained three times from the same weights on the same batches: with Flax's own norms, with
jaxnorm's drop-ins, and with the residual add fused into the norm. The three loss curves are one.

    python -m examples.flax_training [--steps 200] [--width 128] [--layers 4]

bfloat16 arithmetic, float32 parameters, rematerialised blocks. The text is the licence that ships with this repository. Needs flax
(pip install 'jaxnorm[flax]').
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxnorm as jn

TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "flax": nnx.RMSNorm,
    "jaxnorm": jn.nnx.RMSNorm,
    "fused": jn.nnx.AddRMSNorm,
}

ADAM = optax.adam(2e-3)  # one object: its functions are part of what nnx.jit compiles for


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of a batch."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 64
    batch: int = 16
    remat: bool = True
    dtype: Any = jnp.bfloat16


def add_norm(norm: nnx.Module, x: jax.Array, residual: jax.Array) -> tuple[Any, jax.Array]:
    """(norm of ``x + residual``, that sum): one kernel where the module is fused, else two steps."""
    if isinstance(norm, jn.nnx.AddRMSNorm):
        return norm(x, residual)
    residual = residual + x
    return norm(residual), residual  # type: ignore[operator]


class Block(nnx.Module):
    """Attention and MLP. The residual add of each sits in the norm in front of the next: x is what the last one gave."""

    def __init__(self, config: Config, norm: Callable[..., nnx.Module], rngs: nnx.Rngs) -> None:
        linear = lambda i, o: nnx.Linear(i, o, use_bias=False, dtype=config.dtype, rngs=rngs)  # noqa: E731
        self.heads = config.heads
        self.attention_norm = norm(config.width, dtype=config.dtype, rngs=rngs)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.mlp_norm = norm(config.width, dtype=config.dtype, rngs=rngs)
        self.up = linear(config.width, 4 * config.width)
        self.down = linear(4 * config.width, config.width)

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, residual = add_norm(self.attention_norm, x, residual)
        h, residual = add_norm(self.mlp_norm, self.out(attend(self.qkv(h), self.heads)), residual)
        return self.down(jax.nn.gelu(self.up(h))), residual


def attend(qkv: jax.Array, heads: int) -> jax.Array:
    """Causal attention [B, T, N] of qkv [B, T, 3 N]."""
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in jnp.split(qkv, 3, axis=-1))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*qkv.shape[:2], -1)


class Model(nnx.Module):
    """Logits float32 [B, T, V] of tokens [B, T]; the residual stream is float32."""

    def __init__(self, config: Config, vocabulary: int, norm: Callable[..., nnx.Module], rngs: nnx.Rngs) -> None:
        self.remat = config.remat
        self.words = nnx.Embed(vocabulary, config.width, rngs=rngs)
        self.places = nnx.Embed(config.length, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, norm, rngs) for _ in range(config.layers)])
        self.norm = norm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        residual = self.words(tokens)
        x = jnp.broadcast_to(self.places(jnp.arange(tokens.shape[1])), residual.shape)
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x, residual = run(block, x, residual)
        return self.head(add_norm(self.norm, x, residual)[0].astype(jnp.float32))


def characters() -> tuple[np.ndarray, int]:
    """(the text as indices of its characters, the number of different ones)"""
    letters, indices = np.unique(list(TEXT.read_text(encoding="utf-8")), return_inverse=True)
    return indices.astype(np.int32), len(letters)


def batches(text: np.ndarray, config: Config, seed: int = 0) -> Iterator[np.ndarray]:
    """[batch, length + 1] pieces of the text from random places, the same for the same seed."""
    g = np.random.default_rng(seed)
    while True:
        starts = g.integers(0, len(text) - config.length, config.batch)
        yield np.stack([text[s : s + config.length + 1] for s in starts])


def mean_loss(model: nnx.Module, batch: jax.Array) -> jax.Array:
    """Cross entropy of the next character, in nats."""
    logits = model(batch[:, :-1])  # type: ignore[operator]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(mean_loss)(model, batch)
    optimizer.update(model, grads)
    return loss


def train(norms: str, config: Config, steps: int, seed: int = 0) -> tuple[Model, np.ndarray]:
    """(the trained model, the loss of every step)"""
    text, vocabulary = characters()
    model = Model(config, vocabulary, NORMS[norms], nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    stream = batches(text, config, seed)
    losses = [step(model, optimizer, jnp.asarray(next(stream))) for _ in range(steps)]
    return model, np.array([float(loss) for loss in losses])


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    for name, default in (("width", 128), ("layers", 4), ("length", 64), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    if options.width % 4:
        parser.error("--width: expected a multiple of 4, the attention heads")
    if options.steps < 2:
        parser.error("--steps: expected at least 2")
    config = Config(options.width, options.layers, length=options.length, batch=options.batch)
    curves = {}
    for norms in NORMS:
        began = time.perf_counter()
        _, curves[norms] = train(norms, config, options.steps)
        print(f"{norms:8s} {options.steps} steps in {time.perf_counter() - began:.1f} s, compiled in the first")
    print("\nstep " + "".join(f"{norms:>9s}" for norms in NORMS))
    for i in sorted({*range(0, options.steps, max(options.steps // 8, 1)), options.steps - 1}):
        print(f"{i:4d} " + "".join(f"{curve[i]:9.4f}" for curve in curves.values()))
    apart = max(float(np.abs(curve - curves["flax"]).max()) for curve in curves.values())
    print(f"\nloss {curves['fused'][0]:.2f} -> {curves['fused'][-1]:.2f} nats; curves at most {apart:.4f} apart")
    return curves


if __name__ == "__main__":
    main()
