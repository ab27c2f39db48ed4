"""rmsnorm and add_rmsnorm with real kernels against the oracle, on both kernel backends."""

from __future__ import annotations

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from registry import OPS, with_gradients
from test_batch_invariance import take
from workloads import check, cotangents, expected, function

import jaxnorm

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@backends
@pytest.mark.parametrize("work", [pytest.param(w, id=w.id) for w in cases.gpu_workloads()])
def test_against_the_oracle(work, backend):
    check(work, backend)


@backends
@pytest.mark.parametrize("features", [65536, 89999, 131072])
def test_wide_rows(features, backend):
    """In one launch, or refused by the named backend and served by another one that explain names."""
    work = cases.Workload("wide", features, rows=3, weight_dtype="float32").with_residual()
    backward = features <= cases.BACKWARD_FEATURES_MAX
    try:
        check(work, backend, backward=backward)
    except jaxnorm.UnsupportedError as refusal:
        check(work, None, backward=backward)
        present = [a for a in cases.arrays(work) if a is not None]
        choices = jaxnorm.explain(function(work), *present)
        assert refusal.remedy and choices and all(c.backend != backend for c in choices), choices


def test_the_default_uses_a_kernel():
    """On a GPU with both compilers something other than xla serves a fused add."""
    args = [jnp.asarray(a) for a in cases.arrays(cases.model("llama3-8b").with_residual()) if a is not None]
    assert any(c.backend in ("triton", "hip") for c in jaxnorm.explain(jaxnorm.add_rmsnorm, *args))


@backends
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_special_rows(dtype, backend):
    """Zeros, subnormals, outliers and huge values are right; NaN and Inf stay in their row, bit for bit."""
    features = 257
    x = cases.special_rows(features, dtype)
    bad = [cases.SPECIAL_ROWS.index(n) for n in ("nan", "inf")]
    good = [i for i in range(len(x)) if i not in bad]
    work = cases.Workload("special", features, rows=len(x), x_dtype=dtype, weight_dtype="float32", weight_offset=1.0)
    w, cts = cases.weight(cases.rng(2), features, "float32"), cotangents(work)
    run = jax.jit(with_gradients(function(work, backend)))
    (y,), (dx, _) = run((x, w), cts)
    tolerances.assert_y(y, expected(work, (x, w)))
    clean = x.copy()
    clean[bad] = np.ones((), x.dtype)
    (clean_y,), (clean_dx, _) = run((clean, w), cts)
    tolerances.assert_same_bits(np.asarray(y)[good], np.asarray(clean_y)[good], "y beside a bad row")
    tolerances.assert_same_bits(np.asarray(dx)[good], np.asarray(clean_dx)[good], "dx beside a bad row")


@ops
@backends
@pytest.mark.parametrize("features", [97, 128, 2880, 5120, 8192])
def test_a_row_in_any_batch(op, features, backend):
    """The same rows alone and in batches of 2 to 8192: same bits, forward and dx."""
    largest = 8192 if features < 5000 else 1024
    args = op.make((largest,), features)
    cts = op.cotangents(args)

    def run(args, cts):
        results, gradients = jax.jit(with_gradients(op.function(backend)))(args, cts)
        return [np.asarray(a) for a in (*results, *(g for g, rows in zip(gradients, op.per_row, strict=True) if rows))]

    whole = run(args, cts)
    for m, start in ((1, 0), (1, largest - 1), (2, 5), (7, 64), (33, 1), (256, 700), (1000, 3)):
        if start + m <= largest:
            part = slice(start, start + m)
            for a, b in zip(run(take(op, args, part), take(op, cts, part)), whole, strict=True):
                tolerances.assert_same_bits(a, b[part], f"M={m} from row {start}")


@ops
@backends
def test_two_runs_give_the_same_bits(op, backend):
    """dweight included: many rows, so that atomics or a race would show; and eager equals jit."""
    args = op.make((20011,), 1024)
    cts = op.cotangents(args)
    args, cts = (tuple(map(jnp.asarray, t)) for t in (args, cts))
    both = with_gradients(op.function(backend))
    run = jax.jit(both)
    first = jax.tree.leaves(run(args, cts))
    for other in (*(run(args, cts) for _ in range(5)), both(args, cts)):
        for a, b in zip(first, jax.tree.leaves(other), strict=True):
            tolerances.assert_same_bits(a, b)


@ops
def test_backends_agree(op):
    """triton, hip and xla: residual_out bitwise, y within one unit of each other (each is within one of the oracle)."""
    args = op.make((64,), 4096)
    results = {b: [np.asarray(r) for r in jax.jit(op.function(b))(*args)] for b in ("xla", "triton", "hip")}
    for backend in ("triton", "hip"):
        assert tolerances.ulp_distance(results[backend][0], results["xla"][0]).max() <= 2
        assert (tolerances.ulp_distance(results[backend][0], results["xla"][0]) > 0).mean() < 1e-3
        for a, b in zip(results[backend][1:], results["xla"][1:], strict=True):
            tolerances.assert_same_bits(a, b, backend)


@pytest.mark.slow
@ops
@backends
@pytest.mark.parametrize("shape", cases.HUGE, ids=str)
def test_more_than_two_to_the_31_elements(op, shape, backend):
    """Every row has the bits of the same row in a small batch; rows around element 2^31 and 2^32 are right by the oracle."""
    rows, features = shape
    base = op.make((997,), features, dtypes=dict.fromkeys(("x", "residual", "weight"), "bfloat16"))

    @jax.jit
    def grow(a):  # rows differ: by their index modulo 997 and by a scale modulo 61
        index = jnp.arange(rows)
        return a[index % 997] * (1 + (index % 61) / 61).astype(a.dtype)[:, None]

    args = tuple(grow(jnp.asarray(a)) if r else jnp.asarray(a) for a, r in zip(base, op.per_row, strict=True))
    f = jax.jit(op.function(backend))
    results = f(*args)
    picked = np.asarray(cases.huge_rows(rows, features))
    op.check(
        [np.asarray(a[picked]) if r else np.asarray(a) for a, r in zip(args, op.per_row, strict=True)],
        [np.asarray(r[picked]) for r in results],
    )
    chunk = 1 << 16 if features > 1000 else 1 << 20
    same = jax.jit(
        lambda a, b: jnp.array_equal(
            jax.lax.bitcast_convert_type(a, jnp.uint16), jax.lax.bitcast_convert_type(b, jnp.uint16)
        )
    )
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        for whole, alone in zip(
            results, f(*(a[part] if r else a for a, r in zip(args, op.per_row, strict=True))), strict=True
        ):
            assert same(whole[part], alone), f"rows from {start} differ from the same rows in a small batch"


@pytest.mark.slow
@backends
def test_backward_of_more_than_two_to_the_31_elements(backend):
    op = OPS[0]
    rows, features = cases.HUGE[0]
    x, w = op.make((997,), features, dtypes=dict.fromkeys(("x", "weight"), "bfloat16"))
    grow = jax.jit(lambda a: a[jnp.arange(rows) % 997])
    both = jax.jit(with_gradients(op.function(backend)))
    big = grow(jnp.asarray(x))
    _, (dx, dw) = both((big, w), (big,))
    picked = np.asarray(cases.huge_rows(rows, features))
    few = np.asarray(big[picked])
    wanted = oracle.rmsnorm_backward(op.forward(few, w), w, few, weight_offset=1.0)
    tolerances.assert_dx(np.asarray(dx[picked]), wanted)
    # dweight is a sum over equal blocks: compare with the block's own sum times the number of rows it stands for
    block = oracle.rmsnorm_backward(op.forward(x, w), w, x, weight_offset=1.0)
    whole, rest = divmod(rows, 997)
    tail = oracle.rmsnorm_backward(op.forward(x[:rest], w), w, x[:rest], weight_offset=1.0)
    total = replace(
        block,
        dweight=block.dweight * whole + tail.dweight,
        dweight_terms=block.dweight_terms * whole + tail.dweight_terms,
    )
    tolerances.assert_dweight(dw, total)
