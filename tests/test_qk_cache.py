"""``qk_norm_rope_cache`` and ``KVCache`` on the xla backend: values, every byte of the buffers, edges of slots and positions."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_cache as oracle
import pytest
import tolerances
from cases_cache import FN, FNUZ, LAYOUTS, Case, bytes_of

import jaxnorm
from jaxnorm import KVCache, QuantSpec

FORMATS = (("bfloat16", None), (FN, "per_token"), ("int8", "per_token"), (FNUZ, "per_tensor"), ("int8", "per_tensor"))
CASES = (
    *(Case(layout, dtype, quant) for layout, (dtype, quant) in itertools.product(LAYOUTS[:2], FORMATS)),
    Case("slots", FN, "per_token", packed=True),
    Case("slots", "float16", x_dtype="float16", options={"style": "gptj"}),
    Case("slots", "float32", x_dtype="bfloat16", weight_dtype=None),
    Case("shuffled", "float32", x_dtype="float32", features=24, page=12, kv_heads=3, q_heads=5, table_dtype="bfloat16"),
    Case("shuffled", FN, "per_token", features=128, rotary=64, page=48, options={"weight_offset": 1.0}, packed=True),
    Case("paged", "bfloat16", x_dtype="float32", features=80, options={"style": "gptj", "eps": 1e-5}, q_heads=1, kv_heads=1),
    Case("shuffled", "float8_e5m2", "per_token", x_dtype="float16", sections=(4, 6, 6)),
    Case("paged", "int8", "per_token", sections=(6, 5, 5), interleaved=True, packed=True),
    Case("paged", "bfloat16", tokens=1, skip=0),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas_are_bijections(layout):
    """Each covers its buffer, and is the reshape of [B, P, Hk, D] that section 7.1 gives beside it."""
    for b, h, d, p, x in ((3, 2, 32, 16, 8), (2, 3, 48, 48, 16), (1, 1, 16, 16, 16), (5, 4, 8, 12, 4)):
        slots = np.arange(b * p)
        for which in ("k", "v", "scale"):
            at = oracle.places(which, layout, b, p, h, d, x, slots)
            assert sorted(at.reshape(-1)) == list(range(at.size))
            if layout != "shuffled" or which == "scale":
                continue
            pages = np.arange(at.size).reshape(b, p, h, d)
            k = pages.reshape(b, p, h, d // x, x).transpose(0, 2, 3, 1, 4)
            v = pages.reshape(b, p // x, x, h, d).transpose(0, 3, 1, 4, 2)
            np.testing.assert_array_equal((k if which == "k" else v).reshape(-1)[at.reshape(-1)], np.arange(at.size))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case):
    arrays = case.arrays()
    got = case.run_op(arrays)
    case.check(arrays, got)
    some = np.array([case.slots - 1, -1, 0, case.slots + 5, *arrays["slots"][:3], -(2**31)], np.int32)
    k, v = jax.jit(lambda c, s: c.gather(s))(case.cache(got), jnp.asarray(some))
    for a, want in zip((k, v), case.gathered(got, some.astype(np.int64)), strict=True):
        assert a.dtype == (jnp.float32 if case.quant else case.dtype)
        np.testing.assert_array_equal(bytes_of(a), bytes_of(want))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "heads", "features"), [(127, (32, 4), 128), (513, (4, 1), 256), (3, (28, 4), 128)])
@pytest.mark.parametrize(("dtype", "quant"), FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_models(layout, dtype, quant, tokens, heads, features):
    for style, page in (("neox", 64), ("gptj", 32)):
        case = Case(
            layout,
            dtype,
            quant,
            tokens,
            *heads,
            features,
            pages=-(-tokens // page) + 2,
            page=page,
            options={"style": style},
        )
        arrays = case.arrays()
        case.check(arrays, case.run_op(arrays))


def test_the_same_as_qk_norm_rope_and_quantize():
    """q and k bit for bit those of ``qk_norm_rope``; codes and scales bit for bit those of ``quantize(k)``."""
    for case in (CASES[1], CASES[6]):
        a = case.arrays()
        got = case.run_op(a)
        q, k = jax.jit(lambda q, k, w, u, p, t: jaxnorm.qk_norm_rope(q, k, w, u, p, t))(
            *(a[n] for n in ("q", "k", "q_weight", "k_weight", "positions", "cos_sin"))
        )
        tolerances.assert_same_bits(got["q"], q)
        tolerances.assert_same_bits(got["k"], k)
        want = jaxnorm.quantize(k, QuantSpec(case.dtype))
        live = (a["slots"] >= 0) & (a["slots"] < case.slots)
        at = oracle.places("k", *case.geometry(), a["slots"][live])
        tolerances.assert_same_bits(got["cache.k"].reshape(-1)[at], np.asarray(want.values)[live])
        at = oracle.places("scale", *case.geometry(), a["slots"][live])
        tolerances.assert_same_bits(got["cache.k_scale"].reshape(-1)[at], np.asarray(want.scale)[live])


def test_packed_is_the_tuple():
    case = CASES[2]
    a = case.arrays()
    want, packed = case.run_op(a), case.with_(packed=True, return_kv=False)
    flat = {n: v.reshape(case.tokens, -1) if n in ("q", "k", "v") else v for n, v in a.items()}
    for other in (packed.run_op(a), case.run_op(flat)):
        for name, value in other.items():
            tolerances.assert_same_bits(value, want[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_that_nobody_writes(layout):
    """All negative; all beyond the cache: nothing changes, q is there all the same. No tokens: nothing happens."""
    for slots in (np.full(9, -1), np.arange(9) + 48, np.array([-(2**31), 2**31 - 1] * 4 + [48])):
        case = Case(layout, FN, "per_token")
        a = case.arrays() | {"slots": slots.astype(np.int32)}
        got = case.run_op(a)
        case.check(a, got)
        for n in ("k", "v", "k_scale", "v_scale"):
            assert got[f"cache.{n}"].tobytes() == a[f"cache.{n}"].tobytes()
    case = Case(layout, "bfloat16", tokens=0, skip=0)
    a = case.arrays()
    got = case.run_op(a)
    assert got["q"].shape == (0, 4, 32) and got["v"].shape == (0, 2, 32)
    assert got["cache.k"].tobytes() == a["cache.k"].tobytes()


def test_64_bit_positions_and_slots():
    with jax.enable_x64(True):
        for case in (Case(index="int64"), Case("slots", "int8", "per_token", index="int64", packed=True)):
            a = case.arrays()
            a["slots"][1], a["positions"][2] = 2**40, -(2**40)
            got = case.run_op(a)
            case.check(a, got)
            k, _ = jax.jit(lambda c, s: c.gather(s))(case.cache(got), jnp.array([2**33, a["slots"][0]]))
            assert not np.asarray(k[0]).any() and np.asarray(k[1]).any()


def test_positions_outside_of_the_table_drop_the_rotation():
    case = Case(tokens=4, skip=0)
    a = case.arrays() | {"positions": np.array([40, -1, 2**31 - 1, 5], np.int32)}
    case.check(a, case.run_op(a))


def test_two_tokens_with_one_slot():
    """That slot is anybody's; every other byte is as it must be."""
    case = Case("shuffled", FN, "per_token", skip=0)
    a = case.arrays()
    a["slots"][4] = a["slots"][7]
    got = case.run_op(a)
    loser = a | {"slots": np.where(np.arange(9) == 4, -1, a["slots"]).astype(np.int32)}
    clean = case.run_op(loser)
    for n, which in (("k", "k"), ("v", "v"), ("k_scale", "scale"), ("v_scale", "scale")):
        other = np.ones(got[f"cache.{n}"].size, bool)
        other[oracle.places(which, *case.geometry(), a["slots"][7:8]).reshape(-1)] = False
        np.testing.assert_array_equal(*(bytes_of(x[f"cache.{n}"].reshape(-1)[other]) for x in (got, clean)))


def test_scales_of_a_tensor_are_arrays_that_may_be_replaced():
    """Traced, never read on the host; the cache that comes back has the new ones. A scale too small saturates."""
    case = Case("paged", "int8", "per_tensor")
    a = case.arrays()

    @jax.jit
    def f(a, cache, k_scale):
        return case.op(tuple(a[n] for n in "qkv"), a, cache), jaxnorm.qk_norm_rope_cache(
            tuple(a[n] for n in "qkv"), a["q_weight"], a["k_weight"], a["positions"], a["cos_sin"], cache, a["slots"],
            num_q_heads=4, num_kv_heads=2, k_scale=k_scale, v_scale=np.float32(0.5), return_kv=True, backend="xla",
        )  # fmt: skip

    rest = {n: v for n, v in a.items() if not n.startswith("cache.")}
    _, out = f(rest, case.cache(a), jnp.full((1,), 1e-3, jnp.float32))
    got = case.named(out)
    assert got["cache.k_scale"] == np.float32(1e-3) and got["cache.v_scale"] == np.float32(0.5)
    case.check(a | {"cache.k_scale": np.float32(1e-3), "cache.v_scale": np.float32(0.5)}, got)
    assert {127, -127} <= set(np.unique(got["cache.k"])) and -128 not in got["cache.k"][0, :0]


def test_nan_and_infinity_stay_with_their_token():
    case = Case("paged", FN, "per_token", skip=0)
    a = case.arrays()
    clean = case.run_op(a)
    a["k"][3, 0, 5], a["v"][5, 1, 2] = np.nan, np.inf
    got = case.run_op(a)
    for n, token, head in (("k", 3, 0), ("v", 5, 1)):
        scale = got[f"cache.{n}_scale"].reshape(-1, 2)
        assert not np.isfinite(scale[a["slots"][token], head])
        other = np.ones((case.slots, 2), bool)
        other[a["slots"][token], head] = False
        for name in (n, f"{n}_scale"):
            flat = [x[f"cache.{name}"].reshape(case.slots, 2, -1)[other] for x in (got, clean)]
            np.testing.assert_array_equal(*map(bytes_of, flat))


def test_gather_of_any_shape():
    case = Case("shuffled", "int8", "per_tensor")
    cache = case.cache(case.arrays())
    for slots in (np.int32(7), np.zeros((0,), np.int32), np.arange(12).reshape(3, 2, 2), [5, -1], jnp.arange(4)):
        k, v = cache.gather(slots)
        assert k.shape == v.shape == (*np.shape(slots), 2, 32)
        want, _ = case.gathered(case.arrays(), np.asarray(slots).reshape(-1).astype(np.int64))
        np.testing.assert_array_equal(np.asarray(k).reshape(-1, 2, 32), want)
    broken = cache.replace(k_scale=jnp.float32(np.nan))
    assert not np.asarray(broken.gather(jnp.array([-1, 48]))[0]).any()


def test_create():
    cache = KVCache.create(4, 32, 2, 64, dtype="fp8", quant="per_token")
    assert cache.k.dtype == FN and cache.k.shape == (4, 2, 4, 32, 16) and cache.v.shape == (4, 2, 2, 64, 16)
    assert cache.k_scale.shape == (4, 2, 32) and (np.asarray(cache.k_scale) == 1).all()
    assert cache.page_size == 32 and not np.asarray(cache.gather(jnp.arange(8))[0]).any()
    for kind in ("bfloat16", "float16", "float32", jnp.bfloat16, "int8", "fp8", jnp.float8_e4m3fnuz):
        for layout, quant in itertools.product(LAYOUTS, ("per_token", "per_tensor")):
            eight = kind in ("int8", "fp8", jnp.float8_e4m3fnuz)
            made = KVCache.create(2, 16, 1, 32, dtype=kind, quant=quant if eight else None, layout=layout)
            pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(made)]
            assert len(set(pointers)) == len(pointers) == (4 if eight else 2)
    with jaxnorm.use_target({"rocm": "gfx942"}):
        assert KVCache.create(1, 16, 1, 16, dtype="fp8", quant="per_tensor").k.dtype == FNUZ
    with jaxnorm.use_target({"rocm": "gfx942", "cuda": "sm_90"}), pytest.raises(ValueError, match="one flavour"):
        KVCache.create(1, 16, 1, 16, dtype="fp8", quant="per_tensor")


def test_a_decode_loop_leaves_what_one_call_leaves():
    """Token by token with the cache as the carry of a scan."""
    case = Case("shuffled", FN, "per_token", tokens=16, skip=0, run=5)
    a = case.arrays()
    whole = case.run_op(a)

    @jax.jit
    def loop(a, cache):
        def step(cache, i):
            one = {n: jax.lax.dynamic_slice_in_dim(a[n], i, 1) for n in ("q", "k", "v", "positions", "slots")}
            *heads, cache = case.op(tuple(one[n] for n in "qkv"), a | one, cache)
            return cache, heads

        return jax.lax.scan(step, cache, jnp.arange(16))

    cache, heads = loop({n: v for n, v in a.items() if not n.startswith("cache.")}, case.cache(a))
    for n, h in zip("qkv", heads, strict=True):
        tolerances.assert_same_bits(np.asarray(h)[:, 0], whole[n])
    for n in ("k", "v", "k_scale", "v_scale"):
        np.testing.assert_array_equal(bytes_of(getattr(cache, n)), bytes_of(whole[f"cache.{n}"]))
