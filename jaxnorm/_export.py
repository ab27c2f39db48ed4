"""What ``jax.export`` needs to know about our custom calls."""

from __future__ import annotations

import jax


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The ``disabled_checks`` for ``jax.export.export``: our custom calls carry machine code and make no promise of stability.

    Example: ``jax.export.export(jax.jit(f), platforms=["cpu", "cuda", "rocm"], disabled_checks=jaxnorm.export_checks())(x, w)``
    """
    from jax import export

    from ._launch import JAXLIB_TARGET
    from ._native import TARGET

    return [export.DisabledSafetyCheck.custom_call(name) for name in (TARGET, JAXLIB_TARGET, "triton_kernel_call")]
