"""numpy oracle of quantisation, written from the contract: formats by their bit layout, scales by their definition, scale layouts
by their index formula. It shares no code with the library.

float32 input is followed operation by operation in float32, so results can be compared bit for bit; float64 input (the norms'
oracle) is quantised in float64 and compared within the contract's bounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import cases
import jax
import numpy as np
import oracle
import tolerances

import jaxnorm

FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
# exponent bits, mantissa bits, bias, largest finite code of the positive half, first NaN/Inf handling follows from `fnuz`
_BITS = {"float8_e4m3fn": (4, 3, 7, 0x7E), "float8_e4m3fnuz": (4, 3, 8, 0x7F), "float8_e5m2": (5, 2, 15, 0x7B),
         "float8_e5m2fnuz": (5, 2, 16, 0x7F), "fp4": (2, 1, 1, 0x7)}  # fmt: skip
MAXIMUM = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "float8_e5m2": 57344.0,
           "float8_e5m2fnuz": 57344.0, "fp4": 6.0}  # fmt: skip
# mantissa bits, exponent of the maximum
_ROUND = {name: (_BITS[name][1], int(np.log2(MAXIMUM[name]))) for name in _BITS}


@functools.cache
def magnitudes(name: str) -> np.ndarray:
    """Value of each non-negative finite code of a float format, in order."""
    _, mantissa, bias, last = _BITS[name]
    code = np.arange(last + 1)
    exponent, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / 2.0**mantissa
    return np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias).astype(np.float64)
    )


def has_negative_zero(name: str) -> bool:
    return name in _BITS and not name.endswith("fnuz")


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """float -> codes by the definition: clip, nearest, ties to the even code. int8, or uint8 (fp4: one nibble an element)."""
    v = np.asarray(values, np.float64)
    if name == "int8":
        return np.rint(np.clip(np.nan_to_num(v, nan=0.0), -127, 127)).astype(np.int8)
    table = magnitudes(name)
    size = np.minimum(np.abs(np.where(np.isnan(v), 0.0, v)), table[-1])
    middle = (table[:-1] + table[1:]) / 2  # exact: a format's neighbours need one more bit
    code = np.searchsorted(middle, size, side="left")
    tie = size == middle[np.minimum(code, len(middle) - 1)]
    code = np.where(tie & (code % 2 == 1), code + 1, code).astype(np.uint8)
    sign = np.uint8(8 if name == "fp4" else 0x80)
    negative = np.signbit(v) & ((code > 0) | has_negative_zero(name))
    code = np.where(negative, code | sign, code)
    if name != "fp4":
        code = np.where(np.isnan(v), np.uint8(0x80 if name.endswith("fnuz") else 0x7F), code)
    return code.astype(np.uint8)


def decode(codes: np.ndarray, name: str) -> np.ndarray:
    """float64 values of finite codes."""
    if name == "int8":
        return codes.astype(np.float64)
    sign = 8 if name == "fp4" else 0x80
    value = magnitudes(name)[np.minimum(codes & (sign - 1), len(magnitudes(name)) - 1)]
    return np.where(codes & sign, -value, value)


def steps(codes: np.ndarray, name: str) -> np.ndarray:
    """Position of a code on the line of codes; both zeros are 0."""
    c = codes.astype(np.int64)
    sign = 8 if name == "fp4" else 0x80
    return c if name == "int8" else np.where(c & sign, -(c & (sign - 1)), c)


def codes_of(values: Any, name: str) -> np.ndarray:
    """``Quantized.values`` as codes: int8, fp8 bytes, or nibbles, element 2i being the low one of byte i."""
    a = np.asarray(values)
    if name == "fp4":
        return np.stack([a & 15, a >> 4], -1).reshape(*a.shape[:-1], 2 * a.shape[-1])
    return a if name == "int8" else a.view(np.uint8)


# Scales


def exponent(a: np.ndarray, name: str, rounding: str) -> np.ndarray:
    """uint8 E. ``up``: the smallest with ``a <= maximum * 2**(E-127)``, exactly, by comparing fractions of equal exponent."""
    a = np.asarray(a, np.float64)
    fraction, power = np.frexp(np.where(np.isfinite(a), a, 1.0))
    top_fraction, top_power = np.frexp(MAXIMUM[name])
    mantissa, top = _ROUND[name]
    if rounding == "up":
        e = power - top_power + (fraction > top_fraction)
    elif rounding == "down":
        e = power - 1 - top
    else:  # to `mantissa` bits, half up, then the exponent
        e = power - 1 - top + (fraction >= 1 - 2.0 ** -(mantissa + 2))
    e = np.clip(e + 127, 1, 254)
    e = np.where(a / MAXIMUM[name] < 2.0**-126, 127, e)
    return np.where(np.isfinite(a), e, 255).astype(np.uint8)


def near_boundary(a: np.ndarray, name: str, rounding: str) -> np.ndarray:
    """Where a relative error of 2^-20 in the maximum may change E."""
    low, high = (exponent(a * (1 + s * 2.0**-20), name, rounding) for s in (-1, 1))
    return low != high


@dataclass(frozen=True)
class Codes:
    """What quantising ``z`` must give."""

    name: str
    codes: np.ndarray
    scale: np.ndarray
    """Row layout: float32 (float64 for a float64 z) ``[..., G]``, uint8 for e8m0, the given scalar for a static scale."""
    z: np.ndarray
    maximum: np.ndarray | None
    """``[..., G]``: of each row or group, after ``scale_ub``."""

    @property
    def multiplier(self) -> np.ndarray:
        """The scale of each element."""
        s = np.asarray(self.scale)
        if s.dtype == np.uint8:
            s = np.where(s == 255, np.nan, 2.0 ** (s.astype(np.float64) - 127))
        return s if s.ndim == 0 else np.repeat(s, self.z.shape[-1] // s.shape[-1], -1)

    @property
    def undefined(self) -> np.ndarray:
        """Elements of a row or group whose maximum is not finite: their codes are not specified."""
        if self.maximum is None:
            return np.zeros(self.z.shape, bool)
        return np.repeat(~np.isfinite(self.maximum), self.z.shape[-1] // self.maximum.shape[-1], -1)


def quantize(z: np.ndarray, spec: Any, name: str, static_scale: Any = None) -> Codes:
    """z in float32 (followed exactly) or float64; ``name`` is the resolved dtype."""
    kind = z.dtype.type
    with np.errstate(all="ignore"):
        if static_scale is not None:
            s = kind(np.float32(static_scale))
            return Codes(name, encode(z / s, name), np.float32(static_scale), z, None)
        g = spec.group_size or z.shape[-1]
        grouped = z.reshape(*z.shape[:-1], z.shape[-1] // g, g)
        a = np.max(np.abs(grouped), -1)
        if spec.scale_ub is not None:
            a = np.where(a > np.float32(spec.scale_ub), kind(np.float32(spec.scale_ub)), a)
        if spec.scale_dtype == "e8m0":
            scale: np.ndarray = exponent(a, name, spec.e8m0_rounding)
            s = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127)).astype(kind)
        else:
            s = a / kind(MAXIMUM[name])
            scale = s = np.where(s < 2.0**-126, kind(1), s)
        return Codes(name, encode((grouped / s[..., None]).reshape(z.shape), name), scale, z, a)


# Layouts


def positions(layout: str, rows: int, groups: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(flat index of the scale of each (row, group), shape of the array), by the contract's formulas."""
    m, j = np.indices((rows, groups))
    if layout == "row":
        return m * groups + j, (rows, groups)
    if layout == "column":
        return j * rows + m, (groups, rows)
    mp, sp = -(-rows // 256) * 256, -(-groups // 8) * 8
    index = (m // 32) * sp * 32 + (j // 8) * 256 + (j % 4) * 64 + (m % 16) * 4 + ((j % 8) // 4) * 2 + (m % 32) // 16
    return index, (mp, sp)


def to_rows(scale: Any, layout: str, lead: tuple[int, ...], groups: int) -> np.ndarray:
    """``Quantized.scale`` of one call in row layout ``[..., G]``; asserts its shape and its padding bytes."""
    scale = np.asarray(scale)
    rows = int(np.prod(lead, dtype=int))
    index, shape = positions(layout, rows, groups)
    assert scale.shape == ((*lead, groups) if layout == "row" else shape), f"{layout} scale of shape {scale.shape}"
    flat = scale.reshape(-1)
    if layout == "shuffled":
        rest = np.ones(flat.size, bool)
        rest[index] = False
        assert (flat[rest] == 0x7F).all(), "padding bytes of shuffled scales are not 0x7F"
    return flat[index].reshape(*lead, groups)


# Comparison


def assert_codes(got: Any, want: Codes, what: str, exact: bool) -> None:
    codes = codes_of(got, want.name)
    assert codes.shape == want.codes.shape and codes.dtype == want.codes.dtype, f"{what}: {codes.dtype}{codes.shape}"
    check = ~want.undefined
    nan = np.isnan(want.z) & (want.name != "int8")
    if want.name == "int8":
        assert (codes != -128).all(), f"{what}: -128"
    elif want.name != "fp4" and nan.any():
        assert np.isnan(np.asarray(got).astype(np.float32))[nan & check].all(), f"{what}: NaN is gone"
    check &= ~nan
    if exact:
        bad = check & (codes != want.codes)
        assert not bad.any(), _first(what, codes, want, bad)
        return
    apart = np.where(check, np.abs(steps(codes, want.name) - steps(want.codes, want.name)), 0)
    assert apart.max(initial=0) <= 1 and (apart > 0).sum() <= codes.size // 1000 + 2, _first(
        what, codes, want, apart > 0
    )


def _first(what: str, codes: np.ndarray, want: Codes, bad: np.ndarray) -> str:
    if not bad.any():
        return what
    i = tuple(int(k) for k in np.argwhere(bad)[0])
    return (f"{what}: {int(bad.sum())} of {bad.size} {want.name} codes differ; at {i} got {codes[i]}, want {want.codes[i]} "
            f"for z={want.z[i]!r}")  # fmt: skip


def assert_scales(got: Any, want: Codes, spec: Any, what: str, exact: bool) -> np.ndarray:
    """Compares, and returns the library's scales in row layout (shape () for a static scale)."""
    if want.maximum is None:
        got = np.asarray(got)
        assert got.shape == () and got.dtype == np.float32 and got == want.scale, f"{what}: static scale {got}"
        return got
    lead, groups = want.maximum.shape[:-1], want.maximum.shape[-1]
    rows = to_rows(got, spec.scale_layout, lead, groups)
    finite = np.isfinite(want.maximum)
    if spec.scale_dtype == "e8m0":
        assert rows.dtype == np.uint8
        assert (rows[~finite] == 255).all(), f"{what}: E of NaN or Inf"
        bad = finite & (rows != want.scale)
        if not exact:
            one = np.abs(rows.astype(int) - want.scale.astype(int)) == 1
            bad &= ~(one & near_boundary(want.maximum, want.name, spec.e8m0_rounding))
        assert not bad.any(), f"{what}: exponents {rows[bad][:4]} instead of {want.scale[bad][:4]}"
        return rows
    assert rows.dtype == np.float32
    assert not np.isfinite(rows[~finite]).any(), f"{what}: a bad row does not show in its scale"
    error = np.abs(rows[finite].astype(np.float64) - want.scale[finite])
    limit = 0 if exact else 2.0**-20 * np.abs(want.scale[finite])
    assert (error <= limit).all(), (
        f"{what}: scales {rows[finite][error > limit][:4]}, {want.scale[finite][error > limit][:4]}"
    )
    return rows


def assert_quantized(q: Any, want: Codes, spec: Any, what: str = "", *, exact: bool = False) -> None:
    """Codes, scales, layout and padding of a result. ``exact``: bit for bit, for a float32 z."""
    assert isinstance(q, jaxnorm.Quantized)
    assert q.spec == replace(spec, dtype=want.name), f"{what}: spec {q.spec}"
    stored = {"fp4": "uint8"}.get(want.name, want.name)
    assert np.asarray(q.values).dtype == cases.dtype(stored), f"{what}: values are {q.values.dtype}"
    rows = assert_scales(q.scale, want, spec, what, exact)
    if rows.dtype == np.uint8 and not exact and (rows != want.scale).any():
        changed = replace(want, scale=rows)  # an exponent on its boundary: the codes belong to the one that was chosen
        with np.errstate(all="ignore"):
            want = replace(changed, codes=encode(want.z / changed.multiplier, want.name))
    assert_codes(q.values, want, what, exact)


# Calls


@dataclass(frozen=True)
class Case:
    """One public call with its data and its oracle; on CPU and on a GPU alike."""

    op: str
    spec: Any
    features: int = 384
    lead: tuple[int, ...] = (7,)
    x_dtype: str = "bfloat16"
    weight_dtype: str | None = "bfloat16"
    residual_dtype: str | None = None
    smooth: str | None = None
    """dtype of the smooth scale."""
    static: float | None = None
    keep: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """eps, weight_offset, cast, residual_rounding, out_dtype, pad_to_multiple."""

    @property
    def id(self) -> str:
        s, short = self.spec, {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
        parts = [self.op, str(s.dtype).replace("float8_", ""), f"g{s.group_size}" if s.group_size else "token"]
        parts += [f"e8m0-{s.e8m0_rounding}"] if s.scale_dtype == "e8m0" else []
        parts += [s.scale_layout] if s.scale_layout != "row" else []
        parts += ["ub"] if s.scale_ub else []
        parts += ["smooth"] if self.smooth else []
        parts += ["static"] if self.static else []
        parts += ["keep"] if self.keep else []
        parts += ["x".join(map(str, (*self.lead, self.features))), short[self.x_dtype]]
        parts += [f"res-{short[self.residual_dtype]}"] if self.residual_dtype else []
        return "-".join(parts + [f"{k}={v}" for k, v in self.options.items()])

    @property
    def name(self) -> str:
        """Resolved dtype, on a machine that is no gfx94x."""
        return "float8_e4m3fn" if self.spec.dtype == "fp8" else self.spec.dtype

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        g, n = cases.rng(seed), self.features
        out = {"x": cases.normal(g, (*self.lead, n), self.x_dtype, std=1.7)}
        if self.op == "add_rmsnorm_quant":
            out["residual"] = cases.normal(g, (*self.lead, n), self.residual_dtype or self.x_dtype, std=2.5)
        if self.op != "quantize" and self.weight_dtype:
            w = cases.weight(g, n, self.weight_dtype)
            assert w is not None
            out["weight"] = w
        if self.smooth:
            out["smooth_scale"] = g.uniform(0.25, 2.0, n).astype(cases.dtype(self.smooth))
        if self.static:
            out["static_scale"] = np.array(self.static, np.float32)
        return out

    def call(self, arrays: dict[str, Any], backend: str | None = None) -> dict[str, Any]:
        """``{"q": Quantized, "residual_out": ..., "y": ...}``"""
        more = {k: arrays[k] for k in ("smooth_scale", "static_scale") if k in arrays}
        if self.op == "quantize":
            return {"q": jaxnorm.quantize(arrays["x"], self.spec, backend=backend, **more)}
        positional = [arrays[k] for k in ("x", "residual") if k in arrays] + [arrays.get("weight"), self.spec]
        out = getattr(jaxnorm, self.op)(
            *positional, keep_unquantized=self.keep, backend=backend, **self.options, **more
        )
        names = ["q", *(["residual_out"] if "residual" in arrays else []), *(["y"] if self.keep else [])]
        return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))

    def run(self, arrays: dict[str, Any], backend: str | None = None) -> dict[str, Any]:
        return jax.jit(lambda a: self.call(a, backend))(arrays)

    def norm(self, arrays: dict[str, np.ndarray]) -> oracle.Forward:
        options = dict(self.options)
        if self.op == "add_rmsnorm_quant":
            return oracle.add_rmsnorm(arrays["x"], arrays["residual"], arrays.get("weight"), **options)
        return oracle.rmsnorm(arrays["x"], arrays.get("weight"), **options)

    def expected(self, arrays: dict[str, np.ndarray]) -> Codes:
        if self.op == "quantize":
            z = arrays["x"].astype(np.float32)
        else:
            z, width = (f := self.norm(arrays)).y, f.padded
            z = np.concatenate([z, np.zeros((*z.shape[:-1], width - z.shape[-1]))], -1)
        if "smooth_scale" in arrays:
            smooth = arrays["smooth_scale"].astype(z.dtype)
            z = z * np.concatenate([smooth, np.zeros(z.shape[-1] - smooth.size, z.dtype)])
        return quantize(z, self.spec, self.name, arrays.get("static_scale"))

    def check(
        self, arrays: dict[str, np.ndarray], out: dict[str, Any], what: str = "", exact: bool | None = None
    ) -> None:
        """``exact`` concerns the codes of ``quantize``; None: exact, as the reference divides."""
        want = self.expected(arrays)
        exact = want.z.dtype == np.float32 if exact is None else exact
        assert_quantized(out["q"], want, self.spec, f"{what} {self.id}", exact=exact)
        if "residual" in arrays or self.keep:
            forward = self.norm(arrays)
            if "residual" in arrays:
                tolerances.assert_same_bits(out["residual_out"], forward.residual_out, "residual_out")
            if self.keep:
                tolerances.assert_y(out["y"], forward, self.options.get("cast", "output"))
