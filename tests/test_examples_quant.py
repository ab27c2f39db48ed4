"""examples/quantized_matmul.py: its products against float64 ones of the same operands, its printed errors, its command line."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import jax
import numpy as np
import oracle_quant as oq
import pytest

import jaxnorm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "quantized_matmul.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("quantized_matmul", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restored(q) -> np.ndarray:
    """float64 value of each code by the oracle."""
    codes = oq.decode(oq.codes_of(q.values, q.spec.dtype), q.spec.dtype)
    scale = np.asarray(q.scale).astype(np.float64)
    scale = 2.0 ** (scale - 127) if q.spec.scale_dtype == "e8m0" else scale
    return codes * np.repeat(scale, codes.shape[-1] // scale.shape[-1], -1)


def test_products_are_those_of_the_dequantised_operands(example):
    g = cases.rng()
    a, w = (cases.normal(g, (m, 256), "float32", std=s) for m, s in ((5, 2.0), (7, 0.1)))
    for name, (spec, product) in example.recipes().items():
        qa, qw = jaxnorm.quantize(a, spec), jaxnorm.quantize(w, spec)
        want = restored(qa) @ restored(qw).T
        # float32 sums of 256 products; the int8 sums are exact
        limit = 2.0**-20 * (np.abs(restored(qa)) @ np.abs(restored(qw)).T)
        assert (np.abs(np.asarray(jax.jit(product)(qa, qw)) - want) <= limit).all(), name


def test_errors_are_those_of_the_formats(example):
    """By the step of each format; smoothing and groups help int8 against outlier features."""
    found = example.errors(8, 128 * 2, 16)
    assert set(found) == {*example.recipes(), "int8, per token, smoothed"}
    assert all(1e-4 < e < 0.12 for e in found.values()), found
    assert found["int8, per token, smoothed"] < found["int8, per token"], found
    assert found["int8, groups of 128"] < found["int8, per token"], found


def test_scaled_matmul_lowers_for_cuda(example):
    """The exponents are taken as float8_e8m0fnu; shapes and dtypes are what jax.nn.scaled_matmul wants."""
    spec = jaxnorm.QuantSpec("float8_e4m3fn", group_size=32, scale_dtype="e8m0")
    q = jaxnorm.quantize(np.ones((128, 128), np.float32), spec)
    text = jax.jit(example.mx_product).trace(q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "f8E8M0FNU" in text and "block_scaled_dot" in text


def test_command_line():
    command = [sys.executable, str(EXAMPLE), "--rows", "8", "--features", "128", "--outputs", "16"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("int8, per token", "int8, per token, smoothed", "fp8, per token", "mxfp8"):
        assert re.search(rf"^{name} +\d+\.\d\d%$", done.stdout, re.M), done.stdout


def test_features_that_no_group_divides(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--features", "100"])
    assert "multiple of 128" in capsys.readouterr().err
