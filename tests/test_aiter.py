"""jaxnorm.aiter: argument order and results of every name, options, redundant sizes; each against jaxnorm's own function or a
formula written here. The numbers of jaxnorm's functions have tests of their own."""

from __future__ import annotations

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle_quant as oq
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import aiter

# AITER's signatures without output buffers; after ";" keywords of jaxnorm's.
UMS = "use_model_sensitive_rmsnorm"
LN = "weight bias epsilon x_bias"
QK = "num_tokens num_heads_q num_heads_k num_heads_v head_size is_neox_style"
PTS = "k_cache v_cache slot_mapping per_tensor_k_scale per_tensor_v_scale return_kv use_shuffle_layout block_size x rotary_dim"
SIGNATURES = {
    "rmsnorm2d_fwd": f"input weight epsilon {UMS}",
    "rms_norm": f"input weight epsilon {UMS}",
    "rmsnorm": "input weight epsilon",
    "rmsnorm2d_fwd_with_add": f"input residual_in weight epsilon {UMS}",
    "add_rmsnorm": "input residual_in weight epsilon",
    "rmsnorm2d_fwd_with_smoothquant": f"input xscale weight epsilon {UMS}; out_dtype",
    "rmsnorm2d_fwd_with_dynamicquant": f"input weight epsilon {UMS} group_size shuffle_scale; "
    "scale_ub clamp_out dump_rms_norm out_dtype scale_dtype",
    "rmsnorm2d_fwd_with_add_smoothquant": f"input residual_in xscale weight epsilon {UMS}; out_before_quant out_dtype",
    "rmsnorm2d_fwd_with_add_dynamicquant": f"input residual_in weight epsilon {UMS} group_size shuffle_scale; "
    "out_dtype scale_dtype",
    "rmsnorm_quant": "input weight epsilon group_size shuffle_scale; out_dtype scale_dtype",
    "add_rmsnorm_quant": "input residual_in weight epsilon group_size shuffle_scale; out_dtype scale_dtype",
    "layer_norm": f"input {LN}",
    "layernorm2d_fwd": f"input {LN}",
    "layernorm2d_fwd_with_add": f"input residual_in {LN}",
    "layernorm2d_with_add_asm": f"input residual_in {LN}",
    "layernorm2d_fwd_with_smoothquant": f"input xscale {LN}; out_dtype",
    "layernorm2d_fwd_with_dynamicquant": f"input {LN}; out_dtype",
    "layernorm2d_fwd_with_add_smoothquant": f"input residual_in xscale {LN}; out_dtype",
    "layernorm2d_with_add_smoothquant_asm": f"input residual_in xscale {LN}; out_dtype",
    "layernorm2d_fwd_with_add_dynamicquant": f"input residual_in {LN}; out_dtype",
    "GroupNorm": "num_groups num_channels eps affine device dtype",
    "_groupnorm_run": "input num_groups weight bias eps",
    "fused_add_rmsnorm_pad": "x weight epsilon res x_pad_to_multiple",
    "fused_qk_norm_rope_cache_quant_shuffle": "qkv num_heads_q num_heads_k num_heads_v head_dim eps qw kw cos_sin_cache "
    "is_neox_style pos_ids k_cache v_cache slot_mapping kv_cache_dtype k_scale v_scale",
    "fused_qk_norm_rope_cache_pts_quant_shuffle": f"qkv qw kw cos_sin positions {QK} eps {PTS}",
    "fused_qk_norm_mrope_3d_cache_pts_quant_shuffle": f"qkv qw kw cos_sin positions {QK} mrope_section_ is_interleaved eps {PTS}",
    "fused_qk_norm_rope_2way": "q0 k0 q1 k1 w_q0 w_k0 w_q1 w_k1 cos_sin0 cos_sin1 batch_size num_tokens0 num_tokens1 num_heads_q "
    "num_heads_k head_size is_interleaved eps",
    "reduce_scatter_rmsnorm_quant_all_gather": "input_tensor gamma epsilon ctx quant_mode do_allgather",
}  # fmt: skip
RMS_NAMES = [n for n in SIGNATURES if "rms" in n and not n.startswith(("reduce", "fused_qk"))]


@functools.cache
def data(n=96):
    g = cases.rng(4)
    x, residual = (jnp.asarray(cases.normal(g, (3, 5, n), d, std=1.5)) for d in ("bfloat16", "float32"))
    weight, bias, x_bias, xscale = (
        jnp.asarray(cases.normal(g, (n,), d)) for d in ("float32", "bfloat16", "float32", "float32")
    )
    return x, residual, weight + 1, bias, x_bias, jnp.abs(xscale) + 0.5


def same(got, want):
    """Equal bits, results in order; a Quantized counts as its values and scale."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def codes_first(out):
    """(Quantized, residual_out[, y]) in AITER's order: codes, residual_out, scale[, y]."""
    q, residual_out, *y = out
    return q.values, residual_out, q.scale, *y


def test_all_names_and_their_arguments():
    assert set(SIGNATURES) == set(aiter.__all__)
    for name, words in SIGNATURES.items():
        parameters = inspect.signature(getattr(aiter, name)).parameters.values()
        positional, _, keywords = words.partition(";")
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional.split(), name
        extra = {"gemma_norm"} if name in RMS_NAMES else set()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(keywords.split()) | extra, name
        assert len(inspect.getdoc(getattr(aiter, name))) > 25, name


@pytest.mark.parametrize("gemma", [False, True])
def test_rmsnorm_names(gemma):
    x, residual, w, *_ = data()
    own = {"eps": 1e-5, "weight_offset": float(gemma)}
    g = {"gemma_norm": gemma}
    for name in ("rmsnorm2d_fwd", "rms_norm", "rmsnorm"):
        same(getattr(aiter, name)(x, w, 1e-5, **g), jn.rmsnorm(x, w, **own))
    for name in ("rmsnorm2d_fwd_with_add", "add_rmsnorm"):
        same(getattr(aiter, name)(x, residual, w, 1e-5, **g), jn.add_rmsnorm(x, residual, w, **own))
    for name in ("rmsnorm2d_fwd", "rms_norm"):
        same(getattr(aiter, name)(x, w, 1e-5, 1, **g), jn.rmsnorm(x, w, cast="before_weight", **own))
    sensitive = {"cast": "before_weight", "residual_rounding": "input"}
    narrow = residual.astype(jnp.bfloat16)  # else the sum and what is kept of it are the same
    same(aiter.rmsnorm2d_fwd_with_add(x, narrow, w, 1e-5, 1, **g), jn.add_rmsnorm(x, narrow, w, **sensitive, **own))
    same(aiter.fused_add_rmsnorm_pad(x, w, 1e-5, **g), jn.rmsnorm(x, w, **own))
    same(aiter.fused_add_rmsnorm_pad(x, w, 1e-5, None, 64, **g), jn.rmsnorm(x, w, pad_to_multiple=64, **own))
    padded = aiter.fused_add_rmsnorm_pad(x, w, 1e-5, residual, 64, **g)
    same(padded, jn.add_rmsnorm(x, residual, w, pad_to_multiple=64, **own))
    assert padded[0].shape[-1] == 128 and padded[1].shape[-1] == 96


def test_rmsnorm_quant_names():
    x, residual, w, _, _, xscale = data()
    int8, fp8 = jn.QuantSpec("int8"), jn.QuantSpec("fp8")
    own = {"eps": 1e-5}
    same(
        aiter.rmsnorm2d_fwd_with_smoothquant(x, xscale, w, 1e-5),
        jn.rmsnorm_quant(x, w, int8, smooth_scale=xscale, **own),
    )
    same(aiter.rmsnorm2d_fwd_with_dynamicquant(x, w, 1e-5), jn.rmsnorm_quant(x, w, fp8, **own))
    same(aiter.rmsnorm_quant(x, w, 1e-5, out_dtype="int8"), jn.rmsnorm_quant(x, w, int8, **own))
    same(
        aiter.rmsnorm2d_fwd_with_dynamicquant(
            x, w, 1e-5, 1, out_dtype=jnp.int8, clamp_out=True, dump_rms_norm=True, scale_ub=2.5
        ),
        jn.rmsnorm_quant(x, w, jn.QuantSpec("int8", scale_ub=2.5), cast="before_weight", keep_unquantized=True, **own),
    )
    smooth = jn.add_rmsnorm_quant(x, residual, w, int8, smooth_scale=xscale, keep_unquantized=True, **own)
    same(aiter.rmsnorm2d_fwd_with_add_smoothquant(x, residual, xscale, w, 1e-5), codes_first(smooth[:2]))
    same(
        aiter.rmsnorm2d_fwd_with_add_smoothquant(x, residual, xscale, w, 1e-5, out_before_quant=True),
        codes_first(smooth),
    )
    sensitive = jn.add_rmsnorm_quant(x, residual, w, fp8, cast="before_weight", residual_rounding="input", **own)
    same(aiter.rmsnorm2d_fwd_with_add_dynamicquant(x, residual, w, 1e-5, 1), codes_first(sensitive))
    gemma = jn.add_rmsnorm_quant(x, residual, w, jn.QuantSpec("fp8", 32), weight_offset=1.0, **own)
    same(aiter.add_rmsnorm_quant(x, residual, w, 1e-5, 32, gemma_norm=True), codes_first(gemma))


def test_scales_of_groups_and_their_layouts():
    """Against index formulas and codes written here, not with jaxnorm's own layout helpers."""
    x, _, w, *_ = data()
    m, groups = 15, 3
    y = np.asarray(jn.rmsnorm(x, w, eps=1e-5, out_dtype="float32")).reshape(m, groups, 32)
    amax = np.abs(y).max(-1)
    q, column = aiter.rmsnorm_quant(x, w, 1e-5, 32, True)
    assert column.shape == (groups, m) and q.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(column.T, amax / 448, rtol=2e-6)
    q, tiles = aiter.rmsnorm_quant(x, w, 1e-5, 32, True, scale_dtype="e8m0", out_dtype="fp4")
    assert q.shape == (3, 5, 48) and tiles.shape == (256, 8)
    rows, column_of = np.meshgrid(np.arange(m), np.arange(groups), indexing="ij")
    j, i = column_of, rows
    where = (i // 32) * 8 * 32 + (j // 8) * 256 + (j % 4) * 64 + (i % 16) * 4 + ((j % 8) // 4) * 2 + (i % 32) // 16
    found = np.asarray(tiles).reshape(-1)[where].astype(int)
    np.testing.assert_array_equal(found, 127 + np.ceil(np.log2(amax / 6)).astype(int))
    back = oq.decode(oq.codes_of(q, "fp4"), "fp4").reshape(m, groups, 32) * 2.0 ** (found[..., None] - 127)
    assert np.abs(back - y).max() <= (2.0 ** (found - 127)).max()
    _, per_row = aiter.rmsnorm2d_fwd_with_dynamicquant(x, w, 1e-5, shuffle_scale=True)
    assert per_row.shape == (1, m)


def test_layernorm_names():
    x, residual, w, b, x_bias, _ = data()
    own = {"eps": 1e-3, "x_bias": x_bias}
    for name in ("layer_norm", "layernorm2d_fwd"):
        same(getattr(aiter, name)(x, w, b, 1e-3, x_bias), jn.layernorm(x, w, b, **own))
        same(getattr(aiter, name)(x), jn.layernorm(x, None, None, eps=1e-5))
    for name in ("layernorm2d_fwd_with_add", "layernorm2d_with_add_asm"):
        same(getattr(aiter, name)(x, residual, w, b, 1e-3, x_bias), jn.add_layernorm(x, residual, w, b, **own))


def test_layernorm_quant_names():
    x, residual, w, b, x_bias, xscale = data()
    int8, fp8 = jn.QuantSpec("int8"), jn.QuantSpec("fp8")
    own = {"eps": 1e-3, "x_bias": x_bias}
    same(
        aiter.layernorm2d_fwd_with_smoothquant(x, xscale, w, b, 1e-3, x_bias),
        jn.layernorm_quant(x, w, b, int8, smooth_scale=xscale, **own),
    )
    same(aiter.layernorm2d_fwd_with_dynamicquant(x, w, b, 1e-3, x_bias), jn.layernorm_quant(x, w, b, fp8, **own))
    want = codes_first(jn.add_layernorm_quant(x, residual, w, b, int8, smooth_scale=xscale, **own))
    for name in ("layernorm2d_fwd_with_add_smoothquant", "layernorm2d_with_add_smoothquant_asm"):
        same(getattr(aiter, name)(x, residual, xscale, w, b, 1e-3, x_bias), want)
    want = codes_first(jn.add_layernorm_quant(x, residual, w, b, int8, **own))
    same(aiter.layernorm2d_fwd_with_add_dynamicquant(x, residual, w, b, 1e-3, x_bias, out_dtype="int8"), want)


def test_groupnorm_names():
    g = cases.rng(8)
    x = jnp.asarray(cases.normal(g, (2, 12, 5, 7), "bfloat16"))  # 35 positions: no multiple of 4
    w, b = (jnp.asarray(cases.normal(g, (12,), "float32")) for _ in range(2))
    want = jn.groupnorm(x, w, b, num_groups=3, eps=1e-3, channel_axis=1)
    same(aiter._groupnorm_run(x, 3, w, b, 1e-3), want)
    module = aiter.GroupNorm(3, 12, 1e-3, True, "cuda", jnp.bfloat16)
    assert module.weight.dtype == jnp.bfloat16 and module.bias.shape == (12,)
    module.weight, module.bias = w, b
    same(module(x, use_torch=True), want)
    same(jax.jit(lambda m, x: m(x))(module, x), want)
    plain = aiter.GroupNorm(3, 12, affine=False)
    same(plain(x), jn.groupnorm(x, None, None, num_groups=3, eps=1e-5, channel_axis=1))
    assert jax.tree.leaves(plain) == [] and jax.tree.leaves(jax.tree.map(lambda a: a * 2, module))[0].dtype == w.dtype


def test_two_streams():
    g = cases.rng(9)
    make = lambda t, h: jnp.asarray(cases.normal(g, (2, t, h, 16), "bfloat16"))  # noqa: E731
    q0, k0, q1, k1 = make(3, 4), make(3, 2), make(5, 4), make(5, 2)
    ws = [jnp.asarray(cases.weight(g, 16, "float32")) for _ in range(4)]
    tables = [jn.rope_table(t, 16) for t in (3, 5)]
    sizes = [2, 3, 5, 4, 2, 16]
    for interleaved, style in ((True, "gptj"), (False, "neox")):
        got = aiter.fused_qk_norm_rope_2way(q0, k0, q1, k1, *ws, *tables, *sizes, interleaved, 1e-5)
        same(got, jn.qk_norm_rope_two_stream(q0, k0, q1, k1, *ws, *tables, eps=1e-5, style=style))
    for i, name in enumerate(("batch_size", "num_tokens0", "num_tokens1", "num_heads_q", "num_heads_k", "head_size")):
        wrong = [s + (j == i) for j, s in enumerate(sizes)]
        with pytest.raises(ValueError, match=f"2way: {name}: got {wrong[i]}, expected {sizes[i]}"):
            aiter.fused_qk_norm_rope_2way(q0, k0, q1, k1, *ws, *tables, *wrong, True, 1e-5)


HQ, HK, D, PAGE, T = 4, 2, 32, 16, 5


@functools.cache
def tokens(dtype="bfloat16"):
    """qkv [T, HQ + 2 HK, D], weights, a table of partial rotary, positions, slots with one skipped."""
    g = cases.rng(11)
    qkv = jnp.asarray(cases.normal(g, (T, HQ + 2 * HK, D), dtype))
    qw, kw = (jnp.asarray(cases.weight(g, D, "float32")) for _ in range(2))
    return qkv, qw, kw, jn.rope_table(64, 16), jnp.array([3, 0, 63, 7, 8]), jnp.array([17, 2, -1, 31, 16])


def normed(style="neox", **options):
    """(q, k) of the tokens by qk_norm_rope, and v."""
    qkv, qw, kw, table, positions, _ = tokens()
    where = options.pop("positions", positions)
    q, k = jn.qk_norm_rope(qkv[:, :HQ], qkv[:, HQ : HQ + HK], qw, kw, where, table, eps=1e-5, style=style, **options)
    return q, k, qkv[:, HQ + HK :]


@pytest.mark.parametrize("kind", ["auto", "fp8_e4m3", "int8"])
def test_cache_with_scales_per_token(kind):
    qkv, qw, kw, table, positions, slots = tokens()
    quant = None if kind == "auto" else "per_token"
    dtype = {"auto": "bfloat16", "int8": "int8"}.get(kind, "fp8")
    cache = jn.KVCache.create(3, PAGE, HK, D, dtype=dtype, quant=quant)
    b, h, pieces, d, x = cache.v.shape
    v_cache = cache.v.reshape(b, h, d, pieces * x) if kind == "int8" else cache.v  # as AITER's callers have it
    k_scale, v_scale = (cache.k_scale, cache.v_scale) if quant else (jnp.ones(1), None)
    packed = qkv.reshape(T, -1)
    args = (HQ, HK, HK, D, 1e-5, qw, kw, table, True, positions, cache.k, v_cache, slots, kind, k_scale, v_scale)
    out, k_new, v_new, k_scale_new, v_scale_new = aiter.fused_qk_norm_rope_cache_quant_shuffle(packed, *args)
    q, k, v = normed()
    same(out, jnp.concatenate([q, k, v], axis=1).reshape(T, -1))
    assert v_new.shape == v_cache.shape
    scales = (k_scale_new, v_scale_new) if quant else (None, None)
    again = jn.KVCache(k_new, v_new.reshape(cache.v.shape), *scales, quant=quant)
    written = np.array([0, 1, 3, 4])
    found = again.gather(slots)
    for got, want in zip(found, (k, v), strict=True):
        want = jn.quantize(want, jn.QuantSpec(dtype)).dequantize() if quant else want
        np.testing.assert_array_equal(got[written], want[written])
    if quant is None:
        assert k_scale_new is k_scale and v_scale_new is None


@pytest.mark.parametrize("layout", ["shuffled", "paged", "slots"])
@pytest.mark.parametrize("dtype, sections", [("int8", None), ("bfloat16", (4, 2, 2))])
def test_cache_with_scales_per_tensor(layout, dtype, sections):
    qkv, qw, kw, table, positions, slots = tokens()
    quant = "per_tensor" if dtype == "int8" else None
    cache = jn.KVCache.create(3, PAGE, HK, D, dtype=dtype, quant=quant, layout=layout)
    block, x = (0 if layout == "slots" else PAGE), 16 // jnp.dtype(dtype).itemsize
    scales = jnp.float32(0.03), jnp.float32(0.02)
    tail = (cache.k, cache.v, slots, *scales, True, layout == "shuffled", block, x, 16)
    sizes = (T, HQ, HK, HK, D, False)
    if sections is None:
        got = aiter.fused_qk_norm_rope_cache_pts_quant_shuffle(qkv, qw, kw, table, positions, *sizes, 1e-5, *tail)
        q, k, v = normed("gptj")
    else:
        where = jnp.stack([positions, positions[::-1], positions // 2])
        name = aiter.fused_qk_norm_mrope_3d_cache_pts_quant_shuffle
        got = name(qkv, qw, kw, table, where, *sizes, sections, True, 1e-5, *tail)
        q, k, v = normed("gptj", positions=where, mrope_sections=sections, mrope_interleaved=True)
    q_out, k_cache, v_cache, k_out, v_out = got
    same(q_out, q)
    spec = jn.QuantSpec(dtype) if quant else None
    stored = [jn.quantize(a, spec, static_scale=s).values if spec else a for a, s in zip((k, v), scales, strict=True)]
    same((k_out, v_out), stored)  # for every token, also the skipped one
    again = jn.KVCache(k_cache, v_cache, *(scales if quant else ()), layout=layout, quant=quant)
    written = np.array([0, 1, 3, 4])
    for found, codes, s in zip(again.gather(slots), stored, scales, strict=True):
        want = codes.astype(jnp.float32) * s if quant else codes
        np.testing.assert_array_equal(found[written], want[written])


def test_sizes_given_twice_are_checked():
    qkv, qw, kw, table, positions, slots = tokens()
    cache = jn.KVCache.create(3, PAGE, HK, D, dtype="int8", quant="per_tensor")
    sizes = {"num_tokens": T, "num_heads_q": HQ, "num_heads_k": HK, "num_heads_v": HK, "head_size": D}
    call = functools.partial(
        aiter.fused_qk_norm_rope_cache_pts_quant_shuffle, qkv, qw, kw, table, positions, is_neox_style=True, eps=1e-5,
        k_cache=cache.k, v_cache=cache.v, slot_mapping=slots, per_tensor_k_scale=1.0, per_tensor_v_scale=1.0, return_kv=False,
        use_shuffle_layout=True,
    )  # fmt: skip
    right = {**sizes, "block_size": PAGE, "x": 16, "rotary_dim": 16}
    assert len(call(**right)) == 3
    for name, value in right.items():
        with pytest.raises(ValueError, match=rf"pts_quant_shuffle: ({name}|num_heads_v|qkv): got"):
            call(**right | {name: value + 1})
    with pytest.raises(
        ValueError, match="kv_cache_dtype: got 'fp16', expected 'auto' or 'fp8' or 'fp8_e4m3' or 'int8'"
    ):
        aiter.fused_qk_norm_rope_cache_quant_shuffle(
            qkv.reshape(T, -1),
            HQ,
            HK,
            HK,
            D,
            1e-5,
            qw,
            kw,
            table,
            True,
            positions,
            cache.k,
            cache.v,
            slots,
            "fp16",
            None,
            None,
        )
    x, _, w, *_ = data()
    for call, words in (
        (lambda: aiter.rmsnorm2d_fwd(x, w, 1e-5, 2), "use_model_sensitive_rmsnorm: got 2, expected 0 or 1"),
        (lambda: aiter.rmsnorm_quant(x, w, 1e-5, -1), "group_size: got -1"),
        (lambda: aiter.rmsnorm_quant(x, w, 1e-5, 7), "expected a divisor of N=96"),
        (lambda: aiter.rmsnorm_quant(x, w, 1e-5, out_dtype="fp4"), "group_size=32 and scale_dtype='e8m0'"),
        (lambda: aiter.rms_norm(x, w, 1e-5, gemma_norm=2), "gemma_norm: got 2"),
        (lambda: aiter.GroupNorm(5, 12), "num_groups: got 5, expected a divisor of the 12 channels"),
        (lambda: aiter.GroupNorm(3, 12)(x), r"x: got shape (3, 5, 96), expected [B, 12, ...]"),
        (
            lambda: aiter.reduce_scatter_rmsnorm_quant_all_gather(x, w),
            "ctx: got None, expected the name of a mesh axis",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)


def test_distributed(rows=6):
    """Four ranks of two rows; the last has none. Against one device that adds up the partial sums in rank order."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    g = cases.rng(12)
    parts, w = jnp.asarray(cases.normal(g, (4, rows, 64), "bfloat16")), jnp.asarray(cases.weight(g, 64, "float32"))
    total = functools.reduce(lambda s, p: s + p.astype(jnp.float32), parts, jnp.zeros((rows, 64), jnp.float32))
    exact = np.asarray(jn.rmsnorm(total, w, eps=1e-5))
    share = -(-rows // 4)

    def run(part, **options):
        out = aiter.reduce_scatter_rmsnorm_quant_all_gather(part[0], w, 1e-5, "i", **options)
        return tuple(a for a in out if a is not None)

    def on(n_own, n_whole, x=parts, **options):
        specs = [P("i")] * n_own + [P()] * n_whole
        return jax.jit(
            jax.shard_map(functools.partial(run, **options), mesh=mesh, in_specs=P("i"), out_specs=tuple(specs))
        )(x)

    padded = np.concatenate([exact, np.zeros((share * 4 - rows, 64), np.float32)])
    shard, gathered = on(1, 1)
    np.testing.assert_allclose(shard, padded, rtol=1e-6)
    assert shard.dtype == jnp.float32 and gathered.dtype == jnp.bfloat16
    np.testing.assert_allclose(gathered.astype(jnp.float32), exact, rtol=2**-8)
    wide, gathered = on(1, 1, x=parts.astype(jnp.float32))
    same(gathered, wide[:rows])
    codes, gathered, scales = on(1, 2, quant_mode="fp8_per_token")
    assert scales.shape == (rows, 1) and gathered.dtype == jnp.float8_e4m3fn
    same(codes[:rows], gathered)
    assert not np.asarray(codes[rows:]).view(np.uint8).any()
    np.testing.assert_allclose(scales[:, 0], np.abs(exact).max(1) / 448, rtol=2e-6)
    np.testing.assert_allclose(gathered.astype(jnp.float32) * scales, exact, atol=np.abs(exact).max() / 448 * 17)
    codes, scales = on(2, 0, quant_mode="fp8_per_token", do_allgather=False)
    assert scales.shape == (share * 4, 1)
    same(codes[:rows], gathered)
