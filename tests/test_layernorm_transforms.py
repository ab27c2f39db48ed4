"""add_layernorm with every operand under transformations and on meshes: what differs from rmsnorm, whose suites are complete."""

from __future__ import annotations

import hlo
import jax
import numpy as np
import pytest
import test_sharding as sharding
import tolerances
import transforms
from jax.sharding import PartitionSpec as P
from registry import ADD_LAYERNORM, device_arrays, with_gradients


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
