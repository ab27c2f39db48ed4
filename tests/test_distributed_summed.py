"""Kernels that add up the partial sums of the ranks in rank order: on the CPU in waves of 32 and 64, and their machine code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cases
import isa
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import simt_build
import test_distributed
import test_hip_compile
import tolerances
from cases_distributed import Call, mesh_of
from jaxnorm.kernels.configs import Launch, Problem, quant_hip, rmsnorm_hip

import jaxnorm
from jaxnorm import QuantSpec, _explain, _launch, _native
from jaxnorm._compile import hip
from jaxnorm.distributed import schedule, summed
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

    def config(self) -> Config:
        return Config("reduce_scatter_rmsnorm_quant_all_gather", "tp", self.ranks, self.rows, self.features, self.x, self.spec,
                      self.norm, 1e-6, 0.0, self.cast, True, True, "exact", 30.0)  # fmt: skip

    def problem(self, arrays: dict[str, np.ndarray]) -> Problem:
        config = self.config()
        avals = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in arrays.items()}
        return _launch.problem(summed.stage_call(config, avals, self.spec), list(avals.values()), self.target)


def added_up(p: Problem) -> Problem:
    """The same on the float32 sum."""
    m, n = p.shape("x")[1:]
    return replace(p, shapes=tuple((k, (m, n) if k == "x" else s) for k, s in p.shapes),
                   dtypes=tuple((k, F32 if k == "x" else d) for k, d in p.dtypes),
                   options=tuple(o for o in p.options if o[0] != "parts"))  # fmt: skip


RUN = {
    "two ranks": Case(2, 5, 768, FP8, residual=F32),
    "eight ranks": Case(8, 5, 768, FP8, residual=F32),
    "read again": Case(3, 3, 1600, x=F16, residual=BF16),
    "wave of 64": Case(4, 3, 1024, MX, weight=None, target="gfx942"),
    "layernorm": Case(4, 2, 2048, x=F32, norm="layernorm", target="gfx942"),
}
STORAGE = {"read again": {"lanes": 64, "regs": 1, "shared": 1}}


def plan(name: str, p: Problem) -> tuple[Launch, ...]:
    """That of the module, or with other storage."""
    if name in STORAGE:
        return (rmsnorm_hip._forward_launch(p, rmsnorm_hip.Forward(**STORAGE[name])),)
    return (quant_hip if RUN[name].spec else rmsnorm_hip).plan(p)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    both = [(name, p) for name, c in RUN.items() for p in (c.problem(c.arrays()), added_up(c.problem(c.arrays())))]
    return simt_build.Kernels([(p.target, plan(name, p)) for name, p in both])


@pytest.mark.parametrize("name", RUN)
def test_bits(kernels: simt_build.Kernels, name: str) -> None:
    """Those of the ordinary kernel on the sum, which numpy adds up in rank order."""
    arrays = RUN[name].arrays()
    p = RUN[name].problem(arrays)
    got = kernels.run(p, plan(name, p), arrays, "shuffled")
    total = arrays["x"][0].astype(np.float32)
    for part in arrays["x"][1:]:
        total = total + part.astype(np.float32)
    want = kernels.run(added_up(p), plan(name, added_up(p)), {**arrays, "x": total})
    assert set(got) == set(want)
    for result, value in want.items():
        tolerances.assert_same_bits(got[result], value, result)


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx1100"])
def test_machine_code(target: str) -> None:
    """All partials of a chunk in accesses of 16 bytes, all of a row on chip, nothing spilled."""
    test_hip_compile.need_compiler(target)
    case = Case(8, 16, 8192, FP8, residual=BF16, target=target)
    shapes = {"x": (8, 16, 8192), "residual": (16, 8192), "weight": (8192,)}
    p = case.problem({k: np.zeros(s, cases.dtype(BF16)) for k, s in shapes.items()})
    (launch,) = quant_hip.plan(p)
    text = test_hip_compile.machine_code(launch, p)
    test_hip_compile.assert_no_spills(text, launch, target)
    count = isa.counts(text, target)
    assert count["load16"] == (8 + 1 + 1) * dict(launch.constants)["JN_REGS"], count
    assert dict(launch.constants)["JN_REGS"] * launch.threads * 8 >= 8192, "a chunk is read again"


@pytest.mark.parametrize("name", ["column", "allreduce-few"])
def test_composite(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the stages between the collectives, which the reference serves here: the bits of the sum apart, typed alike."""
    needs.need_devices(8)
    call = test_distributed.CALLS[name]
    arrays, mesh = call.inputs(), mesh_of((call.ranks,), ("tp",))
    placed = call.place(arrays, mesh, "tp")
    want = call.sharded(mesh, "tp")(placed)
    asked = []
    monkeypatch.setattr(summed, "serves", lambda *a: asked.append(a) or True)
    got = call.sharded(mesh, "tp")(placed)
    assert asked
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        tolerances.assert_same_bits(a, b)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the sum apart."""
    needs.need_devices(8)
    call, mesh = Call(5, 32, 2, residual="bfloat16"), mesh_of((2,), ("tp",))
    arrays = {k: np.nan_to_num(a) for k, a in call.inputs(3).items()}
    placed = call.place(arrays, mesh, "tp")
    cotangents = [jnp.ones((5, 32), jnp.bfloat16), jnp.asarray(arrays["residual"])]
    want = test_distributed._backward(call, mesh, True)(placed, cotangents)
    monkeypatch.setattr(summed, "serves", lambda *a: True)
    got = test_distributed._backward(call, mesh, True)(placed, cotangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        tolerances.assert_same_bits(a, b)


def test_who_adds_up() -> None:
    """On a GPU the kernel, unless a backend is named that has none; on the CPU XLA."""
    needs.need("launcher", _native.status().ok, _native.status().reason)
    needs.need("nvrtc", *hip.available("sm_90")[:2])
    call = test_distributed.CALLS["token"]
    avals = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in call.inputs().items()}
    f = call.sharded(jax.sharding.AbstractMesh((call.ranks,), ("tp",)), "tp", impl="composite")

    def dims() -> list[str]:
        stages = _explain._stages(jax.make_jaxpr(f)(avals).jaxpr)
        return [" ".join(stage.dims("x")) for stage, shapes in stages if shapes is not None]

    assert dims() == ["... n"]
    with jaxnorm.use_target({"cuda": "sm_90"}):
        assert dims() == ["w ... n"]
        assert f"adds up the partial sums of {call.ranks} ranks" in jaxnorm.explain(f, avals)[1].config
        with jaxnorm.use_backend("triton"):
            assert dims() == ["... n"]
        with summed.apart():
            assert dims() == ["... n"]


@pytest.mark.parametrize(
    ("ranks", "rows", "exact", "native"),
    [(2, 512, True, True), (2, 1024, False, True), (2, 8192, False, False), (4, 64, True, True), (4, 128, False, True),
     (4, 1024, False, False), (8, 4, True, True), (8, 128, False, False)],
)  # fmt: skip
def test_who_gathers(ranks: int, rows: int, exact: bool, native: bool) -> None:
    """Few rows of partials are gathered, and all-reduced up to other sizes, as measured on two and four GPUs."""
    config = Case(ranks, rows, 8192, FP8).config()
    with jaxnorm.use_target({"cuda": "sm_90"}):
        assert schedule.few_rows(config) is exact
        assert schedule.few_rows(replace(config, reduce="native")) is native
