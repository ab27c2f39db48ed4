"""The KV cache with real kernels: every byte against the oracle, in place when donated, one launch, invariance, huge caches."""

from __future__ import annotations

import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cases_cache import FN, FNUZ, LAYOUTS, Case, bytes_of
from driver import Driver, run_guarded

import jaxnorm
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])

FORMATS = (
    ("bfloat16", None),
    (FN, "per_token"),
    ("int8", "per_token"),
    (FNUZ, "per_token"),
    (FN, "per_tensor"),
    ("int8", "per_tensor"),
)
MODELS = [
    Case(layout, dtype, quant, tokens, *heads, features, pages=-(-tokens // page) + 2, page=page, packed=i % 2 == 0,
         weight_dtype="bfloat16", options={"style": "gptj" if i % 3 == 2 else "neox"})
    for i, (layout, (dtype, quant)) in enumerate((la, f) for la in LAYOUTS for f in FORMATS)
    for tokens, heads, features, page in [((127, (32, 4), 128, 32), (513, (4, 1), 256, 64), (3, (28, 4), 128, 16))[i % 3]]
]  # fmt: skip
ODD = [
    Case("shuffled", "float32", x_dtype="float32", features=24, page=12, kv_heads=3, q_heads=5, table_dtype="bfloat16"),
    Case("shuffled", FN, "per_token", features=256, rotary=64, page=48, options={"weight_offset": 1.0}, packed=True),
    Case(
        "paged",
        "bfloat16",
        x_dtype="float32",
        features=80,
        options={"style": "gptj", "eps": 1e-5},
        q_heads=1,
        kv_heads=1,
    ),
    Case("shuffled", "float8_e5m2", "per_token", x_dtype="float16", sections=(4, 6, 6), features=32),
    Case("paged", "int8", "per_token", features=128, sections=(24, 20, 20), interleaved=True, packed=True),
    Case("paged", "bfloat16", tokens=1, skip=0),
    Case("slots", "float16", x_dtype="float16", features=6, rotary=2, options={"style": "gptj"}),
    Case("slots", "float32", x_dtype="bfloat16", features=192, weight_dtype=None, return_kv=True),
]
# Prompts: tiles of v, with groups of slots that are whole, that start in the middle of one, and that have gaps.
PROMPTS = [
    Case(
        "shuffled",
        dtype,
        quant,
        tokens=4173,
        q_heads=2,
        kv_heads=8,
        features=128,
        pages=70,
        page=64,
        run=run,
        skip=skip,
        packed=True,
    )
    for dtype, quant in (("bfloat16", None), (FN, "per_token"), ("int8", "per_tensor"))
    for run, skip in ((0, 0), (5, 7))
]


@backends
@pytest.mark.parametrize("case", [*MODELS, *ODD, *PROMPTS], ids=str)
def test_against_the_oracle(case, backend):
    """q, k, v, and every byte of the cache; then the gather, bit for bit."""
    arrays = case.arrays()
    got = case.run_op(arrays, backend)
    case.check(arrays, got, backend, exact=False)
    some = np.array([case.slots - 1, -1, 0, case.slots + 5, *arrays["slots"][:200], -(2**31)], np.int32)
    k, v = jax.jit(lambda c, s: c.gather(s, backend=backend))(case.cache(got), jnp.asarray(some))
    for a, want in zip((k, v), case.gathered(got, some.astype(np.int64)), strict=True):
        same = bytes_of(a) == bytes_of(want)
        nan = np.isnan(want.astype(np.float32)).repeat(want.itemsize).reshape(-1)
        assert (same | nan).all(), f"{case} gather: {(~same).sum()} bytes differ"


GUARDED = [
    *(Case(layout, *form, tokens=33, features=128, packed=i % 2 == 0, return_kv=i % 3 > 0)
      for layout in LAYOUTS for i, form in enumerate(FORMATS)),
    *(ODD[i] for i in (0, 1, 5, 6)),
    *(Case("shuffled", *form, tokens=301, q_heads=3, kv_heads=8, features=64, pages=20, run=5, skip=7)
      for form in (FORMATS[0], FORMATS[1])),
]  # fmt: skip


@pytest.fixture(scope="module")
def driver():
    return Driver()


@backends
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_guard_bytes(case, backend, driver):
    """No byte changes outside of the results and the slots (-1 and past the end too); NaN in the guards reaches no result."""
    a, found = case.arrays(), target.of_device(jax.devices()[0]) or ""
    slots = np.array([case.slots - 1, -1, 0, case.slots, *range(2, 11), -(2**31)], np.int32)
    for fill in (0xFF, 0xCC):
        got = run_guarded(driver, backend, case.problem(a, found), case.operands(a), fill)
        case.check(a, case.renamed(got, a), f"{backend} guarded", exact=False)
        read = run_guarded(
            driver, backend, case.gather_problem(a, slots, found), {"slots": slots} | case.buffers(a), fill
        )
        for n, want in zip("kv", case.gathered(a, slots.astype(np.int64)), strict=True):
            nan = np.isnan(want.astype(np.float32)).repeat(want.itemsize).reshape(-1)
            assert ((bytes_of(read[f"{n}_out"]) == bytes_of(want)) | nan).all(), f"{backend} {case} gather {n}"


@backends
def test_64_bit_slots_and_positions(backend):
    with jax.enable_x64(True):
        case = Case("shuffled", FN, "per_token", features=128, index="int64", tokens=33)
        a = case.arrays()
        a["slots"][1], a["positions"][2] = 2**40, -(2**40)
        got = case.run_op(a, backend)
        case.check(a, got, backend, exact=False)
        k, _ = jax.jit(lambda c, s: c.gather(s, backend=backend))(case.cache(got), jnp.array([2**33, a["slots"][0]]))
        assert not np.asarray(k[0]).any() and np.asarray(k[1]).any()


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_that_nobody_writes(layout, backend):
    for slots in (np.full(9, -1), np.arange(9) + 48):
        case = Case(layout, FN, "per_token")
        a = case.arrays() | {"slots": slots.astype(np.int32)}
        got = case.run_op(a, backend)
        case.check(a, got, backend, exact=False)
        for n in ("k", "v", "k_scale", "v_scale"):
            assert got[f"cache.{n}"].tobytes() == a[f"cache.{n}"].tobytes()


@backends
def test_a_token_has_the_same_bits_in_any_company(backend):
    """Alone, among few, and in a prompt whose v goes through tiles."""
    big = PROMPTS[2]
    a = big.arrays()
    whole = big.run_op(a, backend)
    for count in (1, 16, 700):
        small = big.with_(tokens=count)
        few = {n: x[:count] if n in ("q", "k", "v", "positions", "slots") else x for n, x in a.items()}
        got = small.run_op(few, backend)
        for n in ("q", "k", "v"):
            tolerances.assert_same_bits(got[n], whole[n][:count], n)
        k = [np.asarray(big.cache(x).gather(jnp.asarray(a["slots"][:count]), backend=backend)[1]) for x in (got, whole)]
        tolerances.assert_same_bits(k[0], k[1])


@backends
@pytest.mark.parametrize(("dtype", "quant"), [("bfloat16", None), (FN, "per_token"), ("int8", "per_tensor")])
def test_donated_caches_are_updated_in_place(dtype, quant, backend):
    """One custom call; nothing else makes an array of the cache's shape; the buffers stay where they are."""
    case = Case(
        "shuffled",
        dtype,
        quant,
        tokens=128,
        q_heads=64,
        kv_heads=8,
        features=128,
        pages=64,
        page=64,
        packed=True,
        return_kv=False,
    )
    a = case.arrays()
    rest = {n: jnp.asarray(x) for n, x in a.items() if not n.startswith("cache.") and n not in ("q", "k", "v")}
    qkv, cache = jnp.asarray(case.qkv(a)), jax.tree.map(lambda x: jnp.array(x, copy=True), case.cache(a))
    compiled = jax.jit(lambda q, r, c: case.op(q, r, c, backend), donate_argnums=2).lower(qkv, rest, cache).compile()
    text = compiled.as_text()
    arrays = [x for x in jax.tree.leaves(cache) if x.ndim]
    assert hlo.launches(text) == 1
    assert hlo.output_aliases(text) >= len(arrays)
    shapes = "|".join(",".join(map(str, x.shape)) for x in arrays)
    made = re.findall(rf" = \w+\[(?:{shapes})\]\S* ([\w-]+)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, made
    before = [x.unsafe_buffer_pointer() for x in arrays]
    _, new = compiled(qkv, rest, cache)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new) if x.ndim] == before
    kept = case.cache(a)
    kept = jax.tree.map(jnp.asarray, kept)
    jax.block_until_ready(jax.jit(lambda q, r, c: case.op(q, r, c, backend))(qkv, rest, kept))
    np.testing.assert_array_equal(bytes_of(kept.k), bytes_of(a["cache.k"]))


@backends
def test_a_loop_carries_the_cache(backend):
    case = Case("shuffled", FN, "per_token", tokens=16, skip=0, run=5, features=128)
    a = case.arrays()
    whole = case.run_op(a, backend)

    def loop(a, cache):
        def step(cache, i):
            one = {n: jax.lax.dynamic_slice_in_dim(a[n], i, 1) for n in ("q", "k", "v", "positions", "slots")}
            *_, cache = case.op(tuple(one[n] for n in "qkv"), a | one, cache, backend)
            return cache, None

        return jax.lax.scan(step, cache, jnp.arange(16))[0]

    arrays = {n: jnp.asarray(v) for n, v in a.items() if not n.startswith("cache.")}
    cache = jax.jit(loop, donate_argnums=1)(arrays, jax.tree.map(lambda x: jnp.array(x, copy=True), case.cache(a)))
    for n in ("k", "v", "k_scale", "v_scale"):
        np.testing.assert_array_equal(bytes_of(getattr(cache, n)), bytes_of(whole[f"cache.{n}"]))


def test_the_default_uses_a_kernel():
    case = ODD[1]
    a = case.arrays()
    (choice,) = jaxnorm.explain(
        lambda c: case.op(case.qkv(a), a | {"slots": jnp.asarray(a["slots"])}, c), case.cache(a)
    )
    assert choice.backend in ("triton", "hip") and not choice.rejected, choice


@pytest.mark.slow
@backends
def test_a_cache_of_more_than_two_to_the_31_elements(backend):
    """The last page is written where it lies, and the first is not touched."""
    pages, page, heads, d = 16400, 128, 8, 128
    cache = jaxnorm.KVCache.create(pages, page, heads, d, dtype="int8", quant="per_token")
    assert cache.k.size > 2**31
    case = Case(tokens=4, kv_heads=heads, q_heads=8, features=d)
    a = case.arrays()
    slots = jnp.array([pages * page - 1, pages * page - 64, (2**31 // (heads * d)) + 1, 5])

    @jax.jit
    def run(a, cache):
        return jaxnorm.qk_norm_rope_cache(
            tuple(a[n] for n in "qkv"), a["q_weight"], a["k_weight"], a["positions"], a["cos_sin"], cache, slots,
            num_q_heads=8, num_kv_heads=heads, return_kv=True, backend=backend,
        )  # fmt: skip

    _, k, v, cache = jax.jit(run, donate_argnums=1)({n: x for n, x in a.items() if not n.startswith("cache.")}, cache)
    for got, want in zip(cache.gather(slots, backend=backend), (k, v), strict=True):
        q = jaxnorm.quantize(want, jaxnorm.QuantSpec("int8"))
        np.testing.assert_allclose(got, q.dequantize(), rtol=1e-6, atol=np.asarray(q.scale).max() * 1.001)
    assert not np.asarray(cache.gather(jnp.arange(6, 400), backend=backend)[0]).any()
