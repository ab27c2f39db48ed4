"""The example scripts on small sizes: they run, and what they claim holds. Gemma, MiniLM, quantized_matmul: elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax: pip install flax")
sys.path[:0] = [str(Path(__file__).parents[1])]

from examples import flax_training, quantised_inference, quickstart, sharded_inference, swap  # noqa: E402

SMALL = ["--width", "32", "--layers", "1"]


def test_quickstart(capsys):
    quickstart.main(["--rows", "4", "--features", "256"])
    out = capsys.readouterr().out
    assert "equal: True" in out and "q [4, 8, 128], k [4, 2, 128]" in out
    assert out.count("add_rmsnorm ") == 1 and "float8_e4m3fn, one scale for groups of 128: scale [4, 2]" in out


def test_flax_training_gives_one_curve(capsys):
    """Loss falls, bfloat16 and rematerialised; Flax's norms, jaxnorm's and the fused ones stay together. Seen: 0.002 apart."""
    curves = flax_training.main(["--steps", "60", *SMALL])
    assert set(curves) == {"flax", "jaxnorm", "fused"}
    for curve in curves.values():
        assert np.isfinite(curve).all() and curve[-5:].mean() < curve[0] - 1.5
        np.testing.assert_allclose(curve, curves["flax"], atol=0.02)
    assert "curves at most" in capsys.readouterr().out


def test_quantised_inference_costs_little():
    """On the model of 60 steps; uses the program compiled above when both run."""
    found = quantised_inference.main(["--steps", "60", *SMALL])
    loss, same = found.pop("bfloat16")
    assert same == 1.0 and set(found) == {"int8", "fp8"}
    for name, (quantised, alike) in found.items():
        assert abs(quantised - loss) < 0.05 and alike > 0.8, f"{name}: {found}"


def test_sharded_inference():
    found = sharded_inference.main(["--devices", "4", "--tokens", "16", "--width", "64"])
    kinds, apart = found["tokens sharded"]
    assert kinds == [] and apart < 1e-5
    kinds, apart = found["tensor parallel"]
    assert kinds and apart < 1e-4


def test_swap(capsys):
    assert swap.main(["--width", "32"]) < 1e-4
    out = capsys.readouterr().out
    assert "stem.norm: flax.nnx.GroupNorm -> jaxnorm.nnx.GroupNorm" in out
    assert out.count("-> jaxnorm.nnx.LayerNorm") == 3 and out.count("-> jaxnorm.nnx.RMSNorm") == 2


@pytest.mark.parametrize(
    "main, arguments, words",
    [
        (quickstart.main, ["--features", "100"], "a multiple of 128"),
        (flax_training.main, ["--width", "30"], "a multiple of 4"),
        (sharded_inference.main, ["--devices", "64"], "expected at most 8"),
        (swap.main, ["--width", "30"], "a multiple of 8"),
    ],
)
def test_messages(main, arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err
