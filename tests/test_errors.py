"""The error table of the contract: the type, and a text that names op, argument, what came and what is allowed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

BF16 = jnp.bfloat16
X, W = np.ones((4, 8), np.float32), np.ones(8, np.float32)


def call(op: str, **given):
    arguments = {"x": X, "weight": W} | ({"residual": X} if op == "add_rmsnorm" else {}) | given
    positional = [arguments.pop(n) for n in ("x", "residual", "weight") if n in arguments]
    return getattr(jaxnorm, op)(*positional, **arguments)


ops = pytest.mark.parametrize("op", ["rmsnorm", "add_rmsnorm"])


def check_text(error: BaseException, op: str, argument: str, *parts: str) -> None:
    text = str(error)
    assert text.startswith(f"{op}: {argument}: got "), text
    assert ", expected " in text, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


VALUE_ERRORS = [
    ("x", {"x": np.float32(1.0)}, ["shape ()", "N"]),
    (
        "x",
        {"x": np.ones((4, 0), np.float32), "residual": np.ones((4, 0), np.float32), "weight": np.ones(0, np.float32)},
        ["(4, 0)", "N"],
    ),
    ("weight", {"weight": np.ones(9, np.float32)}, ["(9,)", "(8,)"]),
    ("weight", {"weight": np.ones((4, 8), np.float32)}, ["(4, 8)", "(8,)"]),
    ("weight", {"weight": np.ones((1, 8), np.float32)}, ["(1, 8)", "(8,)"]),
    ("weight", {"weight": np.float32(1.0)}, ["()", "(8,)"]),
    ("weight", {"weight": np.ones(1, np.float32)}, ["(1,)", "(8,)"]),
    ("weight_offset", {"weight": None, "weight_offset": 1.0}, ["1.0", "weight"]),
    ("cast", {"cast": "before"}, ["'before'", "'output'", "'before_weight'"]),
    ("backend", {"backend": "cuda"}, ["'cuda'", "'xla'", "'triton'", "'hip'"]),
    ("backend", {"backend": ""}, ["''", "'xla'"]),
    ("pad_to_multiple", {"pad_to_multiple": -8}, ["-8", "positive"]),
    ("eps", {"eps": -1e-6}, ["-1e-06", "0"]),
    ("eps", {"eps": float("nan")}, ["nan", "finite"]),
    ("weight_offset", {"weight_offset": float("inf")}, ["inf", "finite"]),
]
RESIDUAL_VALUE_ERRORS = [
    ("residual", {"residual": np.ones((5, 8), np.float32)}, ["(5, 8)", "(4, 8)", "as x"]),
    ("residual", {"residual": np.ones(8, np.float32)}, ["(8,)", "(4, 8)"]),
    ("residual", {"residual": np.ones((1, 8), np.float32)}, ["(1, 8)", "(4, 8)"]),
    ("residual_rounding", {"residual_rounding": "bfloat16"}, ["'bfloat16'", "'float32'", "'input'"]),
]
TYPE_ERRORS = [
    *[(name, {name: np.ones(shape, dtype)}, [np.dtype(dtype).name, "bfloat16", "float16", "float32"])
      for name, shape in (("x", (4, 8)), ("weight", (8,))) for dtype in (np.int32, np.int8, np.uint8, np.bool_, np.complex64)],
    ("x", {"x": np.ones((4, 8), jnp.float8_e4m3fn)}, ["float8_e4m3fn", "bfloat16"]),
    ("out_dtype", {"out_dtype": jnp.int8}, ["int8", "bfloat16", "float16", "float32"]),
    ("out_dtype", {"out_dtype": np.float64}, ["float64", "float32"]),
    ("out_dtype", {"out_dtype": "no such dtype"}, ["no such dtype", "float32"]),
    ("pad_to_multiple", {"pad_to_multiple": 2.5}, ["float", "integer"]),
    ("pad_to_multiple", {"pad_to_multiple": True}, ["bool", "integer"]),
    ("eps", {"eps": "small"}, ["str", "number"]),
    ("x", {"x": None}, ["None", "array"]),
]  # fmt: skip


def cases_of(table):
    return pytest.mark.parametrize(
        "argument, given, parts", table, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(table)]
    )


def given_for(op, given):
    return {k: v for k, v in given.items() if k != "residual" or op == "add_rmsnorm"}


@ops
@cases_of(VALUE_ERRORS)
def test_value_errors(op, argument, given, parts):
    with pytest.raises(ValueError, match=argument) as raised:
        call(op, **given_for(op, given))
    check_text(raised.value, op, argument, *parts)


@cases_of(RESIDUAL_VALUE_ERRORS)
def test_residual_value_errors(argument, given, parts):
    with pytest.raises(ValueError, match=argument) as raised:
        call("add_rmsnorm", **given)
    check_text(raised.value, "add_rmsnorm", argument, *parts)


@ops
@cases_of(TYPE_ERRORS)
def test_type_errors(op, argument, given, parts):
    with pytest.raises(TypeError, match=argument) as raised:
        call(op, **given)
    check_text(raised.value, op, argument, *parts)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_residual_type_errors(dtype):
    with pytest.raises(TypeError, match="residual") as raised:
        call("add_rmsnorm", residual=np.ones((4, 8), dtype))
    check_text(raised.value, "add_rmsnorm", "residual", np.dtype(dtype).name, "float32")


@ops
@pytest.mark.parametrize("argument", ["x", "weight", "residual"])
def test_float64_is_a_type_error(op, argument):
    """With jax_enable_x64 a float64 array stays float64: refused, for every argument, traced or not."""
    if argument == "residual" and op == "rmsnorm":
        argument = "x"
    with jax.enable_x64(True):
        wide = jnp.ones(8 if argument == "weight" else (4, 8), jnp.float64)
        for run in (lambda v: call(op, **{argument: v}), jax.jit(lambda v: call(op, **{argument: v}))):
            with pytest.raises(TypeError, match="float64") as raised:
                run(wide)
            check_text(raised.value, op, argument, "float64", "float32")


@ops
def test_errors_are_the_same_under_jit(op):
    with pytest.raises(ValueError, match="weight") as raised:
        jax.jit(lambda w: call(op, weight=w))(np.ones(9, np.float32))
    check_text(raised.value, op, "weight", "(9,)", "(8,)")


@ops
@pytest.mark.parametrize("argument", ["eps", "weight_offset"])
def test_traced_options_are_refused(op, argument):
    with pytest.raises(TypeError, match=argument) as raised:
        jax.jit(lambda e: call(op, **{argument: e}))(jnp.float32(1e-6))
    check_text(raised.value, op, argument, "number")


@ops
@pytest.mark.parametrize("backend", ["hip", "triton"])
@pytest.mark.parametrize("way", ["argument", "context", "environment"])
def test_kernel_backends_on_cpu(op, backend, way, monkeypatch):
    """Named by the argument, use_backend or the environment: UnsupportedError with reason and remedy, never another backend."""
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is no CPU")
    run = lambda **kw: jax.jit(lambda x: call(op, x=x, **kw))(X)  # noqa: E731
    with pytest.raises(jaxnorm.UnsupportedError) as raised:
        if way == "argument":
            run(backend=backend)
        elif way == "context":
            with jaxnorm.use_backend(backend):
                run()
        else:
            monkeypatch.setenv("JAXNORM_BACKEND", backend)
            run()
    text, error = str(raised.value), raised.value
    assert op in text and f"'{backend}'" in text and "cpu" in text.lower(), text
    assert error.op == op and error.device == "cpu" and error.reason and error.remedy
    assert error.reason in text and error.remedy in text and "backend=None" in error.remedy


def test_unsupported_is_neither_value_nor_type_error():
    assert not issubclass(jaxnorm.UnsupportedError, ValueError | TypeError)


def test_unknown_backend_names_elsewhere(monkeypatch):
    with pytest.raises(ValueError, match="use_backend") as raised, jaxnorm.use_backend("cuda"):
        pass
    assert all(f"'{name}'" in str(raised.value) for name in ("cuda", "xla", "triton", "hip"))
    monkeypatch.setenv("JAXNORM_BACKEND", "rocm")
    with pytest.raises(ValueError, match="JAXNORM_BACKEND") as raised:
        call("rmsnorm")
    assert all(f"'{name}'" in str(raised.value) for name in ("rocm", "xla", "triton", "hip"))


@pytest.mark.parametrize("targets", [{"rocm": "mi300"}, {"cuda": "gfx942"}, {"metal": "m3"}])
def test_unknown_targets(targets):
    with pytest.raises(ValueError, match="use_target"), jaxnorm.use_target(targets):
        pass


@ops
def test_unknown_keyword(op):
    with pytest.raises(TypeError, match="epsilon"):
        call(op, epsilon=1e-6)


@ops
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)])
def test_no_rows_give_an_empty_result(op, lead):
    x = np.zeros((*lead, 8), BF16)
    given = {"x": x, "residual": x} if op == "add_rmsnorm" else {"x": x}
    for run in (lambda: call(op, pad_to_multiple=6, **given), jax.jit(lambda: call(op, pad_to_multiple=6, **given))):
        leaves = jax.tree.leaves(run())
        assert [a.shape for a in leaves] == [(*lead, 12), (*lead, 8)][: len(leaves)]
        assert all(a.dtype == BF16 for a in leaves)


@ops
@pytest.mark.parametrize("value", [None, 0, 1, np.int64(4)])
def test_no_padding(op, value):
    assert jax.tree.leaves(call(op, pad_to_multiple=value))[0].shape == (4, 8)


def test_host_scalars_are_accepted_as_options():
    """eps and the offset as numpy scalars, as a configuration may hold them."""
    plain = jaxnorm.rmsnorm(X, W, eps=1e-5, weight_offset=1.0)
    np.testing.assert_array_equal(jaxnorm.rmsnorm(X, W, eps=np.float64(1e-5), weight_offset=np.float32(1.0)), plain)
