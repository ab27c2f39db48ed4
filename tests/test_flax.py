"""jaxnorm.nnx and jaxnorm.linen as drop-ins: results, dtypes, parameters, masks, axes, device axes, against a float64 formula and
against Flax's own modules."""

from __future__ import annotations

import inspect
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

fl, fn = (pytest.importorskip(f"flax.{name}", reason="needs flax: pip install flax") for name in ("linen", "nnx"))
KINDS = ("RMSNorm", "LayerNorm", "GroupNorm")
DTYPES = [  # x, parameters, dtype=
    ("bfloat16", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("float32", "float32", "bfloat16"),
    ("float16", "bfloat16", None),
    ("float32", "float16", None),
    ("bfloat16", "float32", "float16"),
]


def oracle(x, scale, bias, *, axes, features, kind="RMSNorm", eps=1e-6, groups=1, mask=None):
    """float64 of the definition, statistics over the masked positions; x and parameters float64 arrays."""
    v, m = x.astype(np.float64), np.broadcast_to(True if mask is None else mask, x.shape)
    if kind == "GroupNorm":
        shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
        v, m, axes = v.reshape(shape), m.reshape(shape), (*(a for a in axes if a != x.ndim - 1), x.ndim)
    mean = 0.0 if kind == "RMSNorm" else np.mean(v, axes, keepdims=True, where=m)
    y = ((v - mean) / np.sqrt(np.mean((v - mean) ** 2, axes, keepdims=True, where=m) + eps)).reshape(x.shape)
    shape = [x.shape[a] if a in features else 1 for a in range(x.ndim)]
    return y * np.reshape(scale, shape) + (0.0 if bias is None else np.reshape(bias, shape))


def close(got, want, dtype, what=""):
    """Within 1 unit in the last place of ``dtype`` and the error of float32 sums near zero."""
    got = np.asarray(got)
    assert got.dtype == cases.dtype(dtype), f"{what}: {got.dtype}"
    eps = float(jnp.finfo(got.dtype).eps)
    limit = eps * np.abs(want) + 2.0**-19 * (1 + np.abs(want))
    assert (np.abs(got.astype(np.float64) - want) <= limit).all(), f"{what}: {np.abs(got - want).max()}"


def filled(module, seed=0):
    """Random parameters instead of ones and zeros, the same for modules of the same shapes."""
    g = cases.rng(seed)
    for parameter in (module.scale, getattr(module, "bias", None)):
        if parameter is not None:
            parameter[...] = jnp.asarray(g.normal(1.0, 0.5, parameter.shape), parameter.dtype)
    return module


def nnx_pair(kind, *args, **options):
    return [filled(getattr(home, kind)(*args, rngs=fn.Rngs(0), **options)) for home in (fn, jn.nnx)]


def linen_pair(kind, x, **options):
    """(Flax's module, ours, variables) with random parameters."""
    theirs, ours = (getattr(home, kind)(**options) for home in (fl, jn.linen))
    variables, mine = (m.init(jax.random.key(0), x) for m in (theirs, ours))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), variables, mine)
    assert all(jax.tree.leaves(same))
    g = cases.rng(3)
    return theirs, ours, jax.tree.map(lambda a: jnp.asarray(g.normal(1.0, 0.5, a.shape), a.dtype), variables)


def inputs(dtype, *shape, mean=0.0):
    return jnp.asarray(cases.rng(7).normal(mean, 1.5, shape), dtype)


def f64(a):
    return None if a is None else np.asarray(a).astype(np.float64)


def operators(function, *args):
    return [choice.op for choice in jn.explain(function, *args)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("home", ["nnx", "linen"])
def test_constructor_takes_all_that_flax_takes(kind, home):
    theirs, ours = (getattr(m, kind) for m in ((fn, jn.nnx) if home == "nnx" else (fl, jn.linen)))
    assert issubclass(ours, theirs)
    want, got = (list(inspect.signature(c.__init__).parameters.values()) for c in (theirs, ours))
    by_name = {p.name: p for p in got}
    assert all(by_name[p.name].default == p.default for p in want if p.name not in ("parent", "name"))
    positional = [p.name for p in want if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("parent", "name")]
    assert [p.name for p in got][: len(positional)] == positional


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_results_dtypes_and_parameters(kind):
    args = (12, 3) if kind == "GroupNorm" else (12,)
    for x_dtype, param_dtype, dtype in DTYPES:
        theirs, ours = nnx_pair(kind, *args, param_dtype=param_dtype, dtype=dtype)
        x = inputs(x_dtype, 2, 5, 12)
        assert jax.tree.structure(fn.to_pure_dict(fn.state(theirs))) == jax.tree.structure(
            fn.to_pure_dict(fn.state(ours))
        )
        want = theirs(x)
        if dtype is not None:  # Flax rounds x and the parameters to it first
            x_read, param_read = x.astype(dtype), dtype
        else:
            x_read, param_read = x, want.dtype
        scale, bias = (
            f64(None if p is None else p[...].astype(param_read)) for p in (ours.scale, getattr(ours, "bias", None))
        )
        axes = (1, 2) if kind == "GroupNorm" else (2,)
        exact = oracle(f64(x_read), scale, bias, axes=axes, features=(2,), kind=kind, groups=3)
        close(ours(x), exact, want.dtype.name, f"{x_dtype} {param_dtype} {dtype}")
        assert operators(ours, x) == [kind.lower()]


@pytest.mark.parametrize("kind", KINDS)
def test_linen_results_dtypes_and_parameters(kind):
    for x_dtype, param_dtype, dtype in DTYPES:
        x = inputs(x_dtype, 2, 5, 12)
        options = {"num_groups": 3} if kind == "GroupNorm" else {}
        theirs, ours, variables = linen_pair(kind, x, param_dtype=param_dtype, dtype=dtype, **options)
        scale, bias = (f64(variables["params"].get(n)) for n in ("scale", "bias"))
        axes = (1, 2) if kind == "GroupNorm" else (2,)
        exact = oracle(f64(x), scale, bias, axes=axes, features=(2,), kind=kind, groups=3)
        close(
            ours.apply(variables, x), exact, theirs.apply(variables, x).dtype.name, f"{x_dtype} {param_dtype} {dtype}"
        )
        assert operators(ours.apply, variables, x) == [kind.lower()]


AXES = [  # kind, options, the operator that serves it or None
    ("RMSNorm", {"reduction_axes": 1, "feature_axes": 1}, None),
    ("RMSNorm", {"reduction_axes": (-1, -2), "feature_axes": (1, 2)}, "rmsnorm"),
    ("RMSNorm", {"reduction_axes": (0, 2), "feature_axes": 2}, None),
    ("RMSNorm", {"reduction_axes": (1, 2), "feature_axes": 2}, None),
    ("LayerNorm", {"reduction_axes": (1, 2), "feature_axes": (1, 2)}, "layernorm"),
    ("LayerNorm", {"reduction_axes": (1, 2), "feature_axes": 2}, "groupnorm"),
    ("LayerNorm", {"reduction_axes": 2, "feature_axes": (0, 1)}, None),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": (2,)}, "groupnorm"),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": (0, 1, 2)}, "groupnorm"),
    ("GroupNorm", {"num_groups": 3, "reduction_axes": (0, -1)}, None),
    ("GroupNorm", {"num_groups": None, "group_size": 4}, "groupnorm"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, options, operator", AXES)
def test_axes_and_masks(kind, options, operator, masked):
    """Both kinds of module; GroupNorm of NNX against linen, as flax 0.12.8's own is wrong with reduction_axes."""
    x = inputs("float32", 4, 6, 12, mean=3.0)
    mask = jnp.asarray(cases.rng(1).random((4, 6, 12 if masked else 1)) < 0.8) if masked else None
    theirs, ours, variables = linen_pair(kind, x, **options)
    got, want = (m.apply(variables, x, mask=mask) for m in (ours, theirs))
    axes = {a % 3 for a in np.atleast_1d(options.get("reduction_axes", (1, 2)))}
    features = {a % 3 for a in np.atleast_1d(options.get("feature_axes", 2))}
    scale, bias = (f64(variables["params"].get(n)) for n in ("scale", "bias"))
    exact = oracle(f64(x), scale, bias, axes=tuple(sorted(axes)), features=features, kind=kind, groups=3, mask=mask)
    close(got, exact, "float32")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # Flax's fast variance at mean 3
    used = operators(lambda x: ours.apply(variables, x, mask=mask), x)
    assert used == ([operator] if operator and not masked else [])
    count = int(np.prod([x.shape[a] for a in features]))
    module = getattr(jn.nnx, kind)(count, rngs=fn.Rngs(0), **options)
    for name in variables["params"]:
        getattr(module, name)[...] = variables["params"][name].reshape(-1)
    np.testing.assert_array_equal(module(x, mask=mask), got)


def test_float64_and_integers_take_plain_jax():
    with jax.enable_x64(True):
        x = jnp.asarray(cases.rng(0).normal(1e4, 1.0, (3, 8)))
        module = jn.nnx.LayerNorm(8, param_dtype=jnp.float64, rngs=fn.Rngs(0))
        want = oracle(np.asarray(x), np.ones(8), np.zeros(8), axes=(1,), features=(1,), kind="LayerNorm")
        assert module(x).dtype == jnp.float64
        np.testing.assert_allclose(module(x), want, rtol=1e-10, atol=1e-10)
    whole = jnp.arange(24).reshape(3, 8)
    theirs, ours = nnx_pair("RMSNorm", 8)
    assert ours(whole).dtype == theirs(whole).dtype == jnp.float32
    np.testing.assert_allclose(ours(whole), theirs(whole), rtol=1e-6)


@pytest.mark.parametrize("kind", ["RMSNorm", "GroupNorm"])  # LayerNorm has GroupNorm's code here
def test_statistics_over_a_device_axis(kind):
    """axis_name under shard_map and pmap, axis_index_groups under pmap: as Flax, and as one device with all the features."""
    args = (4, 2) if kind == "GroupNorm" else (4,)
    x = inputs("float32", 4, 3, 4, mean=2.0)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    theirs, ours = nnx_pair(kind, *args, axis_name="i")
    run = lambda m: jax.shard_map(m, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)  # noqa: E731
    np.testing.assert_allclose(run(ours), run(theirs), rtol=2e-5, atol=2e-5)
    theirs, ours = nnx_pair(kind, *args, axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
    pmapped = lambda m: jax.pmap(m, "i", devices=jax.devices()[:4])(x[:, None])  # noqa: E731
    np.testing.assert_allclose(pmapped(ours), pmapped(theirs), rtol=2e-5, atol=2e-5)


def test_variance_is_accurate_far_from_zero():
    """Flax's default, E[x^2] - mean^2, gives nonsense here."""
    x = inputs("float32", 4, 384, mean=1e4)
    want = oracle(f64(x), np.ones(384), np.zeros(384), axes=(1,), features=(1,), kind="LayerNorm")
    module = jn.nnx.LayerNorm(384, use_fast_variance=True, rngs=fn.Rngs(0))
    np.testing.assert_allclose(module(x), want, atol=1e-5)
    mask = jnp.arange(384) < 380  # plain JAX
    want = oracle(f64(x), np.ones(384), np.zeros(384), axes=(1,), features=(1,), kind="LayerNorm", mask=mask)
    np.testing.assert_allclose(module(x, mask=mask), want, atol=1e-5)


def test_weight_offset_and_cast():
    """On the operator and, with a mask, in plain JAX."""
    x = inputs("bfloat16", 5, 16)
    module = filled(jn.nnx.RMSNorm(16, weight_offset=1.0, cast="before_weight", rngs=fn.Rngs(0)))
    want = jn.rmsnorm(x, module.scale[...], weight_offset=1.0, cast="before_weight", out_dtype="float32")
    np.testing.assert_array_equal(module(x), want)
    np.testing.assert_allclose(module(x, mask=jnp.ones(16, bool)), want, rtol=2**-7)
    assert np.mean(np.asarray(module(x, mask=jnp.ones(16, bool)) == want)) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_quant(kind):
    """The codes of the unrounded y, from the operator and from plain JAX."""
    spec = jn.QuantSpec("int8")
    args = (16, 4) if kind == "GroupNorm" else (16,)
    x = inputs("bfloat16", 2, 6, 16)
    module = filled(getattr(jn.nnx, kind)(*args, quant=spec, rngs=fn.Rngs(0)))
    plain = filled(getattr(jn.nnx, kind)(*args, rngs=fn.Rngs(0)))
    variables = {
        "params": {n: getattr(module, n)[...] for n in ("scale", "bias") if getattr(module, n, None) is not None}
    }
    options = {"num_groups": 4} if kind == "GroupNorm" else {}
    linen = getattr(jn.linen, kind)(quant=spec, **options)
    want = jn.quantize(plain(x), spec)  # y is float32 here
    everywhere = jnp.ones((1, 1, 16), bool)
    for got in (module(x), module(x, mask=everywhere), linen.apply(variables, x)):
        assert isinstance(got, jn.Quantized) and got.values.shape == x.shape
        np.testing.assert_allclose(got.scale, want.scale, rtol=2e-6)
        off = np.abs(got.values.astype(np.int32) - want.values.astype(np.int32))
        assert off.max() <= 1 and (off > 0).sum() <= 2


def test_gradients_are_those_of_flax():
    x = inputs("float32", 3, 5, 12)
    for kind in KINDS:
        args = (12, 3) if kind == "GroupNorm" else (12,)
        loss = lambda m, x: jnp.sum(jnp.sin(m(x)))  # noqa: E731
        theirs, ours = (fn.jit(fn.grad(loss, argnums=(0, 1)))(m, x) for m in nnx_pair(kind, *args))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, theirs)


def test_add_rmsnorm():
    x, residual = inputs("bfloat16", 2, 5, 16), inputs("float32", 2, 5, 16)
    module = filled(jn.nnx.AddRMSNorm(16, weight_offset=0.5, rngs=fn.Rngs(0)))
    y, kept = module(x, residual)
    want = jn.add_rmsnorm(x, residual, module.scale[...], weight_offset=0.5, out_dtype="float32")
    np.testing.assert_array_equal(y, want[0])
    np.testing.assert_array_equal(kept, want[1])
    linen = jn.linen.AddRMSNorm(weight_offset=0.5, dtype=jnp.bfloat16)
    variables = linen.init(jax.random.key(0), x, residual)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (16,)}}
    y, kept = linen.apply({"params": {"scale": module.scale[...]}}, x, residual)
    assert (y.dtype, kept.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, want[0].astype(jnp.bfloat16))
    q, kept = jn.nnx.AddRMSNorm(16, quant=jn.QuantSpec("int8", group_size=8), rngs=fn.Rngs(0))(x, residual)
    assert q.scale.shape == (2, 5, 2)
    np.testing.assert_array_equal(kept, want[1])


def test_add_layernorm():
    x, residual = inputs("bfloat16", 2, 5, 16), inputs("float32", 2, 5, 16)
    x_bias = inputs("bfloat16", 16)
    module = filled(jn.nnx.AddLayerNorm(16, epsilon=1e-3, rngs=fn.Rngs(0)))
    scale, bias = module.scale[...], module.bias[...]
    y, kept = module(x, residual, x_bias=x_bias)
    want = jn.add_layernorm(x, residual, scale, bias, x_bias=x_bias, eps=1e-3, out_dtype="float32")
    np.testing.assert_array_equal(y, want[0])
    np.testing.assert_array_equal(kept, want[1])
    spec = jn.QuantSpec("float8_e4m3fn")
    linen = jn.linen.AddLayerNorm(epsilon=1e-3, quant=spec)
    variables = linen.init(jax.random.key(0), x, residual)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (16,), "bias": (16,)}}
    q, kept = linen.apply({"params": {"scale": scale, "bias": bias}}, x, residual, x_bias=x_bias)
    exact = jn.add_layernorm_quant(x, residual, scale, bias, spec, x_bias=x_bias, eps=1e-3)
    np.testing.assert_array_equal(q.dequantize(), exact[0].dequantize())
    np.testing.assert_array_equal(kept, want[1])


def test_qk_norm_rope():
    q, k = inputs("bfloat16", 2, 7, 4, 16), inputs("bfloat16", 2, 7, 1, 16)
    table, positions = jn.rope_table(32, 16), jnp.arange(7)
    module = jn.nnx.QKNormRope(16, weight_offset=1.0, style="gptj", rngs=fn.Rngs(0))
    module.q_scale[...], module.k_scale[...] = inputs("float32", 16), inputs("float32", 16) * 0.5
    scales = module.q_scale[...], module.k_scale[...]
    want = jn.qk_norm_rope(q, k, *scales, positions, table, weight_offset=1.0, style="gptj")
    for got, exact in zip(module(q, k, positions, table), want, strict=True):
        np.testing.assert_array_equal(got, exact)
    spec = jn.QuantSpec("int8")
    linen = jn.linen.QKNormRope(weight_offset=1.0, style="gptj", quant=spec)
    variables = linen.init(jax.random.key(0), q, k, positions, table)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"q_scale": (16,), "k_scale": (16,)}}
    got = linen.apply({"params": dict(zip(("q_scale", "k_scale"), scales, strict=True))}, q, k, positions, table)
    for codes, exact in zip(got, want, strict=True):
        np.testing.assert_array_equal(codes.values, jn.quantize(exact, spec).values)


def test_errors_name_the_argument():
    x = inputs("float32", 2, 6)
    for module, words in (
        (lambda: jn.nnx.RMSNorm(6, quant="int8", rngs=fn.Rngs(0)), "RMSNorm: quant: got str, expected a QuantSpec"),
        (lambda: jn.nnx.RMSNorm(6, cast="late", rngs=fn.Rngs(0)), "RMSNorm: cast: got 'late'"),
        (lambda: jn.nnx.RMSNorm(6, use_scale=False, weight_offset=1.0, rngs=fn.Rngs(0)), "RMSNorm: weight_offset"),
        (lambda: jn.nnx.AddRMSNorm(6, residual_rounding="x", rngs=fn.Rngs(0)), "AddRMSNorm: residual_rounding"),
        (lambda: jn.nnx.RMSNorm(5, rngs=fn.Rngs(0))(x), "expected 5 features, the size of scale"),
        (lambda: jn.nnx.RMSNorm(6, reduction_axes=2, feature_axes=2, rngs=fn.Rngs(0))(x), "one of the 2 axes"),
        (lambda: jn.linen.RMSNorm(quant=8).init(jax.random.key(0), x), "RMSNorm: quant: got int"),
        (lambda: jn.linen.GroupNorm(num_groups=4).init(jax.random.key(0), x), "GroupNorm: num_groups: got 4"),
        (lambda: jn.linen.GroupNorm(group_size=3).init(jax.random.key(0), x), "one of the two"),
        (lambda: jn.linen.GroupNorm(2, reduction_axes=(0,)).init(jax.random.key(0), x), "GroupNorm: reduction_axes"),
        (lambda: jn.nnx.GroupNorm(6, 4, rngs=fn.Rngs(0)), "does not divide"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            module()
        assert words in str(caught.value)


WITHOUT = """
import sys
sys.modules["flax"] = None
import jaxnorm
from jaxnorm import *
for use in (lambda: jaxnorm.nnx, lambda: jaxnorm.linen, lambda: jaxnorm.swap(3)):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_flax_the_message_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install 'jaxnorm[flax]'") == 3, done.stdout
