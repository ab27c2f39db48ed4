"""Whole models: checkpoints of Flax's modules load, partitioning metadata is kept, and swap() changes a model in place."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

fl, fn = (pytest.importorskip(f"flax.{name}", reason="needs flax: pip install flax") for name in ("linen", "nnx"))
ocp = pytest.importorskip("orbax.checkpoint", reason="needs flax: it brings orbax-checkpoint")


class Block(fn.Module):
    """Norms of all kinds, one of them shared, from Flax or from jaxnorm."""

    def __init__(self, home, rngs: fn.Rngs) -> None:
        self.first = home.RMSNorm(16, rngs=rngs)
        self.project = fn.Linear(16, 16, rngs=rngs)
        self.norms = fn.List([home.LayerNorm(16, rngs=rngs), home.GroupNorm(16, 4, rngs=rngs)])
        self.again = self.norms[0]
        self.drop = fn.Dropout(0.0)

    def __call__(self, x):
        x = self.project(self.first(x))
        for norm in self.norms:
            x = x + norm(x)
        return self.again(x)


class LinenBlock(fl.Module):
    home: object

    @fl.compact
    def __call__(self, x):
        x = fl.Dense(16)(self.home.RMSNorm()(x))
        x = self.home.LayerNorm()(x)
        return self.home.GroupNorm(num_groups=4)(x) + self.home.LayerNorm(use_bias=False)(x)


def shaken(tree, seed=5):
    """The same tree with random floats."""
    g = cases.rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(g.normal(0.7, 0.3, a.shape), a.dtype), tree)


def data():
    return jnp.asarray(cases.rng(2).normal(0, 1, (2, 5, 16)), jnp.float32)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), a, b)


def test_nnx_checkpoint_of_flax_loads(tmp_path):
    theirs = Block(fn, fn.Rngs(0))
    fn.update(theirs, shaken(fn.state(theirs, fn.Param)))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", fn.state(theirs, fn.Param))
    ours = Block(jn.nnx, fn.Rngs(1))
    with ocp.StandardCheckpointer() as loader:
        fn.update(ours, loader.restore(tmp_path / "model", fn.state(ours, fn.Param)))
    close(ours(data()), theirs(data()))
    for a, b in zip(jax.tree.leaves(fn.state(ours)), jax.tree.leaves(fn.state(theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_linen_checkpoint_of_flax_loads(tmp_path):
    """Automatic names are Flax's: RMSNorm_0, LayerNorm_0, LayerNorm_1."""
    variables = shaken(LinenBlock(fl).init(jax.random.key(0), data()))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", variables)
    with ocp.StandardCheckpointer() as loader:
        restored = loader.restore(tmp_path / "model", LinenBlock(jn.linen).init(jax.random.key(1), data()))
    assert set(restored["params"]) == {"Dense_0", "RMSNorm_0", "LayerNorm_0", "LayerNorm_1", "GroupNorm_0"}
    close(LinenBlock(jn.linen).apply(restored, data()), LinenBlock(fl).apply(variables, data()))


def test_partitioning_metadata_is_kept():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    modules = {
        "RMSNorm": (8,),
        "LayerNorm": (8,),
        "GroupNorm": (8, 4),
        "AddRMSNorm": (8,),
        "AddLayerNorm": (8,),
        "QKNormRope": (8,),
    }
    with jax.set_mesh(mesh):
        for kind, args in modules.items():
            init = fn.with_partitioning(fn.initializers.ones_init(), ("model",))
            module = getattr(jn.nnx, kind)(*args, scale_init=init, rngs=fn.Rngs(0))
            specs = fn.to_pure_dict(fn.get_partition_spec(fn.state(module)))
            scales = {name: spec for name, spec in specs.items() if "scale" in name}
            assert scales and set(scales.values()) == {P("model")}, kind
    linen = {
        "RMSNorm": {},
        "LayerNorm": {},
        "GroupNorm": {"num_groups": 4},
        "AddRMSNorm": {},
        "AddLayerNorm": {},
    }
    x = jnp.ones((2, 8))
    for kind, options in linen.items():
        init = fl.with_logical_partitioning(fl.initializers.ones, ("features",))
        module = getattr(jn.linen, kind)(scale_init=init, **options)
        args = (x, x) if kind.startswith("Add") else (x,)
        variables = jax.eval_shape(module.init, jax.random.key(0), *args)
        assert fl.get_partition_spec(variables)["params"]["scale"] == P("features"), kind


def test_swap_changes_a_model_in_place_and_says_what():
    model = Block(fn, fn.Rngs(0))
    fn.update(model, shaken(fn.state(model, fn.Param)))
    want, grads = model(data()), fn.grad(lambda m: jnp.sum(jnp.sin(m(data()))))(model)
    parameters = [id(p) for _, p in fn.iter_graph(model) if isinstance(p, fn.Param)]
    found = jn.swap(model)
    assert {(s.module, s.swapped) for s in found} == {
        (f"flax.nnx.{k}", True) for k in ("RMSNorm", "LayerNorm", "GroupNorm")
    }
    assert len(found) == 3  # the shared one once
    assert "first: flax.nnx.RMSNorm -> jaxnorm.nnx.RMSNorm" in str(found).splitlines()
    assert type(model.first) is jn.nnx.RMSNorm and model.again is model.norms[0] and model.again in (model.norms[0],)
    assert [id(p) for _, p in fn.iter_graph(model) if isinstance(p, fn.Param)] == parameters
    close(model(data()), want)
    close(fn.grad(lambda m: jnp.sum(jnp.sin(m(data()))))(model), grads)
    assert sorted(c.op for c in jn.explain(model, data())) == ["groupnorm", "layernorm", "layernorm", "rmsnorm"]
    graphdef, state = fn.split(model)  # still a model like any other
    close(jax.jit(lambda s, x: fn.merge(graphdef, s)(x))(state, data()), want)
    assert jn.swap(model) == [] and str(jn.swap(model)) == "no norm layer of flax.nnx found"


def test_swap_names_what_it_leaves_and_what_changes():
    class Own(fn.RMSNorm):
        def __call__(self, x, mask=None):
            return super().__call__(x, mask) * 2

    class Model(fn.Module):
        def __init__(self, rngs):
            self.own = Own(8, rngs=rngs)
            self.wide = fn.RMSNorm(8, axis_name="i", rngs=rngs)
            self.group = fn.GroupNorm(8, 2, reduction_axes=(1, 2), rngs=rngs)
            self.batch = fn.BatchNorm(8, rngs=rngs)

    model = Model(fn.Rngs(0))
    lines = dict(str(s).split(": ", 1) for s in jn.swap(model))
    assert "left as it is (a subclass of flax.nnx.RMSNorm)" in lines["own"] and type(model.own) is Own
    assert "plain JAX" in lines["wide"] and "flax.linen.GroupNorm's" in lines["group"]
    assert set(lines) == {"own", "wide", "group"} and type(model.batch) is fn.BatchNorm
    alone = fn.RMSNorm(8, rngs=fn.Rngs(0))
    assert str(jn.swap(alone)) == ".: flax.nnx.RMSNorm -> jaxnorm.nnx.RMSNorm"
    with pytest.raises(TypeError, match="swap: model: got dict"):
        jn.swap({})
