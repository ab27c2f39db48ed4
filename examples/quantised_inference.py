"""A trained language model run with int8 and fp8 products: its norms hand out codes, its matrices are codes, nothing in between.

    python -m examples.quantised_inference [--steps 150] [--width 128]

Trains the small model of ``flax_training``, moves its parameters to a model whose norms are ``AddRMSNorm(quant=...)`` and whose
first matrices (qkv, up) are quantised by output channel, and prints what that costs in loss on the same text and how often the most
likely character stays the same. The scale of a token and that of a channel factor out of the product, as in ``quantized_matmul``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxnorm as jn

from . import flax_training as lm
from .quantized_matmul import fp8_product, int8_product

SPECS = {"int8": jn.QuantSpec("int8"), "fp8": jn.QuantSpec("fp8")}
Product = Callable[[jn.Quantized, jn.Quantized], jax.Array]


def matrix(linear: nnx.Linear, spec: jn.QuantSpec) -> jn.Quantized:
    """Codes [out, in] of a linear layer's kernel, a scale for each output channel."""
    return jn.quantize(linear.kernel[...].T, spec)


def multiply(q: jn.Quantized, w: jn.Quantized, product: Product) -> jax.Array:
    """float32 [..., out] of codes [..., in] with a scale a row."""
    lead = q.values.shape[:-1]
    rows = q.replace(values=q.values.reshape(-1, q.values.shape[-1]), scale=q.scale.reshape(-1, 1))
    return product(rows, w).reshape(*lead, -1)


class QuantisedBlock:
    """A trained block: norms that quantise, products of codes."""

    def __init__(self, block: lm.Block, config: lm.Config, spec: jn.QuantSpec) -> None:
        self.block, self.dtype = block, config.dtype
        self.product: Product = int8_product if spec.dtype == "int8" else fp8_product
        self.norms = {}
        for name in ("attention_norm", "mlp_norm"):
            norm = jn.nnx.AddRMSNorm(config.width, quant=spec, rngs=nnx.Rngs(0))
            norm.scale[...] = getattr(block, name).scale[...]
            self.norms[name] = norm
        self.qkv, self.up = matrix(block.qkv, spec), matrix(block.up, spec)

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, residual = self.norms["attention_norm"](x, residual)
        qkv = multiply(q, self.qkv, self.product).astype(self.dtype)
        x = self.block.out(lm.attend(qkv, self.block.heads))
        q, residual = self.norms["mlp_norm"](x, residual)
        inner = jax.nn.gelu(multiply(q, self.up, self.product)).astype(self.dtype)
        return self.block.down(inner), residual


def quantised(model: lm.Model, config: lm.Config, spec: jn.QuantSpec) -> Callable[[jax.Array], jax.Array]:
    """Tokens [B, T] to logits float32 [B, T, V]."""
    blocks = [QuantisedBlock(block, config, spec) for block in model.blocks]

    def run(tokens: jax.Array) -> jax.Array:
        residual = model.words(tokens)
        x = jnp.broadcast_to(model.places(jnp.arange(tokens.shape[1])), residual.shape)
        for block in blocks:
            x, residual = block(x, residual)
        return model.head(lm.add_norm(model.norm, x, residual)[0].astype(jnp.float32))

    return jax.jit(run)


def evaluate(config: lm.Config, steps: int) -> dict[str, tuple[float, float]]:
    """{what: (loss in nats, share of the positions where the most likely character is the unquantised model's)}"""
    model, _ = lm.train("fused", config, steps)
    batch = next(lm.batches(lm.characters()[0], config, seed=1))
    runs = {"bfloat16": functools.partial(nnx.jit(lambda model, tokens: model(tokens)), model)}
    runs |= {name: quantised(model, config, spec) for name, spec in SPECS.items()}
    found: dict[str, tuple[float, float]] = {}
    likely = None
    for name, run in runs.items():
        logits = run(jnp.asarray(batch[:, :-1]))
        loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean())
        best = np.asarray(logits.argmax(-1))
        likely = best if likely is None else likely
        found[name] = loss, float((best == likely).mean())
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(argv)
    found = evaluate(lm.Config(options.width, options.layers), options.steps)
    print(f"after {options.steps} steps   loss    same most likely character")
    for name, (loss, same) in found.items():
        print(f"{name:16s} {loss:7.4f}    {same:.1%}")
    return found


if __name__ == "__main__":
    main()
