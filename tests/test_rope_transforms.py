"""qk_norm_rope and rope under JAX's transformations, on the CPU rule."""

from __future__ import annotations

import functools

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import tolerances
import transforms
from heads_op import QK_NORM_ROPE
from oracle_rope import BF16, F32, Case, TwoStream

import jaxnorm as jn

QUICK = (
    "vmap-1", "vmap_weights", "scan", "checkpoint", "shard_map_vma", "shard_map_novma", "grad_inside_shard_map", "wrong_out_specs",
    "donation",
)  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in transforms.CHECKS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_transform(name):
    if "shard_map" in name or name == "wrong_out_specs":
        needs.need_devices(8)
    transforms.CHECKS[name](QK_NORM_ROPE, None)


def test_vmap_of_shared_and_of_own_positions():
    """One row of positions for all examples, or one each; with a batch inside the example, too."""
    case = Case((3, 2), 16, (2, 3, 4), 8, dtypes=(BF16, F32), outside=False)
    a = jax.tree.map(jnp.asarray, case.arrays())
    want = case.call(a)
    f = lambda q, k, p: jn.rope((q, k), p, a["cos_sin"])  # noqa: E731
    g = jax.vmap(f)
    rest = a["x0"], a["x1"]
    for got in (jax.jit(g)(*rest, a["positions"]), jax.jit(jax.vmap(g))(*rest, a["positions"])):
        for one, other in zip(got, want, strict=True):
            tolerances.assert_same_bits(one, other)
    one_row = a["positions"][0, 0]
    want = f(*rest, one_row)
    for axes in ((0, 0, None), (0, 0, 0)):
        p = one_row if axes[2] is None else jnp.stack([one_row] * 2)
        for one, other in zip(jax.jit(jax.vmap(f, axes))(*rest, p), want, strict=True):
            tolerances.assert_same_bits(one, other)


def test_vmap_of_two_streams():
    case = TwoStream(2, (2, 3), (2, 1), 16, weights=(F32,) * 4)
    a = jax.tree.map(jnp.asarray, case.arrays())
    f = lambda *parts: case.call(a | dict(zip(case.PARTS, parts, strict=True)))  # noqa: E731
    parts = [a[n] for n in case.PARTS]
    q, k = jax.jit(jax.vmap(f))(*(jnp.stack([v, v * 2]) for v in parts))
    for i, scale in enumerate((1, 2)):
        for got, want in zip((q[i], k[i]), f(*(v * scale for v in parts)), strict=True):
            tolerances.assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["triton", "hip"])
def test_lowered_for_gpus_it_is_one_call(backend):
    """From a machine without a GPU: one custom call forward, one backward; positions are not repeated."""
    needs.need("launcher", jn.backends()["xla"].usable and _launcher(), "the launcher was not built")
    platform, name = ("rocm", "gfx942") if backend == "triton" else ("cuda", "sm_90")
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton: not installed")
    else:
        from jaxnorm._compile import hip

        needs.need("nvrtc", *hip.available(name)[:2])
    case = Case((4, 2), 64, (2, 8), weights=(BF16, BF16), shared=True)
    a = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in case.arrays().items()}

    def both(a):
        results, pull = jax.vjp(lambda q, k, w0, w1: case.call(a | {"x0": q, "x1": k, "w0": w0, "w1": w1}, backend),
                                *(a[n] for n in ("x0", "x1", "w0", "w1")))  # fmt: skip
        return results, pull((a["g0"], a["g1"]))

    with jn.use_target({platform: name}):
        lower = lambda f: jax.jit(f).trace(a).lower(lowering_platforms=(platform,)).as_text()  # noqa: E731
        assert hlo.launches(lower(functools.partial(case.call, backend=backend))) == 1
        assert hlo.launches(lower(both)) == 2
        (choice,) = jn.explain(functools.partial(case.call, backend=backend), a)
    assert choice.backend == backend and "qk_norm_rope" in choice.kernel


def _launcher() -> bool:
    from jaxnorm import _native

    return _native.status().ok


def test_slices_of_a_packed_projection():
    """q and k as parts of one matrix inside the program: the bits of q and k apart."""
    case = Case((4, 2), 16, (5,), weights=(BF16, BF16), outside=False)
    a = jax.tree.map(jnp.asarray, case.arrays())
    qkv = jnp.concatenate([a["x0"].reshape(5, -1), a["x1"].reshape(5, -1), jnp.ones((5, 32), jnp.bfloat16)], -1)

    def packed(qkv, a):
        return case.call(a | {"x0": qkv[:, :64].reshape(5, 4, 16), "x1": qkv[:, 64:96].reshape(5, 2, 16)})

    for one, other in zip(jax.jit(packed)(qkv, a), jax.jit(case.call)(a), strict=True):
        tolerances.assert_same_bits(one, other)
    assert np.asarray(qkv).shape == (5, 128)
