"""Guard bytes: kernels write their results and nothing else, and nothing they read outside of an operand reaches a result."""

from __future__ import annotations

import cases
import numpy as np
import oracle
import pytest
import tolerances
from driver import Driver, run_guarded
from jaxnorm.kernels.configs import Problem

import jaxnorm

pytestmark = pytest.mark.gpu
FILLS = (0xFF, 0xCC)  # NaN in every float format; a finite pattern
CASES = [
    # M, N, padded, x, residual, weight
    (5, 769, 769, "bfloat16", "bfloat16", "bfloat16"),
    (3, 1, 1, "float16", None, "float32"),
    (7, 83, 96, "bfloat16", "float32", "float32"),
    (33, 1000, 1024, "float16", None, None),
    (4, 127, 127, "float32", "bfloat16", "float16"),
    (9, 2880, 3072, "bfloat16", None, "bfloat16"),
    (2, 4096, 4096, "bfloat16", "bfloat16", "float32"),
    (131, 128, 128, "bfloat16", None, "bfloat16"),
    (3, 5125, 5125, "bfloat16", "float32", None),
    (2, 31744, 31744, "bfloat16", "bfloat16", "bfloat16"),
]


@pytest.fixture(scope="module")
def driver():
    return Driver()


def _target() -> str:
    import jax

    from jaxnorm._compile import target

    found = target.of_device(jax.devices()[0])
    assert found is not None
    return found


def _problem(stage, rows, features, operands, results, options) -> Problem:
    shapes = [(k, v.shape) for k, v in operands.items()] + [(k, s) for k, s, _ in results]
    dtypes = [(k, v.dtype.name) for k, v in operands.items()] + [(k, d) for k, _, d in results]
    return Problem(stage, rows, features, tuple(shapes), tuple(dtypes), tuple(options.items()), _target())


@pytest.mark.parametrize("backend", ["triton", "hip"])
@pytest.mark.parametrize("fill", FILLS, ids=hex)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_guard_bytes(case, fill, backend, driver):
    rows, features, padded, x_dtype, residual_dtype, weight_dtype = case
    work = cases.Workload("guard", features, rows=rows, x_dtype=x_dtype, weight_dtype=weight_dtype, residual_dtype=residual_dtype,
                          pad_to_multiple=padded if padded != features else None)  # fmt: skip
    arrays = cases.arrays(work)
    operands = {"x": arrays[0], "residual": arrays[1] if residual_dtype else None, "weight": arrays[-1]}
    operands = {k: v for k, v in operands.items() if v is not None}
    results = [("y", (rows, padded), x_dtype)]
    results += [("residual_out", (rows, features), residual_dtype)] if residual_dtype else []
    results += [("rstd", (rows,), "float32")]
    options = {"eps": 1e-6, "weight_offset": 0.0, "cast": "output", "residual_rounding": "float32"}
    try:
        got = run_guarded(
            driver, backend, _problem("rmsnorm_fwd", rows, features, operands, results, options), operands, fill
        )
    except jaxnorm.UnsupportedError as e:
        pytest.fail(f"a shape that every backend must serve: {e}")
    want = (oracle.add_rmsnorm if residual_dtype else oracle.rmsnorm)(*arrays, **work.options)
    tolerances.assert_y(got["y"], want)
    np.testing.assert_allclose(got["rstd"], want.rstd[:, 0], rtol=2.0**-20)
    if residual_dtype:
        tolerances.assert_same_bits(got["residual_out"], want.residual_out)

    g = cases.rng(4)
    dy = cases.normal(g, (rows, padded), x_dtype)
    saved = {
        "n": want.residual_out if residual_dtype else arrays[0],
        "weight": arrays[-1],
        "rstd": want.rstd[:, 0].astype(np.float32),
        "dy": dy,
        "dresidual_out": cases.normal(g, (rows, features), residual_dtype) if residual_dtype else None,
    }
    saved = {k: v for k, v in saved.items() if v is not None}
    results = [("dx", (rows, features), x_dtype)]
    results += [("dresidual", (rows, features), residual_dtype)] if residual_dtype not in (None, x_dtype) else []
    results += [("dweight", (features,), "float32")] if weight_dtype else []
    problem = _problem("rmsnorm_bwd", rows, features, saved, results, {"weight_offset": 0.0})
    got = run_guarded(driver, backend, problem, saved, fill)
    backward = oracle.rmsnorm_backward(want, arrays[-1], dy, saved.get("dresidual_out"))
    tolerances.assert_dx(got["dx"], backward)
    if "dresidual" in got:
        tolerances.assert_dx(got["dresidual"], backward, "dresidual")
    if weight_dtype:
        tolerances.assert_dweight(got["dweight"], backward)
