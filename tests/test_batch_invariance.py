"""Same row, same bits: alone, in any batch, at any position, sharded or not."""

from __future__ import annotations

import jax
import needs
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import OPS, with_gradients

# jnp.mean fails this at all of these N on CPU; at 4096 and 8192 it happens to agree, so larger ones prove less
BATCHES = {64: (1, 33), 97: (1, 2, 3, 7, 33, 256), 384: (1, 8), 2880: (1, 33)}
LARGEST = 1024
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def run(op, args, cts):
    results, gradients = jax.jit(with_gradients(op.function()))(args, cts)
    return [np.asarray(a) for a in (*results, *(g for g, rows in zip(gradients, op.per_row, strict=True) if rows))]


def take(op, arrays, rows):
    """Those rows of the arrays that have rows."""
    return tuple(a[rows] if a.ndim > 1 else a for a in arrays)


@ops
@pytest.mark.parametrize("features", BATCHES)
def test_a_row_in_any_batch(op, features):
    """The first rows of the largest batch alone: in batches of M = 1 to 1024, forward and dx."""
    args = op.make((LARGEST,), features)
    cts = op.cotangents(args)
    whole = run(op, args, cts)
    for m in BATCHES[features]:
        for a, b in zip(run(op, take(op, args, slice(0, m)), take(op, cts, slice(0, m))), whole, strict=True):
            tolerances.assert_same_bits(a, b[:m], f"M={m}")


@ops
def test_a_row_at_every_position(op):
    """One row stands at each of 33 positions among others, which change with every position."""
    features, m = 97, 33
    args = op.make((1,), features)
    cts = op.cotangents(args)
    alone = run(op, args, cts)
    for position in range(m):
        others = op.make((m,), features, seed=100 + position)
        other_cts = op.cotangents(others, seed=200 + position)

        def placed(mine, rest, position=position):
            rest = rest.copy()
            rest[position] = mine[0]
            return rest

        batch = tuple(placed(a, o) if a.ndim > 1 else a for a, o in zip(args, others, strict=True))
        batch_cts = tuple(placed(a, o) for a, o in zip(cts, other_cts, strict=True))
        for a, b in zip(_cached(op)(batch, batch_cts), alone, strict=True):
            tolerances.assert_same_bits(np.asarray(a)[position], b[0], f"position {position}")


_compiled: dict[str, object] = {}


def _cached(op):
    def both(args, cts):
        results, gradients = with_gradients(op.function())(args, cts)
        return (*results, *(g for g, rows in zip(gradients, op.per_row, strict=True) if rows))

    return _compiled.setdefault(op.name, jax.jit(both))


@ops
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=str)
def test_sharded_rows(op, spec):
    """Leading dims (8, 16) over eight devices, either of them: the bits of one device."""
    needs.need_devices(8)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    args = op.make((8, 16), 97)
    cts = op.cotangents(args)
    rows, vector = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    placed = tuple(jax.device_put(a, rows if r else vector) for a, r in zip(args, op.per_row, strict=True))
    for a, b in zip(run(op, placed, tuple(jax.device_put(c, rows) for c in cts)), run(op, args, cts), strict=True):
        tolerances.assert_same_bits(a, b)


@ops
def test_leading_dims_do_not_matter(op):
    """(2, 3, 5), (30,), (1, 30, 1) and the rows one by one without a leading dim."""
    args = op.make((30,), 97)
    cts = op.cotangents(args)
    flat = run(op, args, cts)
    for lead in ((2, 3, 5), (1, 30, 1)):
        shaped = [tuple(a.reshape(*lead, 97) if a.ndim > 1 else a for a in t) for t in (args, cts)]
        for a, b in zip(run(op, *shaped), flat, strict=True):
            tolerances.assert_same_bits(a.reshape(30, 97), b, str(lead))
    for i in (0, 29):
        for a, b in zip(run(op, take(op, args, i), take(op, cts, i)), flat, strict=True):
            tolerances.assert_same_bits(a, b[i], "without a leading dim")
