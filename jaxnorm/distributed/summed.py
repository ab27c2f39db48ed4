"""The local norm on the partial sums of all ranks, as one kernel: x [W, M, N] as a gather or an exchange left it.

The stages are those of the ordinary ops with ``parts=W``: x stands for its float32 sum in rank order, and the bits are those of the
op on that sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from .. import _context, _dispatch, _launch, _op
from .._api import layernorm, layernorm_quant, quant, rmsnorm
from .._compile import target
from .._stage import Arrays, StageCall
from .._types import QuantSpec
from ..errors import UnsupportedError
from ._config import Config

ORDER = ("x", "residual", "weight", "bias")
PLAIN = {"rmsnorm": rmsnorm.FORWARD, "layernorm": layernorm.FORWARD}
QUANTISING = {"rmsnorm": quant.RMSNORM_QUANT, "layernorm": layernorm_quant.LAYERNORM_QUANT}


def apart() -> Any:
    """Context manager: the sum is XLA's, for what wants the stages of a norm on the sum, and for tests and measurements."""
    return _context.sum_apart(True)


def serves(config: Config, arrays: Arrays, rows: int, spec: QuantSpec | None) -> bool:
    """Whether a kernel does it on every platform that is traced for; else the sum is XLA's, and the norm whatever serves that.

    ``arrays``: of the whole call; the kernel has ``rows`` rows.
    """
    if _context.sum_apart.value:
        return False
    avals = operands(config, {k: a.dtype for k, a in arrays.items()}, rows)
    call = stage_call(config, avals, spec)
    if call.backend not in (None, "hip"):
        return False
    return all(_kernel(call, list(avals.values()), t) for t in target.in_force(target.named()))


def operands(config: Config, dtypes: Mapping[str, Any], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the stage reads of a call whose operands have these dtypes, in ORDER."""
    shapes = {"x": (config.ranks, rows, config.features), "residual": (rows, config.features)}
    return {k: jax.ShapeDtypeStruct(shapes.get(k, (config.features,)), dtypes[k]) for k in ORDER if k in dtypes}


def row_layout(spec: QuantSpec | None) -> QuantSpec | None:
    """As a rank quantises its own rows: the scales of all are laid out once they are gathered."""
    return None if spec is None else replace(spec, scale_layout="row")


def _kernel(call: StageCall, avals: list[Any], t: str) -> bool:
    if t == "cpu":
        return False
    platform = "rocm" if t.startswith("gfx") else "cuda"
    try:
        return _dispatch.backend_of(call, _launch.problem(call, avals, t), platform) != "xla"
    except UnsupportedError:
        return False


def stage_call(config: Config, arrays: Any, spec: QuantSpec | None) -> StageCall:
    """The stage on x [W, M, N] and of residual [M, N], weight, bias [N] those that there are, in ORDER."""
    settings = _settings(config, arrays, spec)
    if spec is not None:
        return quant.stage_call(settings, arrays)
    n = config.features
    results = [("y", "... n", config.dtype)]
    if "residual" in arrays:
        results.append(("residual_out", "... n", arrays["residual"].dtype.name))
    return StageCall(
        stage=PLAIN[config.norm].name,
        op=settings.op,
        operands=tuple((k, {"x": "w ... n", "residual": "... n"}.get(k, "n")) for k in arrays),
        results=tuple(results),
        sizes=(("n", n), ("w", config.ranks)),
        options=settings.options,
        backend=settings.backend,
        backend_source=settings.backend_source,
        targets=settings.targets,
    )


def _settings(config: Config, arrays: Any, spec: QuantSpec | None) -> Any:
    op = ("" if "residual" not in arrays else "add_") + config.norm + ("" if spec is None else "_quant")
    options = (
        ("eps", config.eps),
        ("weight_offset", config.weight_offset),
        ("cast", config.cast),
        ("residual_rounding", "float32"),
        ("parts", config.ranks),
    )
    name, source = _dispatch.requested(op, None)
    stage = QUANTISING[config.norm].name
    return quant.Config(op, "", stage, spec, False, config.features, None, options, name, source, target.named())  # type: ignore[arg-type]


def norm(
    config: Config, parts: jax.Array, residual: jax.Array | None, arrays: Arrays, spec: QuantSpec | None
) -> tuple[Any, jax.Array | None]:
    """(y or Quantized, residual_out or None) of partial sums [W, M, N]."""
    operands = {"x": parts, "residual": residual, "weight": arrays.get("weight"), "bias": arrays.get("bias")}
    present = {k: v for k, v in operands.items() if v is not None}
    if spec is None:
        out = _op.run(stage_call(config, present, spec), tuple(present.values()))
        return out["y"], out.get("residual_out")
    out = quant.run(_settings(config, present, spec), present)
    return out if residual is not None else (out, None)
