"""What ``"fp8"`` means: the native flavour of the target that a call is traced for."""

from __future__ import annotations

import jax
import numpy as np
import oracle_quant as oq
import pytest

import jaxnorm
from jaxnorm import QuantSpec


def test_fp8_follows_use_target():
    """Taken when the op is traced; jit does not reuse a program traced for another target."""
    x = np.ones((2, 32), np.float32)
    f = jax.jit(lambda x: jaxnorm.quantize(x, QuantSpec("fp8")))
    flavours = {None: "fn", "gfx942": "fnuz", "gfx950": "fn", "gfx90a": "fn", "gfx1100": "fn", "gfx940": "fnuz"}
    for target, flavour in flavours.items():
        if target is None:
            q = f(x)
        else:
            with jaxnorm.use_target({"rocm": target}):
                q = f(x)
        name = f"float8_e4m3{flavour}"
        assert q.values.dtype.name == q.spec.dtype == name, target
        assert np.asarray(q.scale)[0, 0] == np.float32(1) / np.float32(oq.MAXIMUM[name])
    with jaxnorm.use_target({"cuda": "sm_90"}):
        assert f(x).spec.dtype == "float8_e4m3fn"
    with jaxnorm.use_target({"rocm": "gfx942"}):
        assert jaxnorm.quantize(x, QuantSpec("float8_e4m3fn")).spec.dtype == "float8_e4m3fn", "a named flavour stays"


def test_platforms_that_disagree_about_fp8():
    """One program has one result type: an error that names both flavours; a named dtype, or platforms that agree, export."""
    x = np.ones((2, 32), np.float32)

    def export(dtype, platforms):
        f = jax.jit(lambda x: jaxnorm.quantize(x, QuantSpec(dtype), backend=None))
        return jax.export.export(f, platforms=platforms, disabled_checks=jaxnorm.export_checks())(x)

    with jaxnorm.use_target({"rocm": "gfx942"}):
        for platforms in (["cpu", "rocm"], ["cuda", "rocm"]):
            with pytest.raises(ValueError, match="float8_e4m3fn") as raised:
                export("fp8", platforms)
            assert "float8_e4m3fnuz" in str(raised.value)
        assert export("fp8", ["rocm"]).out_avals[0].dtype.name == "float8_e4m3fnuz"
        assert export("float8_e4m3fn", ["cpu", "rocm"]).out_avals[0].dtype.name == "float8_e4m3fn"
    with jaxnorm.use_target({"rocm": "gfx950"}):
        assert export("fp8", ["cpu", "rocm"]).out_avals[0].dtype.name == "float8_e4m3fn"
    with pytest.raises(ValueError, match="float8_e4m3fnuz"):
        export("fp8", ["cpu", "rocm"])  # the default target of rocm is gfx942
