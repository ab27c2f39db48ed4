"""Kernels that add up the partial sums of the ranks in rank order: on the CPU in waves of 32 and 64, and their machine code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import jax
import needs
import numpy as np
import pytest
import simt_build
import test_hip_compile
import tolerances
from jaxnorm.kernels.configs import Launch, Problem, quant_hip, rmsnorm_hip

from jaxnorm import QuantSpec, _launch
from jaxnorm.distributed import summed
from jaxnorm.distributed._config import Config

BF16, F16, F32 = cases.FLOATS
FP8, INT8 = QuantSpec("float8_e4m3fn"), QuantSpec("int8", group_size=128, scale_layout="column")
MX = QuantSpec("fp4", group_size=32, scale_dtype="e8m0", scale_layout="shuffled")


@dataclass(frozen=True)
class Case:
    """One call of a stage on x [ranks, rows, features]."""

    ranks: int
    rows: int
    features: int
    spec: QuantSpec | None = None
    x: str = BF16
    residual: str | None = None
    weight: str | None = BF16
    norm: str = "rmsnorm"
    cast: str = "output"
    target: str = "sm_90"

    def arrays(self) -> dict[str, np.ndarray]:
        g, shape = cases.rng(self.ranks * self.features), (self.rows, self.features)
        found = {
            "x": cases.normal(g, (self.ranks, *shape), self.x),
            "residual": cases.normal(g, shape, self.residual, std=2.0) if self.residual else None,
            "weight": cases.weight(g, self.features, self.weight) if self.weight else None,
            "bias": cases.weight(g, self.features, self.weight) if self.norm == "layernorm" else None,
        }
        return {k: v for k, v in found.items() if v is not None}

    def problem(self, arrays: dict[str, np.ndarray]) -> Problem:
        config = Config("reduce_scatter_rmsnorm_quant_all_gather", "tp", self.ranks, self.rows, self.features, self.x, self.spec,
                        self.norm, 1e-6, 0.0, self.cast, True, True, "exact", 30.0)  # fmt: skip
        avals = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in arrays.items()}
        return _launch.problem(summed.stage_call(config, avals, self.spec), list(avals.values()), self.target)

    def plan(self, p: Problem) -> tuple[Launch, ...]:
        return (quant_hip if self.spec else rmsnorm_hip).plan(p)


def added_up(p: Problem) -> Problem:
    """The same on the float32 sum."""
    m, n = p.shape("x")[1:]
    return replace(p, shapes=tuple((k, (m, n) if k == "x" else s) for k, s in p.shapes),
                   dtypes=tuple((k, F32 if k == "x" else d) for k, d in p.dtypes),
                   options=tuple(o for o in p.options if o[0] != "parts"))  # fmt: skip


RUN = [
    Case(2, 5, 768, FP8),
    Case(4, 3, 4096, residual=BF16),
    Case(8, 9, 1000, x=F16, residual=F32, weight=F32, target="gfx942"),
    Case(3, 33, 128, INT8, residual=BF16, target="gfx942"),
    Case(4, 6, 1024, MX, x=F32, weight=None),
    Case(2, 2, 31, x=F16, weight=F32),
    Case(8, 1, 40960, FP8, residual=F32),  # registers, shared memory, and read again
    Case(8, 1, 131072, target="gfx942"),
    Case(4, 5, 1600, norm="layernorm", weight=F32),
    Case(2, 3, 2048, FP8, residual=F16, norm="layernorm", target="gfx942"),
]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    problems = [(c, c.problem(c.arrays())) for c in RUN]
    plans = [(c.target, c.plan(q)) for c, p in problems for q in (p, added_up(p))]
    return simt_build.Kernels(plans)


@pytest.mark.parametrize("case", RUN, ids=str)
def test_bits(kernels: simt_build.Kernels, case: Case) -> None:
    """Those of the ordinary kernel on the sum, which numpy adds up in rank order."""
    arrays = case.arrays()
    p = case.problem(arrays)
    got = kernels.run(p, case.plan(p), arrays, "shuffled")
    total = arrays["x"][0].astype(np.float32)
    for part in arrays["x"][1:]:
        total = total + part.astype(np.float32)
    q = added_up(p)
    want = kernels.run(q, case.plan(q), {**arrays, "x": total})
    assert set(got) == set(want)
    for name, value in want.items():
        tolerances.assert_same_bits(got[name], value, name)
