"""The stages of the LayerNorm family as the plans of the kernels see them, from the calls of cases_layernorm.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import numpy as np
import oracle_layernorm as oracle
import oracle_quant
import tolerances
from cases_layernorm import NONE, ORDER, Case, QuantCase
from jaxnorm.kernels.configs import Problem

F32 = "float32"
DEFAULTS = {"eps": 1e-5, "weight_offset": 0.0, "cast": "output", "residual_rounding": "float32"}


def _problem(stage: str, lead: tuple[int, ...], n: int, buffers: list, options: dict, target: str) -> Problem:
    there = [b for b in buffers if b[2]]
    rows = int(np.prod(lead))
    return Problem(stage, rows, n, tuple((name, s) for name, s, _ in there), tuple((name, d) for name, _, d in there),
                   tuple(options.items()), target)  # fmt: skip


def _operands(a: dict[str, np.ndarray]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(k, v.shape, v.dtype.name) for k, v in a.items()]


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    return {k: options.get(k, v) for k, v in DEFAULTS.items()}


@dataclass(frozen=True)
class Call:
    """One call of one leading dim for a target, forward and backward; ``save``: the forward of a gradient."""

    case: Case
    target: str = "sm_90"
    save: bool = True

    def __str__(self) -> str:
        return f"{self.target}-{self.case}"

    @property
    def rows(self) -> int:
        return self.case.lead[0]

    def forward(self, a: dict[str, np.ndarray]) -> Problem:
        c, wide = self.case, (self.rows, self.case.features)
        scalars = [(n, (self.rows,), F32 if self.save else None) for n in ("mean", "shift", "rstd")]
        results = [("y", (self.rows, c.width), c.y_dtype), ("residual_out", wide, c.dtype("residual")), *scalars]
        return _problem(
            "layernorm_fwd", c.lead, c.features, [*_operands(a), *results], _settings(c.options), self.target
        )

    def check_forward(self, a: dict[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        want = self.case.check_results(a, [out["y"], *([out["residual_out"]] if "residual" in a else [])])
        if self.save:
            mean = out["mean"].astype(np.float64) + out["shift"]
            bound = 2.0**-22 * (1 / want.rstd + 2.0**-16 * np.abs(want.mean))
            assert (np.abs(mean[:, None] - want.mean) <= bound).all(), "the mean"
            np.testing.assert_allclose(out["rstd"][:, None], want.rstd, rtol=2.0**-19)

    def saved(self, a: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], oracle.Forward]:
        """(operands of the backward, the forward that they belong to: its statistics as the kernel gets them)."""
        c, want = self.case, self.case.expected(a)
        mean = want.mean.astype(np.float32)
        shift, rstd = (want.mean - mean).astype(np.float32), want.rstd.astype(np.float32)
        cts = c.cotangents()
        operands = {"n": a["x"] if want.residual_out is None else want.residual_out}
        if want.residual_out is None and "x_bias" in a:
            operands["x_bias"] = a["x_bias"]
        operands |= {k: a[k] for k in ("weight",) if k in a}
        operands |= {"mean": mean[:, 0], "shift": shift[:, 0], "rstd": rstd[:, 0], "dy": cts[0]}
        if len(cts) > 1:
            operands["dresidual_out"] = cts[1]
        return operands, replace(want, mean=mean.astype(np.float64) + shift, rstd=rstd.astype(np.float64))

    def sums(self) -> dict[str, str]:
        """Gradients of vectors: their dtypes."""
        return {oracle.SUMS[k]: self.case.dtype(k) for k in ("weight", "bias", "x_bias") if self.case.dtype(k) != NONE}

    def backward(self, operands: dict[str, np.ndarray]) -> Problem:
        c, wide = self.case, (self.rows, self.case.features)
        split = c.dtype("residual") if c.dtype("residual") not in (NONE, c.x) else None
        results = [("dx", wide, c.x), ("dresidual", wide, split)]
        results += [(name, (c.features,), dtype) for name, dtype in self.sums().items()]
        options = {"weight_offset": c.options.get("weight_offset", 0.0)}
        return _problem("layernorm_bwd", c.lead, c.features, [*_operands(operands), *results], options, self.target)

    def check_backward(self, a, operands, forward: oracle.Forward, out: dict[str, np.ndarray]) -> None:
        cts = [operands["dy"], operands.get("dresidual_out")]
        want = self.case.backward(forward, a, cts)
        tolerances.assert_dx(out["dx"], want)
        if "dresidual" in out:
            tolerances.assert_dx(out["dresidual"], want, "dresidual")
        for name in self.sums():
            oracle.assert_sum(out[name], want, name)


@dataclass(frozen=True)
class QuantCall:
    case: QuantCase
    target: str = "sm_90"

    def __str__(self) -> str:
        return f"{self.target}-{self.case.id}"

    @property
    def rows(self) -> int:
        return self.case.lead[0]

    def arrays(self) -> dict[str, np.ndarray]:
        a = self.case.arrays()
        order = [k for k in (*ORDER, "smooth_scale", "static_scale") if k in a]
        return {k: a[k].reshape(1) if k == "static_scale" else a[k] for k in order}

    @property
    def width(self) -> int:
        p = self.case.options.get("pad_to_multiple") or 1
        return -(-self.case.features // p) * p

    def scale_shape(self) -> tuple[int, int]:
        spec = self.case.spec
        groups = self.width // spec.group_size if spec.group_size else 1
        if spec.scale_layout == "column":
            return groups, self.rows
        if spec.scale_layout == "shuffled":
            return (self.rows if self.rows % 32 == 0 else -(-self.rows // 256) * 256), -(-groups // 8) * 8
        return self.rows, groups

    def problem(self, a: dict[str, np.ndarray]) -> Problem:
        c = self.case
        spec = replace(c.spec, dtype=c.name)
        packed = spec.dtype == "fp4"
        scale = None if "static_scale" in a else "uint8" if spec.scale_dtype == "e8m0" else F32
        results = [
            ("values", (self.rows, self.width // (1 + packed)), spec.value_dtype),
            ("scale", self.scale_shape(), scale),
            ("residual_out", (self.rows, c.features), c.residual_dtype),
            ("y", (self.rows, self.width), c.options.get("out_dtype", c.x_dtype) if c.keep else None),
        ]
        options = {**_settings(c.options), "spec": spec, "fp8": False}
        return _problem("layernorm_quant_fwd", c.lead, c.features, [*_operands(a), *results], options, self.target)

    def check(self, a: dict[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        """By the oracle of the public function: the result put together as the library does."""
        import jaxnorm

        c, spec = self.case, replace(self.case.spec, dtype=self.case.name)
        a = {k: v.reshape(()) if k == "static_scale" else v for k, v in a.items()}
        values = out["values"].view(cases.dtype(spec.value_dtype))
        scale = out.get("scale", a.get("static_scale"))
        q: Any = jaxnorm.Quantized(values, scale, spec)
        oracle_quant.assert_quantized(q, c.expected(a), spec, str(self))
        if c.residual_dtype:
            tolerances.assert_same_bits(out["residual_out"], c.norm(a).residual_out, "residual_out")
        if c.keep:
            oracle.assert_y(out["y"], c.norm(a))
