"""QuantSpec: what it accepts and refuses. Quantized: a pytree that goes wherever arrays go; dequantize in every layout."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle_quant as oq
import pytest
import tolerances
from oracle_quant import FP8, Case

import jaxnorm
from jaxnorm import Quantized, QuantSpec

MX = {"group_size": 32, "scale_dtype": "e8m0"}

# QuantSpec


@pytest.mark.parametrize("dtype, name", [
    *((n, n) for n in ("int8", "fp8", *FP8, "fp4")),
    (jnp.int8, "int8"), (np.int8, "int8"), (np.dtype("int8"), "int8"), (jnp.dtype("int8"), "int8"),
    *((getattr(jnp, n), n) for n in FP8), *((np.dtype(getattr(ml_dtypes, n)), n) for n in FP8),
    (ml_dtypes.float4_e2m1fn, "fp4"), (jnp.float4_e2m1fn, "fp4"),
])  # fmt: skip
def test_dtypes_by_name_and_by_jnp(dtype, name):
    more = MX if name == "fp4" else {}
    spec = QuantSpec(dtype, **more)
    assert spec.dtype == name and spec == QuantSpec(name, **more) and hash(spec) == hash(QuantSpec(name, **more))


INT8_E8M0 = {"dtype": "int8", "group_size": 32, "scale_dtype": "e8m0"}
REFUSED = [
    ("dtype", {"dtype": "uint8"}, ["'uint8'", "'int8'", "'fp8'", "'fp4'", "'float8_e4m3fnuz'"]),
    ("dtype", {"dtype": "float8"}, ["'float8'"]),
    ("dtype", {"dtype": "FP8"}, ["'FP8'"]),
    ("dtype", {"dtype": jnp.uint8}, ["uint8"]),
    ("dtype", {"dtype": jnp.bfloat16}, ["bfloat16"]),
    ("dtype", {"dtype": jnp.int4}, ["int4"]),
    ("dtype", {"dtype": "float8_e8m0fnu"}, ["'float8_e8m0fnu'"]),
    ("dtype", {"dtype": None}, ["None"]),
    ("dtype", {"dtype": 8}, ["8"]),
    # int8 + e8m0
    ("scale_dtype", INT8_E8M0, ["'e8m0'", "int8", "'float32'"]),
    # e8m0 without group_size
    ("group_size", {"dtype": "fp8", "scale_dtype": "e8m0"}, ["None", "e8m0"]),
    # fp4 without group_size, without e8m0, with another group
    ("dtype", {"dtype": "fp4"}, ["fp4", "32", "e8m0"]),
    ("dtype", {"dtype": "fp4", "group_size": 32}, ["fp4", "e8m0"]),
    ("dtype", {"dtype": "fp4", "group_size": 64, "scale_dtype": "e8m0"}, ["64", "32"]),
    # shuffled with anything but e8m0 and g = 32
    ("scale_layout", {"dtype": "fp8", "scale_layout": "shuffled"}, ["'shuffled'", "32", "e8m0"]),
    ("scale_layout", {"dtype": "fp8", "group_size": 32, "scale_layout": "shuffled"}, ["'shuffled'", "e8m0"]),
    ("scale_layout", {"dtype": "fp8", "group_size": 64, "scale_dtype": "e8m0", "scale_layout": "shuffled"}, ["64"]),
    ("scale_layout", {"dtype": "int8", "group_size": 32, "scale_layout": "shuffled"}, ["'shuffled'"]),
    # names and numbers
    ("scale_dtype", {"scale_dtype": "bfloat16"}, ["'bfloat16'", "'float32'", "'e8m0'"]),
    ("scale_layout", {"scale_layout": "col"}, ["'col'", "'row'", "'column'", "'shuffled'"]),
    ("e8m0_rounding", {"e8m0_rounding": "nearest"}, ["'nearest'", "'up'", "'down'", "'even'"]),
    *(("group_size", {"group_size": g}, [repr(g), "positive"]) for g in (0, -32, True, 32.0, "32")),
    *(("scale_ub", {"scale_ub": u}, ["positive"]) for u in (0.0, -1.0, float("nan"), "1", True)),
]  # fmt: skip


@pytest.mark.parametrize("argument, given, parts", REFUSED, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(REFUSED)])
def test_refused(argument, given, parts):
    with pytest.raises(ValueError, match=argument) as raised:
        QuantSpec(**({"dtype": "int8"} | given))
    text = str(raised.value)
    assert text.startswith(f"QuantSpec: {argument}: got ") and ", expected " in text, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def test_spec_is_a_value():
    """Frozen, hashable, equal by content whatever the type of the numbers, static under jit."""
    a = QuantSpec("int8", group_size=np.int64(32), scale_ub=np.float32(2))
    b = QuantSpec(np.int8, 32, "float32", "row", 2.0, "up")
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1 and {a: 1}[b] == 1
    assert a != replace(a, group_size=64) and a != replace(a, e8m0_rounding="even")
    assert type(a.group_size) is int and type(a.scale_ub) is float
    with pytest.raises(FrozenInstanceError):
        a.dtype = "fp8"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(a)) == a == copy.deepcopy(a) and "int8" in repr(a)
    traces = []

    def f(x, spec):
        traces.append(spec)
        return x

    jitted = jax.jit(f, static_argnums=1)
    jitted(1.0, a), jitted(1.0, b), jitted(1.0, replace(a, scale_ub=None))
    assert len(traces) == 2


def test_the_contract_s_defaults():
    s = QuantSpec("int8")
    assert (s.group_size, s.scale_dtype, s.scale_layout, s.scale_ub, s.e8m0_rounding) == (
        None,
        "float32",
        "row",
        None,
        "up",
    )


# Quantized as a pytree

LAYOUTS = {
    "token": QuantSpec("int8"),
    "group": QuantSpec("fp8", group_size=32),
    "token-column": QuantSpec("int8", scale_layout="column"),
    "column": QuantSpec("int8", group_size=64, scale_layout="column"),
    "fnuz": QuantSpec("float8_e4m3fnuz"),
    "mxfp8-column": QuantSpec("fp8", scale_layout="column", **MX),
    "mxfp8-shuffled": QuantSpec("fp8", scale_layout="shuffled", **MX),
    "mxfp4": QuantSpec("fp4", **MX),
    "mxfp4-shuffled": QuantSpec("fp4", scale_layout="shuffled", **MX),
}
layouts = pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)


def example(spec: QuantSpec, lead=(6,), features=64, seed=0):
    """(library's result, float64 values that it stands for by the oracle)."""
    case = Case("quantize", spec, features, lead, x_dtype="float32")
    arrays = case.arrays(seed)
    want = case.expected(arrays)
    return jaxnorm.quantize(arrays["x"], spec), oq.decode(want.codes, want.name) * want.multiplier.astype(np.float64)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        tolerances.assert_same_bits(left, right)


back = jax.jit(Quantized.dequantize)


def assert_back(got, want, dtype="float32"):
    """One float32 product of a code and a scale, rounded once."""
    assert got.dtype == cases.dtype(dtype) and got.shape == want.shape, f"{got.dtype}{got.shape} is not {want.shape}"
    tolerances.assert_same_values(got, want.astype(np.float32).astype(got.dtype))


@layouts
def test_round_trips(spec):
    q, _ = example(spec)
    leaves, tree = jax.tree.flatten(q)
    assert [a.dtype for a in leaves] == [q.values.dtype, q.scale.dtype] and tree == jax.tree.structure(
        jax.tree.map(lambda a: a, q)
    )
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is Quantized and again.spec == q.spec and again.values is q.values
    assert_same(again, q)
    assert_same(jax.jit(lambda q: q)(q), q)
    assert_same(jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, q)), q)
    assert hash(tree) == hash(jax.tree.structure(q))
    empty = jax.tree.unflatten(tree, [None, object()])
    assert empty.values is None and empty.spec == q.spec
    abstract = jax.eval_shape(lambda q: q, q)
    assert isinstance(abstract, Quantized) and abstract.values.shape == q.values.shape
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path({"h": q})[0]]
    assert len(set(paths)) == 2 and all(p.startswith("['h']") for p in paths)


def test_other_specs_are_other_trees():
    a, b = example(QuantSpec("int8"))[0], example(QuantSpec("int8", scale_ub=100.0))[0]
    assert jax.tree.structure(a) != jax.tree.structure(b)
    with pytest.raises(ValueError, match=r"[Pp]ytree|structure|Mismatch"):
        jax.tree.map(lambda x, y: x, a, b)


@layouts
def test_dequantize(spec):
    """Also inside jit, in the dtypes that are asked for."""
    q, want = example(spec)
    assert_back(q.dequantize(), want)
    assert_back(jax.jit(lambda q: q.dequantize(jnp.bfloat16))(q), want, "bfloat16")


@layouts
def test_dequantize_leading_dims(spec):
    """No leading dim, several, ones, none left; one program for all."""
    made = [Case("quantize", spec, 64, lead, x_dtype="float32") for lead in ((), (1, 2, 1), (2, 3), (0,))]
    arrays = [c.arrays() for c in made]
    got = jax.jit(lambda arrays: [c.call(a)["q"].dequantize() for c, a in zip(made, arrays, strict=True)])(arrays)
    for case, a, g in zip(made, arrays, got, strict=True):
        want = case.expected(a)
        assert_back(g, oq.decode(want.codes, want.name) * want.multiplier.astype(np.float64))


@layouts
def test_dequantize_after_vmap(spec):
    """A batch of results, of batches of results, dequantised outside and inside of vmap."""
    case = Case("quantize", spec, 64, (2, 3, 5), x_dtype="float32")
    arrays = case.arrays()
    want = replace(case, spec=replace(spec, scale_layout="row")).expected(arrays)
    want = oq.decode(want.codes, want.name) * want.multiplier.astype(np.float64)
    one = lambda x: jaxnorm.quantize(x, spec)  # noqa: E731

    @jax.jit
    def program(x):
        once, twice = jax.vmap(one)(x), jax.vmap(jax.vmap(one))(x)
        rows = jax.vmap(jax.vmap(jax.vmap(one)))(x) if spec.scale_layout == "row" else once
        whole = [back(q) for q in (once, twice, rows)] + [jax.vmap(back)(once), jax.vmap(jax.vmap(back))(twice)]
        return whole, back(jax.tree.map(lambda a: a[1], once))

    whole, second = program(arrays["x"])
    for got in whole:
        assert_back(got, want)
    assert_back(second, want[1])


@pytest.mark.parametrize("batch", [(1,), (4,), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_dequantize_batched_static_scales(batch, layout):
    """One static scale for all, and one an example, batches of one included."""
    spec = QuantSpec("int8", scale_layout=layout)
    x = cases.normal(cases.rng(), (*batch, 3, 5), "float32")
    s = cases.rng(1).uniform(0.01, 0.05, batch).astype(np.float32)
    f = lambda x, s: jaxnorm.quantize(x, spec, static_scale=s)  # noqa: E731
    for _ in batch:
        f = jax.vmap(f)
    q, restored = jax.jit(lambda x, s: ((q := f(x, s)), q.dequantize()))(x, s)
    assert q.scale.shape == batch
    want = np.clip(np.rint(x / s[..., None, None]), -127, 127).astype(np.float64)
    np.testing.assert_array_equal(q.values, want)
    assert_back(restored, want * s[..., None, None].astype(np.float64))


def test_dequantize_one_row_static():
    """values [N] with a scale (), and [1, N], [N, 1]: no shape is taken for another."""
    for shape in ((4,), (1, 4), (4, 1), (1, 1), (1,)):
        x = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
        q = jaxnorm.quantize(x, QuantSpec("int8"), static_scale=np.float32(0.5))
        assert_back(back(q), x.astype(np.float64))


def test_every_nibble():
    """Element 2i is the low one; all 256 bytes, by the table of e2m1."""
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    q = Quantized(jnp.asarray(packed), jnp.full((16, 1), 128, jnp.uint8), QuantSpec("fp4", **MX))
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    value = lambda c: np.where(c & 8, -1, 1) * e2m1[c & 7]  # noqa: E731
    want = np.empty((16, 32))
    want[:, 0::2], want[:, 1::2] = value(packed & 15), value(packed >> 4)
    np.testing.assert_array_equal(back(q), 2 * want)


def test_every_code_and_exponent():
    """All finite codes of each fp8 format, and E from 1 to 254 with 2**(E - 127)."""
    for name in FP8:
        table = np.arange(256, dtype=np.uint8)
        finite = table[np.isfinite(table.view(cases.dtype(name)).astype(np.float32))]
        q = Quantized(jnp.asarray(finite.view(cases.dtype(name)))[None], jnp.full((1, 1), 0.5), QuantSpec(name))
        np.testing.assert_array_equal(back(q)[0], oq.decode(finite, name) / 2)
    e = np.arange(1, 255, dtype=np.uint8)
    ones = jnp.ones((254, 32), jnp.float8_e4m3fn)
    got = back(Quantized(ones, jnp.asarray(e)[:, None], QuantSpec(FP8[0], **MX)))
    np.testing.assert_array_equal(got[:, 0], (2.0 ** (e.astype(np.float64) - 127)).astype(np.float32))
    bad = back(Quantized(ones[:1], jnp.full((1, 1), 255, jnp.uint8), QuantSpec(FP8[0], **MX)))
    assert np.isnan(np.asarray(bad)).all()


def test_scan_carries_a_quantized():
    spec = QuantSpec("fp8", group_size=32)
    x = cases.normal(cases.rng(), (4, 3, 64), "float32")

    def body(q, x):
        new = jaxnorm.quantize(x + 0 * q.dequantize(), spec)
        return new, new

    last, every = jax.jit(lambda x: jax.lax.scan(body, jaxnorm.quantize(x[0], spec), x))(x)
    assert isinstance(every, Quantized) and every.values.shape == (4, 3, 64) and every.scale.shape == (4, 3, 2)
    assert_same(jax.tree.map(lambda a: a[-1], every), last)
    assert_same(every, jaxnorm.quantize(x, spec))


def test_vmap_and_cond_take_a_quantized():
    q, want = example(QuantSpec("int8", group_size=32), (4, 3))
    axes = Quantized(0, 0, q.spec)  # type: ignore[arg-type]
    assert_back(jax.vmap(lambda q: q.dequantize(), in_axes=(axes,))(q), want)
    chosen = jax.jit(lambda p, q: jax.lax.cond(p, lambda q: q, lambda q: jax.tree.map(jnp.zeros_like, q), q))(True, q)
    assert_same(chosen, q)


def test_donation_of_a_quantized():
    import hlo

    q, _ = example(QuantSpec("fp8", group_size=32), (64,), 128)
    f = jax.jit(lambda q: q.replace(scale=q.scale * 2), donate_argnums=0)
    compiled = f.lower(q).compile()
    assert hlo.output_aliases(compiled.as_text()) == 2
    values = np.asarray(q.values).copy()
    again = compiled(jax.tree.map(lambda a: jnp.array(a, copy=True), q))
    tolerances.assert_same_bits(again.values, values)


def test_replace_checks_nothing_away():
    q, _ = example(QuantSpec("int8"))
    other = q.replace(scale=q.scale * 2)
    assert type(other) is Quantized and other.values is q.values and other.spec is q.spec


def test_device_put_and_block_until_ready():
    q, _ = example(QuantSpec("int8"))
    assert_same(jax.block_until_ready(jax.device_put(q)), q)
