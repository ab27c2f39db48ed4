"""The error table of the contract for the quantising ops: the type, and a text that names op, argument, got and expected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import QuantSpec

X, W = np.ones((4, 64), np.float32), np.ones(64, np.float32)
INT8, GROUPS = QuantSpec("int8"), QuantSpec("int8", group_size=32)
MX = QuantSpec("fp8", group_size=32, scale_dtype="e8m0")
NAMES = ("quantize", "rmsnorm_quant", "add_rmsnorm_quant")
ops = pytest.mark.parametrize("op", NAMES)
norms = pytest.mark.parametrize("op", NAMES[1:])


def call(op: str, **given):
    arguments = {"x": X, "residual": X, "weight": W, "spec": INT8} | given
    order = {"quantize": ("x", "spec"), "rmsnorm_quant": ("x", "weight", "spec")}
    positional = [arguments.pop(n) for n in order.get(op, ("x", "residual", "weight", "spec"))]
    for unused in ("residual", "weight"):
        arguments.pop(unused, None)
    return getattr(jaxnorm, op)(*positional, **arguments)


def check_text(error: BaseException, op: str, argument: str, *parts: str) -> None:
    text = str(error)
    assert text.startswith(f"{op}: {argument}: got "), text
    assert ", expected " in text, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def cases_of(table):
    return pytest.mark.parametrize(
        "argument, given, parts", table, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(table)]
    )


VALUE_ERRORS = [
    ("x", {"x": np.float32(1)}, ["shape ()", "N"]),
    ("smooth_scale", {"smooth_scale": np.ones(63, np.float32)}, ["(63,)", "(64,)"]),
    ("smooth_scale", {"smooth_scale": np.ones((4, 64), np.float32)}, ["(4, 64)", "(64,)"]),
    ("smooth_scale", {"smooth_scale": np.float32(1)}, ["()", "(64,)"]),
    ("static_scale", {"static_scale": np.ones(2, np.float32)}, ["(2,)", "()", "(1,)"]),
    ("static_scale", {"static_scale": np.ones((1, 1), np.float32)}, ["(1, 1)"]),
    ("static_scale", {"static_scale": np.float32(1), "spec": GROUPS}, ["group_size=32", "None"]),
    ("static_scale", {"static_scale": np.float32(1), "spec": MX}, ["e8m0", "float32"]),
    ("spec.group_size", {"spec": QuantSpec("int8", group_size=48)}, ["48", "divisor", "64", "32"]),
    ("spec.group_size", {"spec": QuantSpec("int8", group_size=128)}, ["128", "N=64"]),
    ("spec.group_size", {"x": np.ones((4, 50), np.float32), "weight": None, "spec": GROUPS}, ["32", "N=50", "pad_to_multiple"]),
    ("backend", {"backend": "cuda"}, ["'cuda'", "'xla'", "'triton'", "'hip'"]),
]  # fmt: skip
NORM_VALUE_ERRORS = [
    ("weight", {"weight": np.ones(63, np.float32)}, ["(63,)", "(64,)"]),
    ("weight_offset", {"weight": None, "weight_offset": 1.0}, ["1.0", "weight"]),
    ("cast", {"cast": "before"}, ["'before'", "'output'", "'before_weight'"]),
    ("eps", {"eps": -1.0}, ["-1.0"]),
    ("pad_to_multiple", {"pad_to_multiple": -8}, ["-8"]),
    ("spec.group_size", {"spec": GROUPS, "pad_to_multiple": 80}, ["32", "N=80"]),
    ("out_dtype", {"out_dtype": "float32"}, ["float32", "keep_unquantized"]),
]
TYPE_ERRORS = [
    *(("x", {"x": np.ones((4, 64), t)}, [np.dtype(t).name, "bfloat16", "float32"])
      for t in (np.int32, np.int8, np.complex64, jnp.float8_e4m3fn)),
    ("x", {"x": None}, ["None", "array"]),
    ("spec", {"spec": "int8"}, ["str", "QuantSpec"]),
    ("spec", {"spec": None}, ["NoneType", "QuantSpec"]),
    ("spec", {"spec": jnp.int8}, ["QuantSpec"]),
    ("smooth_scale", {"smooth_scale": np.ones(64, np.int32)}, ["int32", "float32"]),
    ("static_scale", {"static_scale": np.int32(1)}, ["int32", "float32"]),
]  # fmt: skip
NORM_TYPE_ERRORS = [
    ("weight", {"weight": np.ones(64, np.int32)}, ["int32", "float32"]),
    ("out_dtype", {"out_dtype": jnp.int8, "keep_unquantized": True}, ["int8", "bfloat16"]),
    ("keep_unquantized", {"keep_unquantized": 1}, ["int", "bool"]),
    ("eps", {"eps": "small"}, ["str", "number"]),
]


@ops
@cases_of(VALUE_ERRORS)
def test_value_errors(op, argument, given, parts):
    if "weight" in given and given["weight"] is None:
        given = given | {"residual": given["x"]}
    if argument == "x" and op == "add_rmsnorm_quant":
        given = given | {"residual": given["x"]}
    with pytest.raises(ValueError, match=argument) as raised:
        call(op, **given)
    check_text(raised.value, op, argument, *parts)


@norms
@cases_of(NORM_VALUE_ERRORS)
def test_norm_value_errors(op, argument, given, parts):
    with pytest.raises(ValueError, match=argument) as raised:
        call(op, **given)
    check_text(raised.value, op, argument, *parts)


@ops
@cases_of(TYPE_ERRORS)
def test_type_errors(op, argument, given, parts):
    with pytest.raises(TypeError, match=argument) as raised:
        call(op, **given)
    check_text(raised.value, op, argument, *parts)


@norms
@cases_of(NORM_TYPE_ERRORS)
def test_norm_type_errors(op, argument, given, parts):
    with pytest.raises(TypeError, match=argument) as raised:
        call(op, **given)
    check_text(raised.value, op, argument, *parts)


@pytest.mark.parametrize("residual, error", [
    (np.ones((5, 64), np.float32), ValueError), (np.ones((4, 64), np.int32), TypeError), (None, TypeError),
])  # fmt: skip
def test_residual_errors(residual, error):
    with pytest.raises(error, match="residual") as raised:
        call("add_rmsnorm_quant", residual=residual)
    assert str(raised.value).startswith("add_rmsnorm_quant: residual: got ")
    with pytest.raises(ValueError, match="residual_rounding") as raised:
        call("add_rmsnorm_quant", residual_rounding="bf16")
    check_text(raised.value, "add_rmsnorm_quant", "residual_rounding", "'bf16'", "'float32'", "'input'")


@ops
@pytest.mark.parametrize("argument", ["x", "smooth_scale", "static_scale"])
def test_float64_is_a_type_error(op, argument):
    with jax.enable_x64(True):
        wide = jnp.ones({"x": (4, 64), "smooth_scale": 64}.get(argument, ()), jnp.float64)
        with pytest.raises(TypeError, match="float64") as raised:
            jax.jit(lambda v: call(op, **{argument: v}))(wide)
        check_text(raised.value, op, argument, "float64", "float32")


@ops
def test_errors_are_the_same_under_jit(op):
    with pytest.raises(ValueError, match="group_size") as raised:
        jax.jit(lambda x: call(op, x=x, spec=QuantSpec("int8", group_size=48)))(X)
    check_text(raised.value, op, "spec.group_size", "48", "divisor of N=64")


@ops
@pytest.mark.parametrize("backend", ["hip", "triton"])
def test_kernel_backends_on_cpu(op, backend):
    """UnsupportedError with reason and remedy, never another backend."""
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is no CPU")
    with pytest.raises(jaxnorm.UnsupportedError) as raised:
        jax.jit(lambda x: call(op, x=x, backend=backend))(X)
    error = raised.value
    assert op in str(error) and f"'{backend}'" in str(error) and error.op == op and error.reason and error.remedy


@ops
def test_unknown_keyword(op):
    with pytest.raises(TypeError, match="epsilon"):
        call(op, epsilon=1e-6)


def test_python_scalars_are_accepted():
    """A static scale as a float of a configuration."""
    a = jaxnorm.quantize(X, INT8, static_scale=0.5)
    b = jaxnorm.quantize(X, INT8, static_scale=jnp.float32(0.5))
    assert a.scale.dtype == jnp.float32 and a.scale.shape == ()
    np.testing.assert_array_equal(a.values, b.values)
