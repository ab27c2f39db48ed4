"""A workload of cases.py as a public call, with its oracle and its cotangents."""

from __future__ import annotations

import cases
import jax
import numpy as np
import oracle
import tolerances
from registry import with_gradients

import jaxnorm


def function(work: cases.Workload, backend: str | None = None):
    """The public call of a workload, arrays only; always a tuple."""
    options = dict(work.options, backend=backend)
    if work.residual_dtype is None:
        return lambda x, w=None: (jaxnorm.rmsnorm(x, w, **options),)
    return lambda x, r, w=None: jaxnorm.add_rmsnorm(x, r, w, **options)


def expected(work: cases.Workload, arrays) -> oracle.Forward:
    return (oracle.rmsnorm if work.residual_dtype is None else oracle.add_rmsnorm)(*arrays, **work.options)


def cotangents(work: cases.Workload, seed: int = 7) -> tuple[np.ndarray, ...]:
    """Random; NaN in the padded tail, which the op must drop."""
    g = cases.rng(seed)
    dy = cases.normal(g, (*work.shape[:-1], work.padded), work.out_dtype or work.x_dtype)
    dy[..., work.features :] = np.nan
    if work.residual_dtype is None:
        return (dy,)
    return dy, cases.normal(g, work.shape, work.residual_dtype)


def check(work: cases.Workload, backend: str | None = None, backward: bool = True) -> None:
    """Forward and backward of one workload in one program."""
    arrays = cases.arrays(work)
    present = [a for a in arrays if a is not None]
    f, cts = function(work, backend), cotangents(work)
    if backward:
        results, gradients = jax.jit(with_gradients(f))(present, cts)
    else:
        results, gradients = jax.jit(f)(*present), None
    want = expected(work, arrays)
    tolerances.assert_y(results[0], want, work.cast)
    if want.residual_out is not None:
        tolerances.assert_same_bits(results[1], want.residual_out, "residual_out")
    if gradients is None:
        return
    wanted = oracle.rmsnorm_backward(want, arrays[-1], *cts, weight_offset=work.weight_offset)
    rows = 1 if work.residual_dtype is None else 2
    for name, arg, got in zip(("dx", "dresidual"), present[:rows], gradients[:rows], strict=False):
        assert got.dtype == arg.dtype, f"{name} is {got.dtype}, expected that of its argument {arg.dtype}"
        tolerances.assert_dx(got, wanted, name)
    if work.weight_dtype is not None:
        assert gradients[-1].dtype == arrays[-1].dtype
        tolerances.assert_dweight(gradients[-1], wanted)
