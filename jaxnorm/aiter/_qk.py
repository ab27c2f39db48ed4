"""AITER's fusions of q/k norm, rotary embedding, the KV cache and its quantisation.

Where numbers differ from AITER's on purpose, everywhere in this file: the rotation is float32 whatever the dtype of the table; a
vector of zeros has scale 1.0 in the cache (AITER: 1e-8 / max); int8 caches exist and round, clipped to +-127. "pts" means per
tensor scales, "2way" two streams of tokens. Caches come back changed: donate them, else they are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._api import cache as ops_cache
from .._api import qk as ops
from .._api.quant import quantize
from .._cache import KVCache
from .._compile import target
from .._types import QuantSpec
from ..errors import value_error
from . import _common

_KV_DTYPES = ("auto", "fp8", "fp8_e4m3", "int8")


def fused_qk_norm_rope_cache_quant_shuffle(
    qkv: jax.Array,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    qw: jax.Array,
    kw: jax.Array,
    cos_sin_cache: jax.Array,
    is_neox_style: bool,
    pos_ids: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slot_mapping: jax.Array,
    kv_cache_dtype: str,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """``(qkv, k_cache, v_cache, k_scale, v_scale)``: :func:`jaxnorm.qk_norm_rope_cache`, a scale for each token and head.

    Args:
      qkv:            [T, (Hq + 2 * Hk) * D]; comes back with the q and k parts normed and rotated.
      k_cache:        [B, Hk, D/X, P, X]; v_cache [B, Hk, P/X, D, X], or the same bytes as [B, Hk, D, P].
      kv_cache_dtype: "auto": as it is, k_scale and v_scale pass through; "fp8" or "fp8_e4m3": the target's native e4m3; "int8".
      k_scale, v_scale: float32 [B, Hk, P].
    """
    op = "aiter.fused_qk_norm_rope_cache_quant_shuffle"
    if kv_cache_dtype not in _KV_DTYPES:
        raise value_error(op, "kv_cache_dtype", repr(kv_cache_dtype), " or ".join(map(repr, _KV_DTYPES)))
    width = (num_heads_q + num_heads_k + num_heads_v) * head_dim
    if qkv.ndim != 2 or qkv.shape[1] != width:
        raise value_error(op, "qkv", f"shape {qkv.shape}", f"[T, {width}], the sizes given")
    _common.same(op, num_heads_v=(num_heads_v, num_heads_k), num_heads_k=(num_heads_k, k_cache.shape[1]))
    quant = None if kv_cache_dtype == "auto" else "per_token"
    if quant is not None:
        wanted = "int8" if kv_cache_dtype == "int8" else _native_fp8()
        if k_cache.dtype.name != wanted:
            raise value_error(
                op, "k_cache", f"dtype {k_cache.dtype.name}", f"{wanted} for kv_cache_dtype={kv_cache_dtype!r}"
            )
    scales = (None, None) if quant is None else (k_scale, v_scale)
    cache = KVCache(k_cache, _pieces(op, v_cache), *scales, layout="shuffled", quant=quant)
    q, k, _, cache = ops_cache.qk_norm_rope_cache(
        qkv,
        qw,
        kw,
        pos_ids,
        cos_sin_cache,
        cache,
        slot_mapping,
        num_q_heads=num_heads_q,
        num_kv_heads=num_heads_k,
        eps=eps,
        style=_style(is_neox_style),
        return_kv=True,
    )
    tokens = qkv.shape[0]
    v = qkv[:, (num_heads_q + num_heads_k) * head_dim :]
    out = jnp.concatenate([q.reshape(tokens, -1), k.reshape(tokens, -1), v], axis=1)
    if quant is not None:
        k_scale, v_scale = cache.k_scale, cache.v_scale
    return out, cache.k, cache.v.reshape(v_cache.shape), k_scale, v_scale


def fused_qk_norm_rope_cache_pts_quant_shuffle(
    qkv: jax.Array,
    qw: jax.Array,
    kw: jax.Array,
    cos_sin: jax.Array,
    positions: jax.Array,
    num_tokens: int,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_size: int,
    is_neox_style: bool,
    eps: float,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slot_mapping: jax.Array,
    per_tensor_k_scale: Any,
    per_tensor_v_scale: Any,
    return_kv: bool,
    use_shuffle_layout: bool,
    block_size: int,
    x: int,
    rotary_dim: int = 0,
) -> Any:
    """``(q_out, k_cache, v_cache)``, with return_kv also ``k_out, v_out``: :func:`jaxnorm.qk_norm_rope_cache`, scales per tensor.

    Args:
      qkv:         [T, Hq + Hk + Hv, D].
      k_cache:     of qkv's dtype: not quantised, the scales are ignored. Else int8 or fp8. Layout "shuffled" with
                   use_shuffle_layout, "paged" [B, P, Hk, D] with block_size > 0, else "slots" [S, Hk, D].
      per_tensor_k_scale, per_tensor_v_scale: float32 scalars, what a code is multiplied with.
      num_tokens, head counts, head_size, block_size and x where the layout has them, rotary_dim when not 0: checked.

    ``k_out, v_out`` [T, Hk, D] have the cache's dtype, codes when it is quantised, for every token; AITER fills those with a slot.
    """
    op = "aiter.fused_qk_norm_rope_cache_pts_quant_shuffle"
    heads = (num_heads_q, num_heads_k, num_heads_v)
    turning = {"style": _style(is_neox_style), "eps": eps}
    return _per_tensor(
        op, qkv, qw, kw, cos_sin, positions, num_tokens, heads, head_size, turning, k_cache, v_cache, slot_mapping,
        (per_tensor_k_scale, per_tensor_v_scale), return_kv, use_shuffle_layout, block_size, x, rotary_dim,
    )  # fmt: skip


def fused_qk_norm_mrope_3d_cache_pts_quant_shuffle(
    qkv: jax.Array,
    qw: jax.Array,
    kw: jax.Array,
    cos_sin: jax.Array,
    positions: jax.Array,
    num_tokens: int,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_size: int,
    is_neox_style: bool,
    mrope_section_: Sequence[int],
    is_interleaved: bool,
    eps: float,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slot_mapping: jax.Array,
    per_tensor_k_scale: Any,
    per_tensor_v_scale: Any,
    return_kv: bool,
    use_shuffle_layout: bool,
    block_size: int,
    x: int,
    rotary_dim: int = 0,
) -> Any:
    """As :func:`fused_qk_norm_rope_cache_pts_quant_shuffle` with positions [3, T] (time, height, width) and
    ``mrope_section_`` of the rotary pairs; ``is_interleaved`` deals the components out in turns, see :func:`jaxnorm.mrope`."""
    op = "aiter.fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"
    heads = (num_heads_q, num_heads_k, num_heads_v)
    turning = {"style": _style(is_neox_style), "eps": eps, "mrope_sections": tuple(mrope_section_)}
    turning["mrope_interleaved"] = bool(is_interleaved)
    return _per_tensor(
        op, qkv, qw, kw, cos_sin, positions, num_tokens, heads, head_size, turning, k_cache, v_cache, slot_mapping,
        (per_tensor_k_scale, per_tensor_v_scale), return_kv, use_shuffle_layout, block_size, x, rotary_dim,
    )  # fmt: skip


def fused_qk_norm_rope_2way(
    q0: jax.Array,
    k0: jax.Array,
    q1: jax.Array,
    k1: jax.Array,
    w_q0: jax.Array,
    w_k0: jax.Array,
    w_q1: jax.Array,
    w_k1: jax.Array,
    cos_sin0: jax.Array,
    cos_sin1: jax.Array,
    batch_size: int,
    num_tokens0: int,
    num_tokens1: int,
    num_heads_q: int,
    num_heads_k: int,
    head_size: int,
    is_interleaved: bool,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """``(out_q01, out_k01)`` [B, T0 + T1, H, D]: :func:`jaxnorm.qk_norm_rope_two_stream`.

    ``is_interleaved=True`` is style "gptj". The sizes are checked against q0 [B, T0, Hq, D], k0 [B, T0, Hk, D], q1 and k1.
    """
    op = "aiter.fused_qk_norm_rope_2way"
    for name, array in (("q0", q0), ("k0", k0), ("q1", q1), ("k1", k1)):
        if array.ndim != 4:
            raise value_error(op, name, f"shape {array.shape}", "[B, T, H, D]")
    batch, tokens0, heads, size = q0.shape
    _common.same(
        op,
        batch_size=(batch_size, batch),
        num_tokens0=(num_tokens0, tokens0),
        num_tokens1=(num_tokens1, q1.shape[1]),
        num_heads_q=(num_heads_q, heads),
        num_heads_k=(num_heads_k, k0.shape[2]),
        head_size=(head_size, size),
    )
    weights = (w_q0, w_k0, w_q1, w_k1)
    style = _style(not is_interleaved)
    return ops.qk_norm_rope_two_stream(q0, k0, q1, k1, *weights, cos_sin0, cos_sin1, eps=eps, style=style)


def _style(is_neox: Any) -> str:
    return "neox" if is_neox else "gptj"


def _native_fp8() -> str:
    (flavour,) = {target.native_fp8(t) for t in target.in_force(target.named())}
    return flavour


def _pieces(op: str, v_cache: jax.Array) -> jax.Array:
    """[B, Hk, D, P] as the [B, Hk, P/X, D, X] that its bytes are."""
    if v_cache.ndim != 4:
        return v_cache
    b, h, d, p = v_cache.shape
    x = 16 // v_cache.dtype.itemsize
    if p % x:
        raise value_error(op, "v_cache", f"shape {v_cache.shape}", f"[B, Hk, D, P] with P a multiple of {x}")
    return v_cache.reshape(b, h, p // x, d, x)


def _per_tensor(
    op: str, qkv: Any, qw: Any, kw: Any, cos_sin: Any, positions: Any, num_tokens: Any, heads: tuple[int, int, int],
    head_size: Any, turning: dict[str, Any], k_cache: Any, v_cache: Any, slots: Any, scales: tuple[Any, Any], return_kv: Any,
    use_shuffle_layout: Any, block_size: Any, x: Any, rotary_dim: Any,
) -> Any:  # fmt: skip
    hq, hk, hv = heads
    if qkv.ndim != 3:
        raise value_error(op, "qkv", f"shape {qkv.shape}", "[T, Hq + Hk + Hv, D]")
    tokens, total, size = qkv.shape
    _common.same(op, num_tokens=(num_tokens, tokens), num_heads_v=(hv, hk), head_size=(head_size, size))
    if hq + hk + hv != total:
        raise value_error(op, "qkv", f"{total} heads", f"{hq + hk + hv}, the heads given")
    if rotary_dim:
        _common.same(op, rotary_dim=(rotary_dim, cos_sin.shape[-1]))
    layout = "shuffled" if use_shuffle_layout else "paged" if block_size > 0 else "slots"
    if layout == "shuffled":
        _common.same(op, block_size=(block_size, k_cache.shape[3]), x=(x, k_cache.shape[4]))
    elif layout == "paged":
        _common.same(op, block_size=(block_size, k_cache.shape[1]))
    quant = None if k_cache.dtype == qkv.dtype else "per_tensor"
    kept = scales if quant else (None, None)
    pieces = _pieces(op, v_cache) if layout == "shuffled" else v_cache
    cache = KVCache(k_cache, pieces, *kept, layout=layout, quant=quant)
    parts = (qkv[:, :hq], qkv[:, hq : hq + hk], qkv[:, hq + hk :])
    q, *kv, cache = ops_cache.qk_norm_rope_cache(
        parts, qw, kw, positions, cos_sin, cache, slots,
        num_q_heads=hq, num_kv_heads=hk, return_kv=bool(return_kv), **turning,
    )  # fmt: skip
    out = (q, cache.k, cache.v.reshape(v_cache.shape))
    if quant is None:
        return (*out, *kv)
    spec = QuantSpec(k_cache.dtype)
    return (*out, *(quantize(a, spec, static_scale=s).values for a, s in zip(kv, kept, strict=False)))
