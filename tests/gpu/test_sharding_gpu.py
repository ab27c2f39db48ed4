"""Sharded operands over two or more GPUs with real kernels: values, collectives, shardings, bits."""

from __future__ import annotations

import hlo
import jax
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import OPS, device_arrays, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]
FEATURES = 1024
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
LAYOUTS = {
    "rows": ((64,), P("d", None), P(None)),
    "second-dim": ((3, 16), P(None, "d", None), P(None)),
    "replicated": ((4, 6), P(None, None, None), P(None)),
    "features": ((4, 6), P(None, None, "d"), P("d")),
}


@ops
@backends
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_sharding(op, layout, kind, backend):
    needs.need_devices(2)
    n = len(jax.devices())
    mesh = jax.make_mesh((n,), ("d",), axis_types=(getattr(AxisType, kind),))
    lead, spec, weight_spec = LAYOUTS[layout]
    args = op.make(lead, FEATURES)
    cts = op.cotangents(args)
    rows, vector = NamedSharding(mesh, spec), NamedSharding(mesh, weight_spec)
    f = op.function(None if layout == "features" else backend)
    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(a, rows if r else vector) for a, r in zip(args, op.per_row, strict=True))
        cotangents = tuple(jax.device_put(c, rows) for c in cts)
        forward = jax.jit(f).lower(*placed).compile()
        backward = jax.jit(lambda a, c: with_gradients(f)(a, c)[1]).lower(placed, cotangents).compile()
        results, gradients = forward(*placed), backward(placed, cotangents)
    op.check(args, [np.asarray(r) for r in results], layout)
    op.check_gradients(args, cts, [np.asarray(g) for g in gradients], layout)
    for r in (*results, gradients[0]):
        assert r.sharding.is_equivalent_to(rows, r.ndim), r.sharding
    there, back = hlo.collectives(forward.as_text()), hlo.collectives(backward.as_text())
    if layout == "features":
        m = int(np.prod(lead))
        assert {c.kind for c in there} == {"all-reduce"} == {c.kind for c in back}
        assert sum(c.bytes for c in there) <= 4 * m, there
        assert sum(c.bytes for c in back) <= 8 * m, back
        return
    assert there == []
    assert [(c.kind, c.bytes) for c in back] == ([] if layout == "replicated" else [("all-reduce", 4 * FEATURES)])
    assert hlo.launches(forward.as_text()) == 1
    alone = jax.jit(f)(*device_arrays(args))
    for a, b in zip(results, alone, strict=True):
        tolerances.assert_same_bits(a, b, "sharded against one GPU")


@ops
@backends
def test_each_gpu_by_itself(op, backend):
    """Modules are loaded on every device: the same program on each GPU, the first call included."""
    needs.need_devices(2)
    args = op.make((16,), 515)
    want = None
    for device in jax.devices():
        results = [np.asarray(r) for r in jax.jit(op.function(backend))(*(jax.device_put(a, device) for a in args))]
        op.check(args, results)
        want = want or results
        for a, b in zip(results, want, strict=True):
            tolerances.assert_same_bits(a, b, str(device))
