"""The LayerNorm family with real kernels against the oracle, on both kernel backends."""

from __future__ import annotations

from dataclasses import replace

import cases
import driver as drv
import jax
import jax.numpy as jnp
import numpy as np
import oracle_layernorm as oracle
import pytest
import tolerances
from cases_layernorm import EPS12, MODELS, NONE, Case, dtype_cases, mean_cases, option_cases, quant_case, quant_cases
from layernorm_problems import Call
from registry import ADD_LAYERNORM, with_gradients
from transforms import CHECKS

import jaxnorm
from jaxnorm import QuantSpec
from jaxnorm._compile import target

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
BF16, F16, F32 = cases.FLOATS

ODD = [Case(n, (9,), cases.FLOATS[n % 3], F32 if n % 2 else NONE, F32, F32, BF16 if n % 3 else NONE)
       for n in (1, 2, 3, 7, 31, 97, 409, 3571, 5125, 31744)]  # fmt: skip
SIZES = [
    *(replace(c, lead=(173,)) for c in MODELS.values()), Case(4096, (300,)), Case(8192, (33,), residual=None, x_bias=BF16),
    Case(2880, (33,), options={"pad_to_multiple": 256}), Case(1024, (3001,), residual=F32), Case(16384, (9,), x_bias=F32),
    Case(128, (20011,), weight=F32), Case(512, (2, 3, 5), residual=F16), Case(96, (0, 4)), Case(64, ()),
]  # fmt: skip


@backends
@pytest.mark.parametrize("case", [*dtype_cases(), *option_cases(), *ODD, *SIZES], ids=str)
def test_against_the_oracle(case, backend):
    case.check(backend)


@backends
@pytest.mark.parametrize("features", [384, 769, 4096, 65536])
def test_a_mean_far_above_the_deviation(features, backend):
    for case in mean_cases(features):
        case.check(backend)


@backends
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_constant_rows_give_the_bias(eps, backend):
    values = np.array([0.0, 0.1, -3.3, 1e4 + 0.3, 1e-30], np.float32)
    for features in (3, 384, 5125):
        b = cases.normal(cases.rng(), (features,), F32)
        x = np.repeat(values[:, None], features, 1)
        y = np.asarray(jaxnorm.layernorm(x, np.full(features, 1.5, np.float32), b, eps=eps, backend=backend))
        limit = 2.0**-20 * (1 + np.abs(b)) + 2.0**-22 * np.abs(values[:, None]) / np.sqrt(eps)
        assert (np.abs(y - b) <= limit).all()


@backends
@pytest.mark.parametrize("features", [65536, 89999, 131072])
def test_wide_rows(features, backend):
    """In the named backend, or refused by it with a remedy and served by another one."""
    case = Case(features, (3,), residual=F32, x_bias=F32, mean=20.0)
    try:
        case.check(backend, gradients=features <= cases.BACKWARD_FEATURES_MAX)
    except jaxnorm.UnsupportedError as refusal:
        assert refusal.remedy
        case.check(None, gradients=features <= cases.BACKWARD_FEATURES_MAX)


def test_the_default_uses_a_kernel():
    a = MODELS["bert"].arrays()
    choices = jaxnorm.explain(MODELS["bert"].function(), *map(jnp.asarray, a.values()))
    assert choices and all(c.backend in ("triton", "hip") for c in choices), choices


@backends
@pytest.mark.parametrize("case", [c for c in quant_cases() if c.spec.group_size != 96], ids=lambda c: c.id)
def test_quant(case, backend):
    arrays = case.arrays()
    case.check(arrays, case.run(arrays, backend))


@backends
@pytest.mark.parametrize("features", [768, 4096, 8192, 31744])
def test_quant_of_wider_rows(features, backend):
    for case in (
        quant_case(
            QuantSpec("int8"), features=features, lead=(65,), residual_dtype=BF16, x_bias_dtype=BF16, smooth=F32
        ),
        quant_case(QuantSpec("fp8", group_size=128), features=features, lead=(65,), keep=True),
    ):
        arrays = case.arrays()
        case.check(arrays, case.run(arrays, backend))


@backends
@pytest.mark.parametrize(
    "more",
    [
        {"x_dtype": F32, "weight_dtype": None},
        {"x_dtype": F32, "residual_dtype": F32, "options": {"weight_offset": 1.0}},
        {"x_dtype": F16, "options": {"cast": "before_weight"}},
    ],
    ids=str,
)
def test_quant_of_rows_far_from_zero(more, backend):
    """The maximum of a row leaves out what a tile holds behind it."""
    case = quant_case(QuantSpec("int8"), features=768, lead=(33,), **more)
    arrays = case.arrays()
    arrays["x"] = (arrays["x"] / (1 if case.x_dtype == F32 else 1000) + 300).astype(arrays["x"].dtype)
    case.check(arrays, case.run(arrays, backend))


@backends
@pytest.mark.parametrize("features", [97, 384, 1024, 2880, 4096, 8192])
def test_a_row_in_any_batch(features, backend):
    """The same rows alone and in batches of 2 to 8192: same bits, forward and dx; two runs: the sums, too."""
    largest = 8192 if features < 5000 else 1024
    case = Case(features, (largest,), residual=BF16, x_bias=F32)
    a, cts = case.arrays(), case.cotangents()
    both = jax.jit(with_gradients(case.function(backend)))

    def run(part):
        rows = tuple(v[part] if k in ("x", "residual") else v for k, v in a.items())
        results, gradients = both(rows, tuple(c[part] for c in cts))
        return [np.asarray(v) for v in (*results, gradients[0], gradients[2], gradients[3], gradients[4])]

    whole, again = run(slice(None)), run(slice(None))
    for one, other in zip(whole, again, strict=True):
        tolerances.assert_same_bits(one, other, "a second run")
    for m, start in ((1, 0), (1, largest - 1), (2, 5), (7, 64), (33, 1), (256, 700)):
        part = slice(start, start + m)
        for one, other in zip(run(part)[:3], whole[:3], strict=True):
            tolerances.assert_same_bits(one, other[part], f"M={m} from row {start}")


def test_backends_agree():
    case = Case(4096, (64,), residual=BF16, x_bias=F32)
    a = case.arrays()
    slack = case.expected(a).slack
    results = {b: [np.asarray(r) for r in jax.jit(case.function(b))(*a.values())] for b in ("xla", "triton", "hip")}
    for backend in ("triton", "hip"):
        far = tolerances.ulp_distance(results[backend][0], results["xla"][0]) > 2
        apart = np.abs(results[backend][0].astype(np.float64) - results["xla"][0].astype(np.float64)) > 2 * slack
        assert not (far & apart).any()
        tolerances.assert_same_bits(results[backend][1], results["xla"][1], backend)


@backends
@pytest.mark.parametrize("check", CHECKS)
def test_transform(check, backend):
    CHECKS[check](ADD_LAYERNORM, backend)


GUARDED = [
    Case(769, (5,), residual=None, x_bias=F32), Case(1, (3,), F16), Case(83, (7,), F32, NONE, NONE, F32, BF16),
    Case(1000, (33,), F16, weight=NONE, bias=NONE, options={"pad_to_multiple": 256}), Case(128, (131,), mean=64.0, std=8.0),
    Case(4096, (3,), residual=BF16), Case(5125, (3,), residual=F32), Case(31744, (2,), x_bias=F32), Case(384, (40,), options=EPS12),
]  # fmt: skip


@backends
@pytest.mark.parametrize("fill", [0xFF, 0xCC], ids=hex)
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_guard_bytes(case, fill, backend):
    """Kernels write their results and nothing else, and nothing they read outside of an operand reaches a result."""
    found = target.of_device(jax.devices()[0])
    assert found is not None
    call, a, device = Call(case, found), case.arrays(), drv.Driver()
    p = call.forward(a)
    call.check_forward(a, drv.run_guarded(device, backend, p, a, fill))
    operands, saved = call.saved(a)
    p = call.backward(operands)
    call.check_backward(a, operands, saved, drv.run_guarded(device, backend, p, operands, fill))


@pytest.mark.slow
@backends
@pytest.mark.parametrize("shape", cases.HUGE, ids=str)
def test_more_than_two_to_the_31_elements(shape, backend):
    """Rows around element 2^31 and 2^32 are right by the oracle."""
    rows, features = shape
    base = Case(features, (997,), residual=NONE).arrays()
    grow = jax.jit(lambda a: a[jnp.arange(rows) % 997] * (1 + (jnp.arange(rows) % 61) / 61).astype(a.dtype)[:, None])
    x = grow(jnp.asarray(base["x"]))
    y = jax.jit(lambda x, w, b: jaxnorm.layernorm(x, w, b, backend=backend))(x, base["weight"], base["bias"])
    picked = np.asarray(cases.huge_rows(rows, features))
    few = {**base, "x": np.asarray(x[picked])}
    oracle.assert_y(np.asarray(y[picked]), oracle.layernorm(few), "rows of a huge array")
