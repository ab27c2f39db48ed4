"""BERT's encoder as pure functions of a parameter pytree; every LayerNorm is a jaxnorm call.

Post-norm blocks: with h the output of the block before,

    h = add_layernorm(attention(h), h, x_bias=the bias of the output projection)
    h = add_layernorm(mlp(h), h, x_bias=the bias of the second matrix)

so the bias of a projection, the residual add and the norm are one kernel. The embedding is one, too: words + positions + the type
that every token of a single sentence has. One ``lax.scan`` runs the layers: the program holds one, and compiles six times less.

Sizes in shapes: L layers, B sentences, T tokens, H heads, D head_dim, N model width, F MLP width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

from .weights import ModelError


@dataclasses.dataclass(frozen=True)
class Config:
    """What the shapes and the arithmetic depend on; hashable, so a static argument of jit."""

    layers: int
    heads: int
    width: int
    eps: float

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Config:
        activation = settings["hidden_act"]
        if activation != "gelu":
            raise ModelError(f"minilm: hidden_act: got {activation!r}, expected 'gelu'")
        sizes = (settings[k] for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        return cls(*sizes, eps=settings["layer_norm_eps"])


class Linear(NamedTuple):
    kernel: jax.Array
    """[in, out]"""
    bias: jax.Array


class Norm(NamedTuple):
    scale: jax.Array
    bias: jax.Array


class Layer(NamedTuple):
    """One encoder layer; stacked, each leaf has L in front."""

    query: Linear
    key: Linear
    value: Linear
    attention_out: Linear
    attention_norm: Norm
    mlp_in: Linear
    mlp_out: Linear
    mlp_norm: Norm


class Params(NamedTuple):
    words: jax.Array
    positions: jax.Array
    kind: jax.Array
    """[N]: the embedding of type 0, that of a first sentence."""
    embedding_norm: Norm
    layers: Layer


_LINEAR = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def load(tensors: dict[str, np.ndarray], config: Config, dtype: Any = jnp.float32) -> Params:
    """Parameters from the tensors of a checkpoint; matrices in ``dtype``, what a norm reads in the checkpoint's own."""

    def get(name: str) -> np.ndarray:
        if name not in tensors:
            raise ModelError(f"minilm: the checkpoint has no tensor {name}, expected those of Hugging Face's BertModel")
        return tensors[name]

    def norm(name: str) -> Norm:
        return Norm(jnp.asarray(get(f"{name}.weight")), jnp.asarray(get(f"{name}.bias")))

    def linear(name: str) -> Linear:
        return Linear(jnp.asarray(get(f"{name}.weight").T, dtype), jnp.asarray(get(f"{name}.bias"), dtype))

    def layer(i: int) -> Layer:
        at = f"encoder.layer.{i}."
        parts = {k: linear(at + name) for k, name in _LINEAR.items()} | {
            k: norm(at + name) for k, name in _NORMS.items()
        }
        return Layer(**parts)

    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer(i) for i in range(config.layers)))
    embeddings = [get(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")]
    words, positions, kinds = (jnp.asarray(e, dtype) for e in embeddings)
    return Params(words, positions, kinds[0], norm("embeddings.LayerNorm"), layers)


def _project(x: jax.Array, linear: Linear, bias: bool = True) -> jax.Array:
    y = jnp.matmul(x, linear.kernel, precision="highest" if x.dtype == jnp.float32 else None)
    return y + linear.bias if bias else y


def _attention(layer: Layer, h: jax.Array, mask: jax.Array, heads: int) -> jax.Array:
    """The attention's context [B, T, N] before the output projection; mask [B, T], True for real tokens."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q, k, v = (split(_project(h, m)) for m in (layer.query, layer.key, layer.value))
    precision = "highest" if h.dtype == jnp.float32 else None
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, :], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(h.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision).reshape(h.shape)


def encode(params: Params, config: Config, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Hidden states [B, T, N] of tokens [B, T]; mask [B, T] is True for real tokens, at least one a sentence."""
    words = params.words[tokens]
    places = jnp.broadcast_to(params.positions[: tokens.shape[1]], words.shape)
    h, _ = jaxnorm.add_layernorm(words, places, *params.embedding_norm, x_bias=params.kind, eps=config.eps)

    def step(h: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        out = _project(_attention(layer, h, mask, config.heads), layer.attention_out, bias=False)
        h, _ = jaxnorm.add_layernorm(out, h, *layer.attention_norm, x_bias=layer.attention_out.bias, eps=config.eps)
        inner = jax.nn.gelu(_project(h, layer.mlp_in), approximate=False)
        out = _project(inner, layer.mlp_out, bias=False)
        h, _ = jaxnorm.add_layernorm(out, h, *layer.mlp_norm, x_bias=layer.mlp_out.bias, eps=config.eps)
        return h, None

    return jax.lax.scan(step, h, params.layers)[0]


def sentence_vectors(params: Params, config: Config, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit vectors float32 [B, N]: the mean of a sentence's hidden states, over its real tokens."""
    hidden = encode(params, config, tokens, mask).astype(jnp.float32)
    mean = jnp.sum(hidden * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)
