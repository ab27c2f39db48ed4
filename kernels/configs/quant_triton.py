"""Launches of the quantising stages through Triton: ``rmsnorm_quant_fwd`` and ``quantize_fwd``, one launch each.

As in ``rmsnorm_triton``, the tile of a row depends on the features, dtypes, options and target alone. None of the thresholds here
was measured with quantisation; they follow those of the norm on an H200, and on AMD registers and lanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from . import ITEMSIZE, Launch, Problem, Unsupported, next_power_of_2, wave_size
from .rmsnorm_triton import GRID_COLUMNS, Tile, check, check_counts

STAGES = {"rmsnorm_quant_fwd": "rmsnorm", "layernorm_quant_fwd": "layernorm", "quantize_fwd": ""}
"""The norm of each."""
ROW_BUFFERS = ("x", "residual", "y", "residual_out")
VEC = 8
"""Neighbouring elements of a lane: 16 bytes of bfloat16 read, 8 bytes of codes written."""
TILE = 16384
"""Longest padded row held in registers: 16 elements a lane of 1024."""
LOOP = 8192
"""Columns of a longer row that are read at a time, hence the longest group there."""


@dataclass(frozen=True)
class Format:
    """A format of codes: mantissa bits (0: integers), exponent bias, largest finite value and its exponent."""

    mantissa: int
    bias: int
    max: float
    top: int
    fnuz: bool = False


FORMATS = {
    "int8": Format(0, 0, 127.0, 0),
    "float8_e4m3fn": Format(3, 7, 448.0, 8),
    "float8_e4m3fnuz": Format(3, 8, 240.0, 7, True),
    "float8_e5m2": Format(2, 15, 57344.0, 15),
    "float8_e5m2fnuz": Format(2, 16, 57344.0, 15, True),
    "fp4": Format(1, 1, 6.0, 2),
}


@dataclass(frozen=True)
class Loop:
    """How a program walks a row too long for a tile."""

    block: int
    vec: int
    warps: int

    def constants(self) -> tuple[tuple[str, object], ...]:
        return (("BLOCK", self.block), ("VEC", self.vec))


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launch that computes ``problem``.

    Raises:
      Unsupported: another stage, no rows, more rows or features than the kernel counts, or a group size it does not cover.
    """
    _check(problem)
    width = _width(problem)
    if _held(problem):
        return (_launch(problem, _tile(problem, width)),)
    return (_launch(problem, Loop(LOOP, _vec(problem), 512 // wave_size(problem.target))),)


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Plans worth timing against :func:`plan`, the plan itself first."""
    return list(dict.fromkeys((plan(problem), *((_launch(problem, shape),) for shape in _shapes(problem)))))


def _check(problem: Problem) -> None:
    check(problem, STAGES)
    check_counts(max(problem.rows, _scale_rows(problem)), _padded(problem))
    group = problem.option("spec").group_size
    if group is None:
        return
    if group < 16 or group & (group - 1):
        raise Unsupported(f"groups of {group}; the kernels cover powers of two from 16 up")
    if _padded(problem) % group:
        raise Unsupported(f"groups of {group} do not divide rows of {_padded(problem)}")
    if group > LOOP and not _held(problem):
        raise Unsupported(f"groups of {group} in rows of {_padded(problem)}; the kernels cover up to {LOOP} there")


def _padded(problem: Problem) -> int:
    """P, from the codes, of which fp4 packs two into a byte."""
    return problem.shape("values")[-1] * (2 if problem.option("spec").dtype == "fp4" else 1)


def _shuffled(problem: Problem) -> bool:
    return problem.has("scale") and problem.option("spec").scale_layout == "shuffled"


def _scale_rows(problem: Problem) -> int:
    """R: rows with scales, the padding of the shuffled layout included."""
    return problem.shape("scale")[0] if _shuffled(problem) else problem.rows


def _width(problem: Problem) -> int:
    """Columns of a tile: groups are whole, and the shuffled layout pads to eight groups."""
    width = max(next_power_of_2(_padded(problem)), 16)
    return max(width, 8 * problem.option("spec").group_size) if _shuffled(problem) else width


def _held(problem: Problem) -> bool:
    """Whether a tile holds the row. 1024 threads have 64 registers each on NVIDIA, where two float32 buffers of 16 elements and a
    smooth scale spilled."""
    width = _width(problem)
    return width <= TILE and (problem.target.startswith("gfx") or width <= 8192 or _read_bytes(problem) <= 4)


def _read_bytes(problem: Problem) -> int:
    return sum(ITEMSIZE[problem.dtype(b)] for b in ("x", "residual") if problem.has(b))


def _vec(problem: Problem) -> int:
    strides = [problem.shape(name)[-1] for name in ROW_BUFFERS if problem.has(name)] + [_padded(problem)]
    return max(min(VEC, stride & -stride) for stride in strides)


def _tile(problem: Problem, width: int) -> Tile:
    wave, vec, sm = wave_size(problem.target), _vec(problem), problem.target.startswith("sm")
    if width <= (512 if sm else 1024):
        block = min(width, wave * vec)
        return Tile(width // block, 4 * wave * vec // block, block, vec, 4, block // vec)
    # 16 elements a lane; at 1024 with a residual on NVIDIA 8, as measured for the norm
    threads = min(width // (8 if sm and width == 1024 and _read_bytes(problem) > 2 else 16), 1024)
    return Tile(0, 1, width, vec, threads // wave)


def _hardware(dtype: str, target: str) -> str:
    """What the kernel calls the target's own conversion to the format; empty where there is none."""
    if target.startswith("sm_"):
        # On sm_89 Triton 3.6 goes through float16 rounded toward zero, hence rounds twice.
        native = dtype in ("float8_e4m3fn", "float8_e5m2") and int(target[3:]) >= 90
        return dtype.removeprefix("float8_") if native else ""
    own = {
        "gfx942": {"float8_e4m3fnuz": "fp8", "float8_e5m2fnuz": "bf8"},
        "gfx950": {"float8_e4m3fn": "fp8", "float8_e5m2": "bf8"},
    }
    return own.get(target, {}).get(dtype, "")


def _constants(problem: Problem) -> tuple[tuple[str, object], ...]:
    options, spec = dict(problem.options), problem.option("spec")
    norm, static = STAGES[problem.stage], problem.has("static_scale")
    form, group = FORMATS[spec.dtype], 0 if static else spec.group_size or 0
    groups = _padded(problem) // group if group else 1
    e8m0 = spec.e8m0_rounding if group and spec.scale_dtype == "e8m0" else ""
    hard, bounded = (
        _hardware(spec.dtype, problem.target),
        0.0 if static or spec.scale_ub is None else float(spec.scale_ub),
    )
    saturates = static or bounded > 0 or e8m0 in ("down", "even")
    return (
        ("N", problem.features),
        ("P", _padded(problem)),
        ("NORM", norm),
        ("EPS", float(options["eps"]) if norm else 0.0),
        ("WEIGHT_OFFSET", float(options["weight_offset"]) if norm else 0.0),
        ("HAS_X_BIAS", problem.has("x_bias")),
        ("HAS_RESIDUAL", problem.has("residual")),
        ("HAS_WEIGHT", problem.has("weight")),
        ("HAS_BIAS", problem.has("bias")),
        ("HAS_SMOOTH", problem.has("smooth_scale")),
        ("HAS_STATIC", static),
        ("HAS_Y", problem.has("y")),
        ("CAST_BEFORE_WEIGHT", bool(norm) and options["cast"] == "before_weight"),
        ("ROUND_RESIDUAL", problem.has("residual") and options["residual_rounding"] == "input"),
        ("MAX", form.max),
        ("MANTISSA", form.mantissa),
        ("BIAS", form.bias),
        ("TOP", form.top),
        ("FNUZ", form.fnuz),
        ("HARD", hard),
        # What AMD's conversions make of a value an ulp above the largest nobody here could see.
        ("CLIP", saturates or (bool(hard) and problem.target.startswith("gfx"))),
        ("EXACT", saturates),
        ("PACKED", spec.dtype == "fp4"),
        ("GROUP", group),
        ("G", groups),
        ("SP", problem.shape("scale")[-1] if _shuffled(problem) else groups),
        ("UB", bounded),
        ("E8M0", e8m0),
        ("LAYOUT", spec.scale_layout if group else "row"),
    )


def _launch(problem: Problem, shape: Tile | Loop) -> Launch:
    tiled = isinstance(shape, Tile)
    programs = -(-_scale_rows(problem) // (shape.rows if tiled else 1))
    return Launch(
        kernel=f"quant:{'quant_fwd' if tiled else 'quant_fwd_long'}",
        inputs=("x", "x_bias", "residual", "weight", "bias", "smooth_scale", "static_scale"),
        scalars=(("M", "i32", problem.rows), ("R", "i32", _scale_rows(problem))),
        outputs=("values", "scale", "residual_out", "y"),
        grid=(min(programs, GRID_COLUMNS), -(-programs // GRID_COLUMNS), 1),
        constants=(*_constants(problem), *shape.constants()),
        num_warps=shape.warps,
    )


def _shapes(problem: Problem) -> Iterator[Tile | Loop]:
    wave, width, group = wave_size(problem.target), _width(problem), problem.option("spec").group_size or 0
    if width <= 4 * TILE:
        base = _tile(problem, width)
        if base.chunks:
            for warps in (2, 8):
                yield dataclasses.replace(base, rows=max(base.rows * warps // base.warps, 1), warps=warps)
        for threads in (64, 128, 256, 512, 1024):
            if threads >= wave and 4 <= width // threads <= 64:
                yield Tile(0, 1, width, base.vec, threads // wave)
    for block in (4096, 8192, 16384, 32768):
        for threads in (256, 512, 1024):
            if width >= 8192 and 8 <= block // threads <= 32 and group <= block < 2 * _padded(problem):
                yield Loop(block, _vec(problem), threads // wave)
