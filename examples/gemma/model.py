"""Gemma 3 (text) as pure functions of a parameter pytree; every norm, rotation and write of the KV cache is a jaxnorm call.

With r the residual stream, which starts as the scaled embedding, and h = rmsnorm(r, attn_norm of block 0), a block is

    x    = rmsnorm(attention(h), post_attn_norm)     q, k and the cache: qk_norm_rope_cache
    h, r = add_rmsnorm(x, r, ffn_norm)
    x    = rmsnorm(mlp(h), post_ffn_norm)
    h, r = add_rmsnorm(x, r, next_norm)              the next block's attn_norm; the final norm after the last block

so every residual add sits in the norm that follows it. One `lax.scan` runs the blocks: the program holds one block, and
compiles 18 times less. GGUF's norm weights already contain Gemma's +1: weight_offset stays 0. With quantised weights (see
`projections`) the norms whose result is called h are rmsnorm_quant and add_rmsnorm_quant, and h is int8 or fp8 codes.

One KVCache holds all blocks and sequences: token p of sequence b in block l is slot (l * B + b) * S + p. So the loop over the
blocks carries it as it is, and each block writes its own slots in place.

Sizes in shapes: L layers, B batch, T new tokens, S slots of a sequence, E model width, H query heads, K key/value heads,
D head_dim, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm import KVCache

from .errors import damaged
from .projections import Input, add_norm, input_spec, leading, linear, norm

if TYPE_CHECKING:
    from .gguf_file import GGUFFile


@dataclasses.dataclass(frozen=True)
class Config:
    """What the shapes and the arithmetic depend on; hashable, so a static argument of jit."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    window: int
    eps: float = 1e-6
    rope_base_global: float = 1_000_000.0
    rope_base_local: float = 10_000.0
    global_every: int = 6

    def is_global(self, layer: jax.Array) -> jax.Array:
        """Whether `layer` sees all earlier tokens; the others see the last `window` ones."""
        return (layer + 1) % self.global_every == 0

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Config:
        architecture = file["general.architecture"]
        if architecture != "gemma3":
            raise damaged(file.path, f"its architecture is {architecture!r}, expected 'gemma3'")
        key = "gemma3."
        return cls(
            vocab=len(file["tokenizer.ggml.tokens"]),
            width=file[f"{key}embedding_length"],
            layers=file[f"{key}block_count"],
            heads=file[f"{key}attention.head_count"],
            kv_heads=file[f"{key}attention.head_count_kv"],
            head_dim=file[f"{key}attention.key_length"],
            mlp_width=file[f"{key}feed_forward_length"],
            context=file[f"{key}context_length"],
            window=file[f"{key}attention.sliding_window"],
            eps=float(np.float32(file[f"{key}attention.layer_norm_rms_epsilon"])),
            rope_base_global=file[f"{key}rope.freq_base"],
        )


class Layer(NamedTuple):
    """The blocks, stacked: each leaf is [L, ...]. Matrices are [L, out, in]; norm weights float32."""

    q: Input
    k: Input
    v: Input
    q_norm: jax.Array
    k_norm: jax.Array
    out: jax.Array
    post_attn_norm: jax.Array
    ffn_norm: jax.Array
    gate: Input
    up: Input
    down: jax.Array
    post_ffn_norm: jax.Array
    next_norm: jax.Array


class Params(NamedTuple):
    """Matrices in the activations' dtype or quantised, norm weights in float32 whatever that is."""

    embedding: jax.Array
    first_norm: jax.Array
    layers: Layer


def layer_shapes(config: Config) -> Layer:
    """The shape of every weight of one block."""
    E, F, D = config.width, config.mlp_width, config.head_dim
    Q, KV = config.heads * D, config.kv_heads * D
    return Layer((Q, E), (KV, E), (KV, E), (D,), (D,), (E, Q), (E,), (E,), (F, E), (F, E), (E, F), (E,), (E,))


GGUF_NAMES = Layer(
    "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output", "post_attention_norm",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm", "attn_norm",
)  # fmt: skip


def gguf_names(config: Config) -> dict[str, list[str]]:
    """The GGUF tensors behind every field of `Layer`, in layer order."""
    names = {
        field: [f"blk.{index}.{name}.weight" for index in range(config.layers)]
        for field, name in zip(Layer._fields, GGUF_NAMES, strict=True)
    }
    names["next_norm"] = names["next_norm"][1:] + ["output_norm.weight"]
    return names


def elements(config: Config) -> int:
    """How many weights `load` reads."""
    block = sum(int(np.prod(shape)) for shape in layer_shapes(config))
    return config.vocab * config.width + config.width + config.layers * block


def load(
    file: GGUFFile, config: Config, dtype: jnp.dtype, progress: Callable[[int], None] = lambda elements: None
) -> Params:
    """Parameters from a GGUF file; `progress` is told how many weights each step has read."""

    def cast(array: np.ndarray, ndim: int) -> jax.Array:
        return jnp.asarray(array, jnp.float32 if ndim == 1 else dtype)

    with file.reading(progress) as read:
        embedding = cast(read("token_embd.weight", (config.vocab, config.width)), 2)
        first_norm = cast(read("blk.0.attn_norm.weight", (config.width,)), 1)
        layers = Layer(
            *(
                cast(np.stack([read(name, shape) for name in names]), len(shape))
                for names, shape in zip(gguf_names(config).values(), layer_shapes(config), strict=True)
            )
        )
    return Params(embedding, first_norm, layers)


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The matrices in `dtype`; norm weights stay in float32."""
    layers = {
        name: leaf if name.endswith("norm") else leaf.astype(dtype) for name, leaf in params.layers._asdict().items()
    }
    return Params(params.embedding.astype(dtype), params.first_norm, Layer(**layers))


KV_CACHES = {
    "float32": ("float32", None),
    "bf16": ("bfloat16", None),
    "fp8": ("fp8", "per_token"),
    "int8": ("int8", "per_token"),
}
"""Kinds of cache: dtype and quantisation."""
PAGE = 16


def init_cache(config: Config, batch: int, slots: int, kind: str) -> KVCache:
    """An empty cache of a kind for `slots` tokens, a multiple of PAGE, of each sequence."""
    dtype, quant = KV_CACHES[kind]
    pages = config.layers * batch * slots // PAGE
    return KVCache.create(pages, PAGE, config.kv_heads, config.head_dim, dtype=dtype, quant=quant, layout="paged")


def rope_tables(config: Config, positions: int) -> jax.Array:
    """[2 * positions, D]: the table of the local blocks, then that of the global ones."""
    bases = (config.rope_base_local, config.rope_base_global)
    return jnp.concatenate([jaxnorm.rope_table(positions, config.head_dim, base=base) for base in bases])


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention, scores and softmax in float32.

    q [B, T, H, D]; keys, values [B, S, K, D], each shared by H/K query heads; mask [T, S], True = visible.
    """
    batch, tokens, heads, head_dim = q.shape
    q = q.reshape(batch, tokens, keys.shape[2], -1, head_dim)
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgd,bskd->bkgts", q, keys, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, values, precision=precision).reshape(
        batch, tokens, heads * head_dim
    )


def attention(
    config: Config, index: jax.Array, layer: Layer, h: Input, table: jax.Array, cache: KVCache | None, start: jax.Array
) -> tuple[jax.Array, KVCache | None]:
    """Attention of block `index` for h [B, T, E], the tokens at start, start + 1, ...

    The new keys and values are in the cache before the scores are taken, so that these read the cache alone. Without one they see
    the T tokens as they are.
    """
    batch, tokens = leading(h)
    dtype = layer.out.dtype
    positions = start + jnp.arange(tokens)
    is_global = config.is_global(index)
    row = positions + jnp.where(is_global, table.shape[0] // 2, 0)
    qkv = tuple(linear(h, w, dtype).reshape(batch, tokens, -1, config.head_dim) for w in (layer.q, layer.k, layer.v))
    if cache is None:
        q, keys = jaxnorm.qk_norm_rope(*qkv[:2], layer.q_norm, layer.k_norm, row, table, eps=config.eps)
        values, seen = qkv[2], positions
    else:
        each = cache.k.shape[0] * cache.page_size // (config.layers * batch)
        first = (index * batch + jnp.arange(batch)) * each
        flat = tuple(x.reshape(batch * tokens, -1, config.head_dim) for x in qkv)
        q, cache = jaxnorm.qk_norm_rope_cache(
            flat, layer.q_norm, layer.k_norm, jnp.tile(row, batch), table, cache, (first[:, None] + positions).reshape(-1),
            num_q_heads=config.heads, num_kv_heads=config.kv_heads, eps=config.eps,
        )  # fmt: skip
        q = q.reshape(qkv[0].shape)
        seen = jnp.arange(each)
        keys, values = (x.astype(dtype) for x in cache.gather(first[:, None] + seen))
    distance = positions[:, None] - seen
    mask = (distance >= 0) & (is_global | (distance < config.window))
    return linear(attend(q, keys, values, mask), layer.out, dtype), cache


def mlp(layer: Layer, h: Input, dtype: jnp.dtype) -> jax.Array:
    gate = jax.nn.gelu(linear(h, layer.gate, dtype), approximate=True)
    return linear(gate * linear(h, layer.up, dtype), layer.down, dtype)


def forward(
    params: Params, config: Config, tokens: jax.Array, table: jax.Array, cache: KVCache | None, start: jax.Array
) -> tuple[jax.Array, KVCache | None]:
    """Runs tokens [B, T], which stand at positions start, start + 1, ...; prefill and decode alike.

    Args:
      table: `rope_tables` for as many positions as there are.
      cache: None for a text that goes through in one call.

    Returns:
      hidden [B, T, E] after the final norm, and the cache with these tokens written into it.
    """
    residual = params.embedding[tokens]
    residual = residual * jnp.asarray(config.width**0.5, residual.dtype)
    spec = input_spec(params)

    def block(carry: tuple[Input, jax.Array, KVCache | None], item: tuple[jax.Array, Layer]) -> tuple[Any, None]:
        h, residual, cache = carry
        index, layer = item
        attended, cache = attention(config, index, layer, h, table, cache, start)
        x = jaxnorm.rmsnorm(attended, layer.post_attn_norm, eps=config.eps)
        h, residual = add_norm(x, residual, layer.ffn_norm, spec, config.eps)
        x = jaxnorm.rmsnorm(mlp(layer, h, residual.dtype), layer.post_ffn_norm, eps=config.eps)
        h, residual = add_norm(x, residual, layer.next_norm, spec, config.eps)
        return (h, residual, cache), None

    h = norm(residual, params.first_norm, spec, config.eps)
    (h, residual, cache), _ = jax.lax.scan(block, (h, residual, cache), (jnp.arange(config.layers), params.layers))
    if spec is not None:  # The head is not quantised: the final norm once more, without codes.
        h = jaxnorm.rmsnorm(residual, params.layers.next_norm[-1], eps=config.eps)
    return h, cache


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., E] times the embedding (the head is tied) -> float32 [..., V]."""
    return jnp.einsum(
        "...e,ve->...v",
        hidden,
        params.embedding,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
