"""add_layernorm with every operand under transformations and on meshes: what differs from rmsnorm, whose suites are complete."""

from __future__ import annotations

import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharding as sharding
import tolerances
import transforms
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from registry import ADD_LAYERNORM, device_arrays, with_gradients

import jaxnorm


@pytest.mark.parametrize("name", ["vmap-1", "vmap_weights", "shard_map_novma", "donation"])
def test_transform(name):
    transforms.CHECKS[name](ADD_LAYERNORM, None)


def test_rows_sharded():
    """No collective forward; the gradients of three vectors in one all-reduce; the bits of one device."""
    layout = sharding.Layout("3d-dp-tp", (8, 6), P("dp", "tp", None))
    forward, backward, results, gradients, args, cts = sharding.run(ADD_LAYERNORM, layout, "Explicit")
    assert hlo.collectives(forward) == []
    (reduce,) = hlo.collectives(backward)
    assert (reduce.kind, reduce.bytes) == ("all-reduce", 3 * 4 * sharding.FEATURES)
    sharding.assert_shardings(ADD_LAYERNORM, layout, "Explicit", results, gradients)
    alone, alone_gradients = jax.jit(with_gradients(ADD_LAYERNORM.function()))(device_arrays(args), device_arrays(cts))
    for a, b in zip((*results, *gradients[:2]), (*alone, *alone_gradients[:2]), strict=True):
        tolerances.assert_same_bits(a, b, "sharded against not")


def test_shares_of_a_narrow_gradient_are_added_up_in_float32():
    """Rounded once, behind the sum over the devices. Read from the program: XLA's CPU would leave out a rounding before it."""
    mesh = sharding.make_mesh("Explicit")
    x = jax.device_put(jnp.ones((8, 16), "bfloat16"), NamedSharding(mesh, P("dp")))
    bias = jax.device_put(jnp.zeros(16, "bfloat16"), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(lambda b: jaxnorm.layernorm(x, None, b, out_dtype="float32").sum()))(bias)
    assert re.findall(r":(\w+)\[16\]\S* = psum", str(program)) == ["f32"], program


def test_features_sharded():
    """Sums of the statistics and no row crosses the wire."""
    layout = sharding.Layout("rows-dp-features-tp", (8, 6), P("dp", None, "tp"), P("tp"))
    forward, backward, results, gradients, *_ = sharding.run(ADD_LAYERNORM, layout, "Auto")
    rows = layout.rows_on_a_device
    for text, most in ((forward, 3 * 4 * rows), (backward, 5 * 4 * rows + 3 * 4 * sharding.FEATURES)):
        found = hlo.collectives(text)
        assert {c.kind for c in found} == {"all-reduce"}
        assert sum(c.bytes for c in found) <= most
    sharding.assert_shardings(ADD_LAYERNORM, layout, "Auto", results, gradients)
    assert np.asarray(results[0]).shape == (8, 6, sharding.FEATURES)
