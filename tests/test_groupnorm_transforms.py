"""groupnorm under JAX's transformations, and on a mesh of 4 x 2 devices: values, bits and the collectives of compiled programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import oracle_groupnorm as oracle
import pytest
import registry
import tolerances
from cases_groupnorm import F32, Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms import CHECKS

import jaxnorm

GROUPS, SPATIAL = 4, 4


@dataclass(frozen=True)
class GroupNormOp(registry.Op):
    """Rows of ``features`` hold 4 positions of ``features / 4`` channels; leading dims are examples."""

    def make(self, lead, features, *, dtypes=registry.MIXED, seed=0):
        g = cases.rng(seed)
        channels = features // SPATIAL
        x = cases.normal(g, (*lead, features), dtypes["x"], std=1.5, mean=0.5)
        bias = cases.normal(g, (channels,), dtypes.get("bias", F32))
        return x, cases.weight(g, channels, dtypes["weight"]), bias

    def expected(self, args):
        x = np.asarray(args[0])
        return oracle.forward(x.reshape(-1, SPATIAL, x.shape[-1] // SPATIAL), *args[1:], **OPTIONS)

    def check(self, args, results, what=""):
        want = self.expected(args)
        oracle.assert_y(np.asarray(results[0]).reshape(want.shape), want, args[0].dtype.name, what)

    def check_gradients(self, args, cotangents, gradients, what=""):
        want = self.expected(args)
        folded = (np.asarray(args[0]).reshape(want.shape), *args[1:])
        got = (np.asarray(gradients[0]).reshape(want.shape), *gradients[1:])
        oracle.assert_gradients(got, folded, oracle.backward(want, np.asarray(cotangents[0]).reshape(want.shape)))


OPTIONS: dict[str, Any] = {"num_groups": GROUPS, "activation": "silu"}


def call(x, w, b, backend=None):
    image = x.reshape(*x.shape[:-1], SPATIAL, x.shape[-1] // SPATIAL)
    while image.ndim > 3:  # an op of rows: leading dims become the batch by vmap
        return jax.vmap(lambda a: call(a, w, b, backend))(x)
    if image.ndim == 2:
        image = image[None]
    return jaxnorm.groupnorm(image, w, b, backend=backend, **OPTIONS).reshape(x.shape)


OP = GroupNormOp("groupnorm", call, ("x", "weight", "bias"), (True, False, False), lambda *a: None)
# what depends on the stage; the rest of the suite runs on the GPU, and here under -m slow
QUICK = ("vmap_weights", "vmap(grad)", "scan", "shard_map_vma", "shard_map_novma", "wrong_out_specs", "named_scope")
CHECKED = [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in CHECKS if c not in QUICK)]


@pytest.mark.parametrize("check", CHECKED)
def test_transform(check):
    if "shard_map" in check or check == "wrong_out_specs":
        needs.need_devices(8)
    CHECKS[check](OP, None)


def test_export_for_another_platform():
    """Symbolic sizes are no part of it; a program for rocm holds kernels and needs no GPU to be made."""
    import jax.export

    case = Case(2, (4, 4), 32, 4, weight=F32, bias=F32)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in case.arrays()]
    f = jax.jit(lambda *a: jaxnorm.groupnorm(*a, **case.options))
    for platforms, needed in ((["cpu"], False), (["rocm"], True)):
        exported = jax.export.export(f, platforms=platforms, disabled_checks=jaxnorm.export_checks())(*args)
        text = exported.mlir_module()
        usable = any(b.startswith("jaxnorm") for b in hlo.custom_calls(text)) or "triton" in text
        assert usable or not needed or not jaxnorm.backends()["triton"].usable, text[:400]
    again = jax.export.deserialize(jax.export.export(f)(*args).serialize())
    oracle.assert_y(again.call(*map(jnp.asarray, case.arrays())), case.forward(case.arrays()), case.out_dtype)


# --- sharding


def mesh(kind: str):
    needs.need_devices(8)
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(getattr(AxisType, kind),) * 2)


def run(case: Case, kind: str, x: P, vector: P):
    """((y, gradients), text of the forward, text of both) on a mesh; values are checked."""
    m, args, dy = mesh(kind), case.arrays(), case.cotangent()

    def f(*a):
        return jaxnorm.groupnorm(*a, **case.options)

    def both(args, dy):
        y, pull = jax.vjp(f, *args)
        return y, pull(dy)

    with jax.set_mesh(m):
        place = lambda a, spec: jax.device_put(a, NamedSharding(m, spec))  # noqa: E731
        placed = (place(args[0], x), *(place(a, vector) for a in args[1:]))
        dy_placed = place(dy, x)
        forward = jax.jit(f).lower(*placed).compile().as_text()
        compiled = jax.jit(both).lower(placed, dy_placed).compile()
        y, gradients = compiled(placed, dy_placed)
    want = case.forward(args)
    oracle.assert_y(y, want, case.out_dtype)
    oracle.assert_gradients(tuple(map(np.asarray, gradients)), args, oracle.backward(want, dy))
    assert y.sharding.is_equivalent_to(NamedSharding(m, x), y.ndim), y.sharding
    return (y, gradients), forward, compiled.as_text(), args, dy


IMAGE = Case(8, (8, 6), 32, 8, weight=F32, bias=F32, silu=True)
FREE = {
    "batch": (IMAGE, P("dp"), P()),
    "groups": (IMAGE, P(None, None, None, "dp"), P("dp")),
    "batch-and-groups-first": (IMAGE.first, P("dp", "tp"), P("tp")),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "Auto") for n in FREE), ("batch", "Explicit"), ("batch-and-groups-first", "Explicit")]
)
def test_batch_and_whole_groups_cost_nothing(name, kind):
    """No collective forward; one all-reduce of both gradients backward; the bits of one device."""
    case, x, vector = FREE[name]
    (y, (dx, *_)), forward, both, args, dy = run(case, kind, x, vector)
    assert hlo.collectives(forward) == []
    found = hlo.collectives(both)
    groups_only = name == "groups"  # each device then has its channels' gradients alone
    assert [c.kind for c in found] == ([] if groups_only else ["all-reduce"]), found
    if not groups_only:
        shards = 2 if "groups" in name else 1
        assert found[0].bytes == 2 * 4 * case.channels // shards
    alone, pull = jax.vjp(jax.jit(lambda a: jaxnorm.groupnorm(a, *args[1:], **case.options)), args[0])
    tolerances.assert_same_bits(y, alone, "y against one device")
    tolerances.assert_same_bits(dx, pull(dy)[0], "dx against one device")


@pytest.mark.parametrize(
    ("case", "x", "kind"),
    [
        (IMAGE.first, P("tp", None, "dp"), "Explicit"),
        (replace(IMAGE, x=F32, mean=1e4, std=1.0), P(None, "dp", "tp"), "Auto"),
    ],
    ids=str,
)
def test_of_sharded_positions_only_statistics_are_reduced(case, x, kind):
    _, forward, both, *_ = run(case, kind, x, P())
    found = hlo.collectives(forward)
    statistics = 3 * 4 * case.batch * case.groups
    assert {c.kind for c in found} == {"all-reduce"}, found
    assert sum(c.bytes for c in found) <= statistics, found
    assert {c.kind for c in hlo.collectives(both)} == {"all-reduce"}
    assert sum(c.bytes for c in hlo.collectives(both)) <= 2 * statistics + 2 * 4 * case.channels


def test_channels_that_split_groups_are_gathered():
    """Right, whatever it costs."""
    case = Case(8, (4,), 12, 2, weight=F32, bias=F32)
    m, args = mesh("Auto"), case.arrays()
    placed = [jax.device_put(a, NamedSharding(m, P(*[None] * (a.ndim - 1), "dp"))) for a in args]
    y = jax.jit(lambda *a: jaxnorm.groupnorm(*a, **case.options))(*placed)
    oracle.assert_y(y, case.forward(args), case.out_dtype)
