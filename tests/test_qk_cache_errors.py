"""Messages of ``qk_norm_rope_cache`` and ``KVCache``: what was wrong, with which argument, and what to do."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases_cache import Case

import jaxnorm
from jaxnorm import KVCache

CASE = Case(tokens=4, skip=0)
A = CASE.arrays()
B, P, HK, D = 3, 16, 2, 32
SHUFFLED = np.zeros((B, HK, 4, P, 8), np.float16), np.zeros((B, HK, 2, D, 8), np.float16)
PAGED = np.zeros((B, P, HK, D), np.float16)


def run(**changes):
    keywords = {"num_q_heads": 4, "num_kv_heads": 2} | changes
    arguments = [
        tuple(A[n] for n in "qkv"),
        A["q_weight"],
        A["k_weight"],
        A["positions"],
        A["cos_sin"],
        None,
        A["slots"],
    ]
    names = ("qkv", "q_weight", "k_weight", "positions", "cos_sin", "cache", "slots")
    for i, name in enumerate(names):
        if name in keywords:
            arguments[i] = keywords.pop(name)
    arguments[5] = CASE.cache(A) if arguments[5] is None else arguments[5]
    return jaxnorm.qk_norm_rope_cache(*arguments, **keywords)


def quantised(quant="per_token", dtype="int8"):
    return KVCache.create(B, P, HK, D, dtype=dtype, quant=quant)


MESSAGES = [
    (lambda: run(cache=A["q"]), TypeError, "qk_norm_rope_cache: cache: got ndarray, expected a KVCache"),
    (
        lambda: run(qkv=A["q"]),
        ValueError,
        "qk_norm_rope_cache: qkv: got shape (4, 4, 32), expected [T, 256]: 4 q heads and twice 2",
    ),
    (lambda: run(qkv=(A["q"], A["k"])), ValueError, "qkv: got a tuple of 2, expected an array or a tuple (q, k, v)"),
    (
        lambda: run(qkv=(A["q"], A["q"], A["v"])),
        ValueError,
        "qkv[1]: got shape (4, 4, 32), expected [T, 2, 32] or [T, 64]",
    ),
    (lambda: run(qkv=(A["q"], A["k"][:3], A["v"])), ValueError, "qkv[1]: got 3 tokens, expected 4 tokens as qkv[0]"),
    (lambda: run(qkv=tuple(A[n].astype(int) for n in "qkv")), TypeError, "qkv[0]: got dtype int"),
    (lambda: run(num_kv_heads=4), ValueError, "cache: got 2 kv heads in layout 'shuffled'"),
    (lambda: run(num_q_heads=0), ValueError, "num_q_heads: got 0, expected a positive integer"),
    (lambda: run(num_q_heads=2.0), TypeError, "num_q_heads: got float, expected a positive integer"),
    (lambda: run(slots=A["slots"][:3]), ValueError, "slots: got shape (3,), expected (4,), one for each token"),
    (
        lambda: run(slots=[0, 1, 2, 48]),
        ValueError,
        "slots: got 48, expected at most 47: the cache has 3 pages of 16 slots",
    ),
    (lambda: run(slots=[0.0, 1, 2, 3]), TypeError, "slots: got dtype float64, expected int32 or int64"),
    (lambda: run(slots=jnp.zeros(4, jnp.uint32)), TypeError, "slots: got dtype uint32, expected int32 or int64"),
    (lambda: run(positions=[0, 1, 2, 40]), ValueError, "positions: got 40, expected 0 to 39"),
    (lambda: run(positions=np.zeros((3, 4), int)), ValueError, "positions: got shape (3, 4), expected (4,)"),
    (lambda: run(mrope_sections=(4, 4, 4)), ValueError, "mrope_sections: got (4, 4, 4)"),
    (lambda: run(cos_sin=np.zeros((9, 34), np.float32)), ValueError, "cos_sin: got rotary_dim 34"),
    (lambda: run(q_weight=A["q_weight"][:8]), ValueError, "q_weight: got shape (8,), expected (32,)"),
    (lambda: run(k_weight=None, weight_offset=1.0), ValueError, "weight_offset: got 1.0"),
    (lambda: run(style="llama"), ValueError, "style: got 'llama', expected 'neox' or 'gptj'"),
    (lambda: run(return_kv=1), TypeError, "return_kv: got int, expected a bool"),
    (lambda: run(eps=-1.0), ValueError, "eps: got -1.0"),
    (
        lambda: run(k_scale=1.0),
        ValueError,
        "k_scale: got a scale for a cache with quant=None, expected None unless quant='per_tensor'",
    ),
    (
        lambda: run(v_scale=1.0, cache=quantised()),
        ValueError,
        "v_scale: got a scale for a cache with quant='per_token'",
    ),
    (
        lambda: run(k_scale=np.ones(2, np.float32), cache=quantised("per_tensor")),
        ValueError,
        "k_scale: got shape (2,), expected a scalar",
    ),
    (lambda: run(k_scale="1", cache=quantised("per_tensor")), TypeError, "k_scale: got str, expected a float32 scalar"),
    (lambda: run(backend="hip"), jaxnorm.UnsupportedError, "qk_norm_rope_cache: backend='hip' is not usable"),
    (lambda: CASE.cache(A).gather([48]), ValueError, "KVCache.gather: slots: got 48, expected at most 47"),
    (lambda: CASE.cache(A).gather(jnp.zeros(3)), TypeError, "KVCache.gather: slots: got dtype float32"),
    (
        lambda: KVCache.create(1, 20, 1, 32, dtype="bfloat16"),
        ValueError,
        "KVCache.create: page_size: got 20, expected a multiple of 8, 16 bytes of bfloat16, for layout='shuffled'",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 24, dtype="int8", quant="per_token"),
        ValueError,
        "head_dim: got 24, expected a multiple of 16",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 32, dtype="int8"),
        ValueError,
        "quant: got None with dtype int8, expected 'per_token' or",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 32, dtype="float16", quant="per_token"),
        ValueError,
        "quant: got 'per_token' with dtype float16",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 32, dtype="int4"),
        ValueError,
        "dtype: got int4, expected 'fp8', 'int8', or a dtype among",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 32, dtype="float16", quant="row"),
        ValueError,
        "quant: got 'row', expected None or 'per_token'",
    ),
    (
        lambda: KVCache.create(1, 16, 1, 32, dtype="float16", layout="flat"),
        ValueError,
        "layout: got 'flat', expected 'shuffled' or",
    ),
    (
        lambda: KVCache.create(0, 16, 1, 32, dtype="float16"),
        ValueError,
        "num_pages: got 0, expected a positive integer",
    ),
    (
        lambda: KVCache(PAGED, PAGED.copy(), layout="shuffled"),
        ValueError,
        "KVCache: k: got shape (3, 16, 2, 32) of float16, expected [B, Hk, D/8, P, 8] for layout='shuffled' and float16",
    ),
    (lambda: KVCache(*SHUFFLED, layout="paged"), ValueError, "expected [B, P, Hk, D] for layout='paged'"),
    (lambda: KVCache(PAGED, PAGED.copy(), page_size=8, layout="paged"), ValueError, "with P = page_size=8"),
    (
        lambda: KVCache(SHUFFLED[0], np.zeros((B, HK, D, P), np.float16)),
        ValueError,
        "v as [B, Hk, D, P] has the same bytes: reshape it",
    ),
    (
        lambda: KVCache(np.zeros((B, 2, P, HK, D), np.float16), PAGED, layout="paged"),
        ValueError,
        "must be split first: pool[:, 0]",
    ),
    (
        lambda: KVCache(np.zeros((B, HK, P, 2 * D), np.float16), PAGED, layout="paged"),
        ValueError,
        "pool[..., :D] and pool[..., D:]",
    ),
    (
        lambda: KVCache(jnp.asarray(PAGED), None, layout="paged"),
        TypeError,
        "KVCache: v: got NoneType, expected an array. A pool that",
    ),
    (
        lambda: KVCache(PAGED, PAGED[:2], layout="paged"),
        ValueError,
        "v: got shape (2, 16, 2, 32) of float16, expected [B, P, Hk, D] = (3",
    ),
    (
        lambda: KVCache(PAGED, PAGED.astype(np.float32), layout="paged"),
        ValueError,
        "v: got shape (3, 16, 2, 32) of float32",
    ),
    (
        lambda: KVCache(PAGED, PAGED.copy(), np.ones((3, 16, 2)), layout="paged"),
        ValueError,
        "k_scale: got shape (3, 16, 2), expected None",
    ),
    (lambda: quantised().replace(k_scale=None), ValueError, "k_scale: got None, expected float32 (3, 2, 16)"),
    (
        lambda: quantised().replace(v_scale=jnp.ones((3, 16, 2))),
        ValueError,
        "v_scale: got float32 (3, 16, 2), expected float32 (3, 2, 16)",
    ),
    (
        lambda: KVCache(jnp.zeros((40, HK, D)), jnp.zeros((40, HK, D)), page_size=16, layout="slots"),
        ValueError,
        "[B * P, Hk, D] with P",
    ),
]


@pytest.mark.parametrize("i", range(len(MESSAGES)), ids=lambda i: re.sub(r"\W+", "_", MESSAGES[i][2])[:40])
def test_message(i):
    call, kind, text = MESSAGES[i]
    with pytest.raises(kind, match=re.escape(text)) as raised:
        call()
    assert str(raised.value).endswith((".", "]", "more."))


def test_one_array_for_both():
    pool = jnp.asarray(PAGED)
    with pytest.raises(ValueError, match="v: got the array that is k"):
        KVCache(pool, pool, layout="paged")


def test_a_cache_out_of_shape_is_noticed_by_the_op():
    """A pytree holds whatever a transformation left in it: the op looks."""
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), CASE.cache(A))
    with pytest.raises(ValueError, match=r"cache\.k: got shape \(2, 3, 2, 4, 16, 8\)"):
        run(cache=stacked)
