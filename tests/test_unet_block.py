"""examples/unet_block: the block against itself with flax.linen.GroupNorm, forward and gradient, and the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
_missing = [n for n in ("flax", "typer", "rich") if not importlib.util.find_spec(n)]
if _missing:
    pytest.skip(
        f"needs flax: {', '.join(_missing)} not installed: pip install 'jaxnorm[unet]'", allow_module_level=True
    )

from typer.testing import CliRunner  # noqa: E402

import jaxnorm  # noqa: E402
from examples.unet_block import cli, comparison  # noqa: E402
from examples.unet_block.comparison import Shape  # noqa: E402
from examples.unet_block.model import ResidualBlock  # noqa: E402

SMALL = Shape(2, 6, 5, 16, 24, num_groups=4, time_features=12)


def test_float32_block_is_the_same_with_either_norm():
    """Output and every gradient; the parameters are one tree for both, and each norm is one operator."""
    params = comparison.parameters(SMALL)
    x, step, dy = comparison.inputs(SMALL, jnp.dtype("float32"))
    results = []
    for norm in ("jaxnorm", "flax"):
        block = ResidualBlock(24, 4, norm, jnp.float32)

        @jax.jit
        def both(params, x, block=block):
            y, pull = jax.vjp(lambda p, a: block.apply({"params": p}, a, step), params, x)
            return y, pull(dy)

        if norm == "jaxnorm":
            ops = [c.op for c in jaxnorm.explain(both, params, x)]
            assert ops == ["groupnorm"] * 2 + ["groupnorm backward"] * 2
        results.append(both(params, x))
    ours, theirs = results
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(np.abs(b).max()))
    assert float(np.abs(ours[1][0]["norm1"]["scale"]).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stable_diffusion_sizes(dtype):
    """bfloat16 is as close to float32 with jaxnorm's norms as with Flax's; in float32 the two agree."""
    for shape in (Shape(1, 32, 32, 640, 640), Shape(1, 16, 16, 1280, 640)):
        ours, theirs = comparison.compare(shape, jnp.dtype(dtype), times=1)
        assert (ours.norm, theirs.norm) == ("jaxnorm", "flax")
        limits = (0.02, 0.05) if dtype == "bfloat16" else (1e-5, 1e-4)
        assert ours.output_error < limits[0] and ours.gradient_error < limits[1], (ours, theirs)


def test_command_line(monkeypatch):
    """The table is what compare returns (which the tests above run), the choices are those of the real block."""
    rows = [comparison.Result("jaxnorm", 3e-3, 2e-2, 1e-3, 2e-3), comparison.Result("flax", 4e-3, 1e-2, 3e-3, 4e-3)]
    asked = []
    monkeypatch.setattr(comparison, "compare", lambda *a, **k: asked.append((a, k)) or rows)
    small = ["--batch", "1", "--height", "4", "--width", "4", "--channels", "16", "--groups", "4", "--times", "1"]
    done = CliRunner().invoke(cli.app, [*small, "--out-channels", "8", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert asked == [((Shape(1, 4, 4, 16, 8, 4), jnp.dtype("bfloat16")), {"backend": None, "times": 1})]
    assert "bfloat16, 1 x 4 x 4 x 16 -> 8" in done.output
    assert all(part in done.output for part in ("jaxnorm", "flax", "3.0e-03", "4.00 ms", "groupnorm"))
    for wrong, said in (
        (["--channels", "10"], "multiple of 4"),
        (["--backend", "cuda"], "expected one of xla, triton, hip"),
    ):
        done = CliRunner().invoke(cli.app, [*small, *wrong])
        assert done.exit_code == 1
        assert said in " ".join(done.output.split())
