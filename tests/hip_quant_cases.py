"""Calls of the quantising HIP stages, and what they must give by the written definition (operators, sections 1.4 to 1.6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import cases
import ml_dtypes
import numpy as np
from jaxnorm.kernels.configs import Problem

from jaxnorm._types import QuantSpec

BF16, F16, F32 = cases.FLOATS
E4, E4Z, E5, E5Z = "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"
TOP = {"int8": 127.0, E4: 448.0, E4Z: 240.0, E5: 57344.0, E5Z: 57344.0, "fp4": 6.0}
MANTISSA = {E4: 3, E4Z: 3, E5: 2, E5Z: 2, "fp4": 1}
EXPONENT_OF_TOP = {E4: 8, E4Z: 7, E5: 15, E5Z: 15, "fp4": 2}


@dataclass(frozen=True)
class Case:
    """One call of a stage."""

    features: int
    spec: QuantSpec
    rows: int = 5
    norm: bool = True
    x: str = BF16
    residual: str | None = None
    weight: str | None = BF16
    smooth: str | None = None
    keep: str | None = None
    static: float | None = None
    pad: int = 1
    options: dict = field(default_factory=dict, hash=False)
    target: str = "sm_90"

    def __str__(self) -> str:
        s = self.spec
        short = {BF16: "b", F16: "h", F32: "f", None: "-"}
        kinds = "".join(
            short[k] for k in (self.x, self.residual, self.weight if self.norm else None, self.smooth, self.keep)
        )
        parts = [self.target, "norm" if self.norm else "plain", f"{self.rows}x{self.features}", kinds, s.dtype]
        parts += [f"g{s.group_size}"] if s.group_size else []
        parts += [s.e8m0_rounding] if s.scale_dtype == "e8m0" else []
        parts += [s.scale_layout] if s.scale_layout != "row" else []
        parts += [f"ub{s.scale_ub:g}"] if s.scale_ub else []
        parts += [f"static{self.static:g}"] if self.static is not None else []
        parts += [f"p{self.pad}"] if self.pad > 1 else []
        return "-".join([*parts, *map(str, self.options.values())])

    @property
    def padded(self) -> int:
        return -(-self.features // self.pad) * self.pad

    @property
    def groups(self) -> int:
        return self.padded // self.spec.group_size if self.spec.group_size else 1

    def settings(self) -> dict:
        return {"eps": 1e-6, "weight_offset": 0.0, "cast": "output", "residual_rounding": "float32"} | self.options

    def scale_shape(self) -> tuple[int, int]:
        if self.spec.scale_layout == "column":
            return self.groups, self.rows
        if self.spec.scale_layout == "shuffled":
            rows = self.rows if self.rows % 32 == 0 else -(-self.rows // 256) * 256
            return rows, -(-self.groups // 8) * 8
        return self.rows, self.groups

    def problem(self) -> Problem:
        m, n, spec = self.rows, self.features, self.spec
        packed = spec.dtype == "fp4"
        norm = self.norm
        buffers = [
            ("x", (m, n), self.x),
            ("residual", (m, n), self.residual),
            ("weight", (n,), self.weight if norm else None),
            ("smooth_scale", (n,), self.smooth),
            ("static_scale", (1,), F32 if self.static is not None else None),
            ("values", (m, self.padded // 2 if packed else self.padded), spec.value_dtype),
            (
                "scale",
                self.scale_shape(),
                ("uint8" if spec.scale_dtype == "e8m0" else F32) if self.static is None else None,
            ),
            ("residual_out", (m, n), self.residual),
            ("y", (m, self.padded), self.keep),
        ]
        there = [b for b in buffers if b[2] is not None]
        options = (self.settings() if norm else {}) | {"spec": spec, "fp8": False}
        return Problem(
            "rmsnorm_quant_fwd" if norm else "quantize_fwd",
            m,
            n,
            tuple((name, shape) for name, shape, _ in there),
            tuple((name, kind) for name, _, kind in there),
            tuple(options.items()),
            self.target,
        )

    def operands(self) -> dict[str, np.ndarray]:
        g = cases.rng(self.features + 31 * self.rows)
        shape = (self.rows, self.features)
        out = {"x": cases.normal(g, shape, self.x, std=3.0)}
        if self.residual:
            out["residual"] = cases.normal(g, shape, self.residual, std=2.0)
        if self.norm and self.weight:
            out["weight"] = cases.weight(g, self.features, self.weight)
        if self.smooth:
            out["smooth_scale"] = np.exp2(g.uniform(-2, 2, self.features)).astype(cases.dtype(self.smooth))
        if self.static is not None:
            out["static_scale"] = np.full(1, self.static, np.float32)
        return out


# ---- the definition, sections 1.4 to 1.6 of the operators' specification, in float64 up to the rounding to a code


def to_codes(v: np.ndarray, kind: str) -> np.ndarray:
    """Codes (bytes, fp4 not packed) of clip(v), round to nearest even."""
    v = np.where(v > TOP[kind], TOP[kind], np.where(v < -TOP[kind], -TOP[kind], v))
    if kind == "int8":
        return np.where(np.isnan(v), 0, np.rint(v)).astype(np.int8).view(np.uint8)
    type_ = ml_dtypes.float4_e2m1fn if kind == "fp4" else getattr(ml_dtypes, kind)
    return v.astype(np.float32).astype(type_).view(np.uint8)


def exponents(a: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """E of each maximum (float32)."""
    top = TOP[spec.dtype]
    out = np.empty(a.shape, np.uint8)
    for i, v in np.ndenumerate(a):
        if not np.isfinite(v):
            e = 255
        elif v == 0 or np.float32(v) * np.float32(1 / top) < np.float32(2.0**-126):
            e = 127
        elif spec.e8m0_rounding == "up":
            e = next(e for e in range(1, 255) if float(v) <= top * 2.0 ** (e - 127))
        else:
            bits = int(np.float32(v).view(np.int32))
            half = 1 << (22 - MANTISSA[spec.dtype]) if spec.e8m0_rounding == "even" else 0
            e = min(254, max(1, ((bits + half) >> 23) - EXPONENT_OF_TOP[spec.dtype]))
        out[i] = e
    return out


def quantised(z: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(codes [M, P], scales [M, G], maxima [M, G]) of float32 z [M, P]."""
    spec = case.spec
    with np.errstate(all="ignore"):
        if case.static is not None:
            return to_codes(z / np.float32(case.static), spec.dtype), None, None
        grouped = z.reshape(case.rows, case.groups, -1)
        a = np.abs(grouped).max(-1)
        if spec.scale_ub:
            a = np.where(a > spec.scale_ub, np.float32(spec.scale_ub), a)
        if spec.scale_dtype == "e8m0":
            scale = exponents(a, spec)
            s = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float64) - 127)).astype(np.float32)
        else:
            s = (a / np.float32(TOP[spec.dtype])).astype(np.float32)
            scale = s = np.where(s < np.float32(2.0**-126), np.float32(1), s)
        return to_codes((grouped / s[..., None]).reshape(z.shape), spec.dtype), scale, a


def laid_out(scale: np.ndarray, case: Case) -> np.ndarray:
    """The scale buffer, byte for byte."""
    if case.spec.scale_layout == "row":
        return scale
    if case.spec.scale_layout == "column":
        return np.ascontiguousarray(scale.T)
    rows, width = case.scale_shape()
    out = np.full(rows * width, 0x7F, np.uint8)
    for m, j in np.ndindex(*scale.shape):
        at = (m // 32) * width * 32 + (j // 8) * 256 + (j % 4) * 64 + (m % 16) * 4 + ((j % 8) // 4) * 2 + (m % 32) // 16
        out[at] = scale[m, j]
    return out.reshape(rows, width)


def packed(codes: np.ndarray, spec: QuantSpec) -> np.ndarray:
    return codes[:, ::2] | codes[:, 1::2] << 4 if spec.dtype == "fp4" else codes


def unpacked(values: np.ndarray, spec: QuantSpec) -> np.ndarray:
    raw = values.view(np.uint8)
    return np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1) if spec.dtype == "fp4" else raw


def steps(codes: np.ndarray, kind: str) -> np.ndarray:
    """Codes as integers in the order of their values."""
    if kind == "int8":
        return codes.view(np.int8).astype(int)
    sign = 8 if kind == "fp4" else 128
    return np.where(codes & sign, -(codes & (sign - 1)).astype(int), (codes & (sign - 1)).astype(int))


def padded(z: np.ndarray, case: Case) -> np.ndarray:
    return np.pad(z, ((0, 0), (0, case.padded - case.features)))


def q(kind: str, group: int | None = None, **more) -> QuantSpec:
    return QuantSpec(kind, group_size=group, **more)


def mx(kind: str, layout: str = "row", rounding: str = "up", group: int = 32) -> QuantSpec:
    return QuantSpec(kind, group_size=group, scale_dtype="e8m0", scale_layout=layout, e8m0_rounding=rounding)


def plain(features: int, spec: QuantSpec, **more) -> Case:
    return Case(features, spec, norm=False, **more)
