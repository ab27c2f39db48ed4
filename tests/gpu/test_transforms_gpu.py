"""Every op of the registry under every transformation, with real kernels; one or more GPUs."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import hlo
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import tolerances
from registry import OPS, with_gradients
from transforms import CHECKS, data

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
MESH_CHECKS = ("shard_map_vma", "shard_map_novma", "grad_inside_shard_map", "wrong_out_specs", "pmap")


@backends
@ops
@pytest.mark.parametrize("check", CHECKS)
def test_transform(op, check, backend):
    CHECKS[check](op, backend)


@pytest.mark.multigpu
@backends
@ops
@pytest.mark.parametrize("check", MESH_CHECKS)
def test_transform_on_several_gpus(op, check, backend):
    needs.need_devices(2)
    CHECKS[check](op, backend)


@backends
@ops
def test_first_call_inside_a_loop(op, backend):
    """Modules are loaded before a loop or a graph runs them: a shape that nothing compiled before, inside a scan."""
    args, _ = data(op, 5, 77, features=328)
    f = op.function(backend)
    rows = sum(op.per_row)
    scan = jax.jit(lambda *a: jax.lax.scan(lambda c, r: (c, f(*r, *a[rows:])), 0, a[:rows])[1])
    op.check(args, scan(*args))


@backends
@ops
def test_concurrent_runs(op, backend):
    """Eight threads run the same and different programs at once, each many times; nothing is mixed up."""
    sets = [data(op, 64 + 8 * (i % 3), features=512, seed=i) for i in range(8)]
    placed = [tuple(map(jnp.asarray, a)) for a, _ in sets]
    run = jax.jit(op.function(backend))

    def work(args):
        return [jax.tree.map(np.asarray, run(*args)) for _ in range(30)]

    with ThreadPoolExecutor(8) as pool:
        for (args, _), results in zip(sets, pool.map(work, placed), strict=True):
            op.check(args, results[0])
            for later in results[1:]:
                for a, b in zip(results[0], later, strict=True):
                    tolerances.assert_same_bits(a, b)


@backends
@ops
def test_second_derivative_works_or_says_why_not(op, backend):
    """Right by the xla backend, or an error that names the way out."""
    args, cts = data(op, 4, features=64)

    def norm_of_gradient(b):
        pull = lambda *a: with_gradients(op.function(b))(a, cts)[1]  # noqa: E731
        return jax.grad(lambda *a: sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in pull(*a)), len(args) - 1)

    want = jax.jit(norm_of_gradient("xla"))(*args)
    try:
        got = jax.jit(norm_of_gradient(backend))(*args)
    except Exception as e:
        assert "xla" in str(e), f"an error that does not name the way out: {e}"
    else:
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * float(np.abs(want).max()))


@backends
def test_kernels_are_one_launch(backend):
    """No copies beside the kernel: the compiled program of a forward is one custom call, for views inside a program too."""
    op = OPS[1]
    args, _ = data(op, 512, features=2048)
    text = jax.jit(op.function(backend)).lower(*args).compile().as_text()
    assert hlo.launches(text) == 1, hlo.custom_calls(text)
    assert not re.search(r"= \S+ (copy|fusion)\(", text), text
