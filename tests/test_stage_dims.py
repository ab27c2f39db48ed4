"""Stages with several named dims: which of them stay sharded, what is summed over which axes. Toy stages, not an operator."""

from __future__ import annotations

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import _op
from jaxnorm._stage import STAGES, StageCall, StageDef


def _heads(call, a, axes):
    """Scaled heads of q and k, and what their scaling's gradient would be."""
    assert not axes
    sums = [jnp.sum(a[n] * a["t"][..., None, None], axis=tuple(range(a[n].ndim - 1))) for n in "qk"]
    q, k = (a[n] * a["t"][..., None, None] * a["w"] for n in "qk")
    return {"q": q, "k": k, "dq": sums[0], "dk": sums[1]}


def _channels(call, a, axes):
    """x minus the mean over the spatial dims of its channel group, and the sum over batch and space."""
    x, group = a["x"], call.option("size")
    total = jnp.sum(x.reshape(*x.shape[:-1], -1, group), axis=(-4, -3, -1))
    total = jax.lax.psum(total, axes) if axes else total
    mean = total / (call.size("s") * call.size("t") * group)
    out = x - jnp.repeat(mean, group, axis=-1)[..., None, None, :]
    return {"y": out, "dc": jnp.sum(x, axis=tuple(range(x.ndim - 1)))}


@pytest.fixture(autouse=True)
def toys():
    STAGES["toy_heads"] = StageDef("toy_heads", "toy", _heads)
    STAGES["toy_channels"] = StageDef("toy_channels", "toy", _channels)
    yield
    del STAGES["toy_heads"], STAGES["toy_channels"]


def heads(q, k, t, w):
    call = StageCall(
        stage="toy_heads", op="toy",
        operands=(("q", "... h d"), ("k", "... j d"), ("t", "..."), ("w", "d")),
        results=(("q", "... h d", "float32"), ("k", "... j d", "float32"), ("dq", "d", "float32"), ("dk", "d", "float32")),
        sizes=(("d", q.shape[-1]), ("h", q.shape[-2]), ("j", k.shape[-2])),
        sums=(("dq", "... h"), ("dk", "... j")), feature_dims=(), parallel_dims=(("h", 1), ("j", 1)),
    )  # fmt: skip
    return _op.run(call, (q, k, t, w))


def channels(x, group):
    call = StageCall(
        stage="toy_channels", op="toy", operands=(("x", "... s t c"),),
        results=(("y", "... s t c", "float32"), ("dc", "c", "float32")),
        sizes=(("c", x.shape[-1]), ("s", x.shape[-3]), ("t", x.shape[-2])), options=(("size", group),),
        sums=(("dc", "... s t"),), feature_dims=("s", "t"), parallel_dims=(("c", group),),
    )  # fmt: skip
    return _op.run(call, (x,))


def _mesh(kind):
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(kind,) * 2)


def _run(kind, f, arrays, specs):
    """(results, compiled HLO) of f on sharded arrays."""
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
        compiled = jax.jit(f).lower(*placed).compile()
        return compiled(*placed), compiled


def _random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@KINDS
@pytest.mark.parametrize("lead", [(8,), (4, 6)], ids=str)
@pytest.mark.parametrize("kv", [2, 3], ids=["kv-sharded", "kv-replicated"])
def test_heads_stay_sharded_and_sums_cross_the_right_axes(kind, lead, kv):
    arrays = _random(*lead, 4, 16), _random(*lead, kv, 16), _random(*lead), _random(16)
    rows, even = ("dp",) + (None,) * (len(lead) - 1), kv % 2 == 0
    specs = P(*rows, "tp", None), P(*rows, "tp" if even else None, None), P(*rows), P()
    out, compiled = _run(kind, heads, arrays, specs)
    q, k, t, w = (a.astype(np.float64) for a in arrays)
    want = {"q": q * t[..., None, None] * w, "k": k * t[..., None, None] * w}
    want |= {f"d{n}": (a * t[..., None, None]).reshape(-1, 16).sum(0) for n, a in (("q", q), ("k", k))}
    for name, value in want.items():
        np.testing.assert_allclose(out[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    assert set(hlo.kinds(compiled.as_text())) == {"all-reduce"}
    assert out["q"].sharding.spec[: len(lead) + 1] == (*rows, "tp")
    assert out["k"].sharding.is_equivalent_to(NamedSharding(out["k"].sharding.mesh, specs[1]), len(lead) + 2)


@KINDS
@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        (P("dp", None, None, "tp"), {"all-reduce"}),  # whole groups: only dc crosses, over dp
        (P(None, "dp", None, "tp"), {"all-reduce"}),  # space: its statistics and dc
        (P(None, "dp", "tp", None), {"all-reduce"}),
    ],
    ids=str,
)
def test_channels_in_whole_groups_and_space(kind, spec, kinds):
    x = _random(4, 8, 6, 12)
    out, compiled = _run(kind, lambda x: channels(x, 3), (x,), (spec,))
    x64 = x.astype(np.float64)
    mean = x64.reshape(4, 8, 6, 4, 3).mean((1, 2, 4))
    np.testing.assert_allclose(out["y"], x64 - np.repeat(mean, 3, -1)[:, None, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["dc"], x64.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)
    assert set(hlo.kinds(compiled.as_text())) == kinds
    assert tuple(out["y"].sharding.spec) == tuple(spec)


@KINDS
def test_a_group_that_a_shard_would_cut_is_gathered(kind):
    x = _random(4, 8, 6, 12)
    out, compiled = _run(kind, lambda x: channels(x, 4), (x,), (P(None, None, None, "tp"),))
    mean = x.reshape(4, 8, 6, 3, 4).mean((1, 2, 4))
    np.testing.assert_allclose(out["y"], x - np.repeat(mean, 4, -1)[:, None, None], rtol=1e-4, atol=1e-5)
    assert "all-gather" in set(hlo.kinds(compiled.as_text()))
