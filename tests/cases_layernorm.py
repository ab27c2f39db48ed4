"""Calls of the LayerNorm family with data and oracle: for the CPU, for GPUs, and for the plans of the kernels alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cases
import jax
import numpy as np
import oracle_layernorm as oracle
import oracle_quant
import tolerances
from cases import BF16, F16, F32
from registry import with_gradients

import jaxnorm

ORDER = ("x", "x_bias", "residual", "weight", "bias")
ROWS = ("x", "residual")
NONE = ""


@dataclass(frozen=True)
class Case:
    """One call; a dtype of "" = not given, of None = that of x."""

    features: int
    lead: tuple[int, ...] = (5,)
    x: str = BF16
    residual: str | None = NONE
    weight: str | None = BF16
    bias: str | None = BF16
    x_bias: str | None = NONE
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    mean: float = 0.3
    std: float = 1.7

    def __str__(self) -> str:
        short = {BF16: "b", F16: "h", F32: "f", NONE: "-"}
        kinds = "".join(short[self.dtype(k)] for k in ORDER)
        parts = ["x".join(map(str, (*self.lead, self.features))), kinds]
        parts += [f"mean{self.mean:g}"] if self.mean > 1 else []
        return "-".join([*parts, *(f"{k}={v}" for k, v in self.options.items())])

    def dtype(self, name: str) -> str:
        kind = getattr(self, name)
        return self.x if kind is None else kind

    @property
    def op(self) -> str:
        return "add_layernorm" if self.residual != NONE else "layernorm"

    @property
    def width(self) -> int:
        p = self.options.get("pad_to_multiple") or 1
        return -(-self.features // p) * p

    @property
    def y_dtype(self) -> str:
        return self.options.get("out_dtype", self.x)

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        g, out = cases.rng(seed), {}
        for name in ORDER:
            kind = self.dtype(name)
            if kind == NONE:
                continue
            if name in ROWS:
                out[name] = cases.normal(g, (*self.lead, self.features), kind, std=self.std, mean=self.mean)
            elif name == "weight":
                out[name] = cases.weight(g, self.features, kind)
            else:
                out[name] = cases.normal(g, (self.features,), kind, std=0.7, mean=-0.2)
        return out

    def cotangents(self, seed: int = 7) -> tuple[np.ndarray, ...]:
        """Random, with a mean; NaN in the padded tail, which the op must drop."""
        g = cases.rng(seed)
        dy = cases.normal(g, (*self.lead, self.width), self.y_dtype, mean=0.4)
        dy[..., self.features :] = np.nan
        if self.residual == NONE:
            return (dy,)
        return dy, cases.normal(g, (*self.lead, self.features), self.dtype("residual"))

    def call(self, a: Mapping[str, Any], backend: str | None = None) -> tuple[Any, ...]:
        """The public function on the arrays of :meth:`arrays`; always a tuple."""
        rows = [a[k] for k in ROWS if k in a]
        out = getattr(jaxnorm, self.op)(
            *rows, a.get("weight"), a.get("bias"), x_bias=a.get("x_bias"), backend=backend, **self.options
        )
        return out if isinstance(out, tuple) else (out,)

    def function(self, backend: str | None = None):
        """Of positional arrays, in the order of :meth:`arrays`."""
        names = [k for k in ORDER if self.dtype(k) != NONE]
        return lambda *arrays: self.call(dict(zip(names, arrays, strict=True)), backend)

    def expected(self, a: Mapping[str, np.ndarray]) -> oracle.Forward:
        return oracle.layernorm(a, **self.options)

    def backward(self, forward: oracle.Forward, a: Mapping[str, np.ndarray], cotangents) -> oracle.Backward:
        return oracle.backward(forward, a, *cotangents, weight_offset=self.options.get("weight_offset", 0.0))

    def check_results(self, a: Mapping[str, np.ndarray], results, what: str = "") -> oracle.Forward:
        want = self.expected(a)
        oracle.assert_y(results[0], want, f"{what} y")
        if want.residual_out is not None:
            tolerances.assert_same_bits(results[1], want.residual_out, f"{what} residual_out")
        return want

    def check_gradients(self, a: Mapping[str, np.ndarray], want: oracle.Backward, gradients, what: str = "") -> None:
        for (name, arg), got in zip(a.items(), gradients, strict=True):
            assert got.dtype == arg.dtype and got.shape == arg.shape, f"{what} d{name}: {got.dtype}{got.shape}"
            if name in ROWS:
                tolerances.assert_dx(got, want, f"{what} d{name}")
            else:
                oracle.assert_sum(got, want, oracle.SUMS[name], what)

    def check(self, backend: str | None = None, gradients: bool = True, seed: int = 0) -> None:
        """Forward and backward in one program against the oracle."""
        a, cts = self.arrays(seed), self.cotangents()
        f = self.function(backend)
        if not gradients:
            self.check_results(a, jax.jit(f)(*a.values()))
            return
        results, got = jax.jit(with_gradients(f))(tuple(a.values()), cts)
        want = self.check_results(a, results)
        self.check_gradients(a, self.backward(want, a, cts), got)


EPS12 = {"eps": 1e-12}
MODELS = {
    "minilm": Case(384, options=EPS12),
    "bert": Case(768, options=EPS12, residual=None, weight=F32, bias=F32),
    "gpt2-xl": Case(1600),
    "vit-l": Case(1024, options={"eps": 1e-6}, residual=F32),
}


def thinned(found: Iterable[Any], each: int, name=str) -> list[Any]:
    """Parameters of a test: one in ``each`` runs by default, the others are slow."""
    import pytest

    return [pytest.param(c, id=name(c), marks=[pytest.mark.slow] if i % each else []) for i, c in enumerate(found)]


def dtype_cases() -> Iterator[Case]:
    """All nine pairs of x and weight; bias, x_bias and residual of other dtypes in turn."""
    for i, (x, w) in enumerate(cases.DTYPE_PAIRS):
        other = cases.FLOATS[(i + 1) % 3]
        yield Case(83, (7,), x, NONE, w, other, (NONE, F32, BF16)[i % 3], {"weight_offset": 1.0})
        yield Case(83, (7,), x, cases.FLOATS[i % 3], w, other, (F16, NONE, F32)[i % 3])


def option_cases() -> Iterator[Case]:
    for x in cases.FLOATS:
        base = Case(100, (7,), x, x_bias=F32, options={"weight_offset": 0.5})
        add = replace(base, residual=None)
        with_ = lambda case, **more: replace(case, options={**case.options, **more})  # noqa: E731
        yield with_(base, cast="before_weight")
        yield with_(base, pad_to_multiple=64)
        yield with_(add, residual_rounding="input")
        yield with_(replace(add, residual=BF16), residual_rounding="input", cast="before_weight", pad_to_multiple=128)
        yield with_(base, out_dtype={F32: BF16, BF16: F32, F16: F32}[x])
        yield Case(100, (7,), x, weight=NONE, bias=NONE)
        yield Case(100, (7,), x, weight=NONE, bias=F32, residual=F32)
        yield Case(100, (7,), x, weight=F32, bias=NONE, x_bias=BF16)
        yield Case(100, (7,), x, weight=NONE, bias=NONE, x_bias=F16)


def mean_cases(features: int = 384) -> Iterator[Case]:
    """Means far above the deviation: as float32 can hold, and as 16 bits can."""
    yield Case(features, (4,), F32, weight=F32, bias=F32, mean=1e4, std=1.0)
    yield Case(features, (4,), F32, F32, F32, F32, F32, mean=1e4, std=1.0)
    yield Case(features, (4,), BF16, mean=64.0, std=8.0)
    yield Case(features, (4,), BF16, BF16, F32, F32, BF16, mean=64.0, std=8.0)
    yield Case(features, (4,), F16, mean=256.0, std=2.0, options=EPS12)


@dataclass(frozen=True)
class QuantCase(oracle_quant.Case):
    """A call of ``layernorm_quant`` or ``add_layernorm_quant``; made by :func:`quant_case`."""

    bias_dtype: str | None = BF16
    x_bias_dtype: str | None = None

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        out = super().arrays(seed)
        g = cases.rng(seed + 100)
        if self.residual_dtype:
            out["residual"] = cases.normal(g, (*self.lead, self.features), self.residual_dtype, std=2.5)
        for name, kind in (("bias", self.bias_dtype), ("x_bias", self.x_bias_dtype)):
            if kind:
                out[name] = cases.normal(g, (self.features,), kind, std=0.5, mean=0.2)
        return out

    def call(self, arrays: dict[str, Any], backend: str | None = None) -> dict[str, Any]:
        more = {k: arrays[k] for k in ("smooth_scale", "static_scale", "x_bias") if k in arrays}
        positional = [arrays[k] for k in ROWS if k in arrays] + [arrays.get("weight"), arrays.get("bias"), self.spec]
        out = getattr(jaxnorm, self.op)(
            *positional, keep_unquantized=self.keep, backend=backend, **self.options, **more
        )
        names = ["q", *(["residual_out"] if self.residual_dtype else []), *(["y"] if self.keep else [])]
        return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))

    def norm(self, arrays: dict[str, np.ndarray]) -> oracle.Forward:
        return oracle.layernorm({k: arrays[k] for k in ORDER if k in arrays}, **self.options)

    def check(self, arrays, out, what: str = "", exact: bool | None = None) -> None:
        oracle_quant.assert_quantized(out["q"], self.expected(arrays), self.spec, f"{what} {self.id}")
        forward = self.norm(arrays)
        if self.residual_dtype:
            tolerances.assert_same_bits(out["residual_out"], forward.residual_out, "residual_out")
        if self.keep:
            oracle.assert_y(out["y"], forward)


def quant_case(spec: Any, **more: Any) -> QuantCase:
    return QuantCase("add_layernorm_quant" if more.get("residual_dtype") else "layernorm_quant", spec, **more)


def quant_cases() -> Iterator[QuantCase]:
    """Every kind of spec, each with other operands."""
    Spec, fp8, mx = jaxnorm.QuantSpec, oracle_quant.FP8, {"group_size": 32, "scale_dtype": "e8m0"}
    yield quant_case(Spec("int8"))
    yield quant_case(Spec("int8"), residual_dtype=BF16, smooth="float32", x_bias_dtype=F32)
    yield quant_case(Spec("int8", group_size=96), x_dtype=F32, weight_dtype=F16, bias_dtype=None, keep=True)
    yield quant_case(Spec("int8", group_size=64), residual_dtype=F32, x_dtype=F16, weight_dtype=None, bias_dtype=F32)
    yield quant_case(Spec(fp8[0]), residual_dtype=F16, x_dtype=F16, smooth=BF16, keep=True, options={"out_dtype": F32})
    yield quant_case(Spec(fp8[0], group_size=128, scale_layout="column"), x_bias_dtype=BF16)
    yield quant_case(Spec(fp8[1]), static=0.03, smooth=F32)
    yield quant_case(Spec(fp8[2], scale_ub=1.5), residual_dtype=F32)
    yield quant_case(Spec(fp8[3], group_size=16), options={"weight_offset": 1.0, "eps": 1e-12})
    yield quant_case(Spec("fp8", e8m0_rounding="even", **mx), residual_dtype=BF16, x_bias_dtype=F16)
    yield quant_case(
        Spec("fp4", scale_layout="shuffled", **mx),
        features=320,
        lead=(5,),
        keep=True,
        smooth=F16,
        options={"pad_to_multiple": 256},
    )
    yield quant_case(
        Spec("fp4", e8m0_rounding="down", **mx), residual_dtype=F32, x_dtype=F32, options={"cast": "before_weight"}
    )
    yield quant_case(
        Spec("int8"), features=769, lead=(3,), residual_dtype=F32, x_bias_dtype=F32, options={"pad_to_multiple": 32}
    )
    yield quant_case(
        Spec("int8"), features=200, residual_dtype=BF16, options={"residual_rounding": "input"}, x_bias_dtype=BF16
    )
