"""What a reader who did not write the code found: each stays found."""

from __future__ import annotations

import types

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import _dispatch
from jaxnorm._compile import target


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_vmap_over_a_sharded_batch_gathers_nothing(kind: AxisType) -> None:
    """One weight an example, and one gradient of the weight an example: rows cannot be folded, nor looped over a sharded batch."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    x = jax.random.normal(jax.random.key(0), (8, 2, 16))
    w = 1 + 0.1 * jax.random.normal(jax.random.key(1), (8, 16))

    def gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(jn.rmsnorm(x, w) ** 2))(w)

    with jax.set_mesh(mesh):
        xs = jax.device_put(x, NamedSharding(mesh, P("a", None, None)))
        ws = jax.device_put(w, NamedSharding(mesh, P("a", None)))
        one = jax.device_put(w[0], NamedSharding(mesh, P(None)))
        forward = jax.jit(jax.vmap(jn.rmsnorm)).lower(xs, ws).compile()
        backward = jax.jit(jax.vmap(gradient, (None, 0))).lower(one, xs).compile()
        y, g = forward(xs, ws), backward(one, xs)
    assert hlo.collectives(forward.as_text()) == [] and hlo.collectives(backward.as_text()) == []
    np.testing.assert_allclose(y, np.stack([jn.rmsnorm(a, b) for a, b in zip(x, w, strict=True)]), rtol=1e-6)
    np.testing.assert_allclose(g, np.stack([gradient(w[0], a) for a in x]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_on_no_mesh_under_set_mesh(kind: AxisType) -> None:
    """jax names no mesh then, and gives a custom_partitioning tiles of devices; a constraint inside still shards."""
    devices = [jax.devices()[i] for i in (3, 1, 2, 0, 7, 6, 5, 4)]
    mesh = Mesh(np.array(devices).reshape(4, 2), ("a", "b"), axis_types=(kind,) * 2)
    constrain = jax.lax.with_sharding_constraint if kind is AxisType.Auto else jax.sharding.reshard
    x, w = jax.random.normal(jax.random.key(0), (16, 4, 8)), jnp.linspace(1, 2, 8)

    def constrained(spec: P, x: jax.Array, w: jax.Array) -> jax.Array:
        return jn.layernorm(constrain(x, spec), w, w)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        codes = jn.quantize(x, jn.QuantSpec("int8"), static_scale=0.1).values
        return jnp.sum(jn.rmsnorm(x, w) ** 3) + jnp.sum(codes)

    y, value = jn.layernorm(x, w, w), jax.value_and_grad(loss, 1)(x, w)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jn.layernorm(x, w, w), y)
        for got, want in zip(jax.jit(jax.value_and_grad(loss, 1))(x, w), value, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
        for spec in (P(("b", "a"), None, None), P(None, "a", "b")):
            compiled = jax.jit(constrained, static_argnums=0).lower(spec, x, w).compile()
            got = compiled(x, w)
            np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
            assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
            kinds = [c.kind for c in hlo.collectives(compiled.as_text())]
            assert kinds == (["all-reduce"] * 2 if spec[2] else [])


def test_rocm_is_rocm_although_jax_says_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(platform="gpu", compute_capability="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert target.default_platform() == "rocm"
    assert target.of_device(device) == "gfx942"


def test_the_one_who_named_the_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with jn.use_backend("hip"), pytest.raises(jn.UnsupportedError, match="named by use_backend"):
        jn.rmsnorm(jnp.ones((2, 8)), None)
    monkeypatch.setenv("JAXNORM_BACKEND", "triton")
    with pytest.raises(jn.UnsupportedError, match="named by JAXNORM_BACKEND"):
        jn.rmsnorm(jnp.ones((2, 8)), None)


@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan")])
def test_numbers_beyond_float32(value: float) -> None:
    with pytest.raises(ValueError, match=r"rmsnorm: eps: got .*within float32"):
        jn.rmsnorm(jnp.ones((2, 8)), None, eps=value)


def test_symbolic_row_counts_go_to_xla() -> None:
    """A plan is for a number of rows; a program for any number is the reference."""
    (rows,) = jax.export.symbolic_shape("m,")
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda x: jn.rmsnorm(x, None)), platforms=["cpu", "cuda"], disabled_checks=jn.export_checks()
    )(x)
    assert "jaxnorm_launch" not in exported.mlir_module()
    ones = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(exported.call(ones), ones, rtol=1e-5)


def test_sub_architectures_are_refused_at_entry() -> None:
    with pytest.raises(ValueError, match="use_target"):
        jn.use_target({"cuda": "sm_90a"})


def test_a_backend_that_has_no_kernel_is_no_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAXNORM_REQUIRE asks for what can be installed; a group size that no kernel takes still goes to xla."""
    monkeypatch.setattr(_dispatch, "compiler", lambda backend, target: (True, "", ""))
    monkeypatch.setattr(_dispatch._launch, "road", lambda backend, platform: ("launcher", ""))
    monkeypatch.setenv("JAXNORM_REQUIRE", "hip,triton,launcher")
    x = jax.ShapeDtypeStruct((4, 384), jnp.float32)
    with jn.use_target({"cuda": "sm_90"}):
        (choice,) = jn.explain(lambda x: jn.quantize(x, jn.QuantSpec("int8", group_size=96)), x)
    assert choice.backend == "xla" and {name for name, _ in choice.rejected} == {"hip", "triton"}


def test_rank_promotion_may_be_forbidden() -> None:
    """The references broadcast vectors over rows; a program that forbids that to itself does not forbid it to them."""
    x, w = np.ones((2, 3, 8), np.float32), np.ones(8, np.float32)

    def all_of_them(x: jax.Array) -> object:
        norm = lambda x: jnp.sum(jn.add_layernorm(x, x, w, w, x_bias=w)[0])  # noqa: E731
        quantised = jn.layernorm_quant(x, w, w, jn.QuantSpec("int8", group_size=4), smooth_scale=w)
        heads = jn.qk_norm_rope(x[None], x[None], w, w, np.arange(2), jn.rope_table(4, 8))
        return jax.grad(norm)(x), quantised, jn.groupnorm(x, w, w, num_groups=2, activation="silu"), heads

    with jax.numpy_rank_promotion("raise"):
        jax.jit(all_of_them).lower(x)


def test_a_python_float_has_no_width() -> None:
    x = np.ones((2, 8), np.float32)
    with jax.enable_x64(True):
        q = jn.layernorm_quant(x, None, None, jn.QuantSpec("int8"), static_scale=0.5)
        assert q.scale.dtype == jnp.float32
        with pytest.raises(TypeError, match="static_scale: got dtype float64"):
            jn.layernorm_quant(x, None, None, jn.QuantSpec("int8"), static_scale=np.float64(0.5))


@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        ("m, n", lambda x: jn.layernorm(x, None, None)),
        ("m, n", lambda x: jn.rmsnorm_quant(x, None, jn.QuantSpec("int8"))),
        ("b, h, 8", lambda x: jn.groupnorm(x, None, None, num_groups=2)),
    ],
)
def test_symbolic_sizes_of_a_sum_are_named(shape: str, norm) -> None:
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(ValueError, match=r"x: got shape \(.*\), expected known sizes but for the leading dims"):
        jax.export.export(jax.jit(norm))(x)
