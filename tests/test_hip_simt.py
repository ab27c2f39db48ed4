"""The bodies of the HIP kernels, unmodified, on the CPU in waves of 32 and 64: indexing, tails, sums and rounding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cases
import needs
import numpy as np
import oracle
import pytest
import simt_build
import tolerances
from jaxnorm.kernels.configs import Launch, Problem, rmsnorm_hip

from jaxnorm._paths import csrc_dir

BF16, F16, F32 = cases.FLOATS
TARGETS = ("sm_90", "gfx942")  # waves of 32 with asynchronous copies, waves of 64 without
LONG = 131072


@dataclass(frozen=True)
class Case:
    """One call of a stage."""

    features: int
    rows: int = 5
    x: str = BF16
    residual: str | None = None
    weight: str | None = BF16
    y: str | None = None
    pad: int = 1
    options: dict = field(default_factory=dict, hash=False)
    rstd: bool = True
    target: str = "sm_90"

    def __str__(self) -> str:
        short = {BF16: "b", F16: "h", F32: "f", None: "-"}
        kinds = "".join(short[k] for k in (self.x, self.residual, self.weight, self.y))
        pad = [f"p{self.pad}"] if self.pad > 1 else []
        return "-".join([self.target, f"{self.rows}x{self.features}", kinds, *pad, *map(str, self.options.values())])

    @property
    def padded(self) -> int:
        return -(-self.features // self.pad) * self.pad

    @property
    def y_type(self) -> str:
        return self.y or self.x

    def settings(self) -> dict:
        return {"eps": 1e-6, "weight_offset": 0.0, "cast": "output", "residual_rounding": "float32"} | self.options

    def forward(self) -> Problem:
        m, n = self.rows, self.features
        buffers = [("x", (m, n), self.x), ("residual", (m, n), self.residual), ("weight", (n,), self.weight),
                   ("y", (m, self.padded), self.y_type), ("residual_out", (m, n), self.residual),
                   ("rstd", (m,), F32 if self.rstd else None)]  # fmt: skip
        return problem("rmsnorm_fwd", self, buffers, self.settings())

    def backward(self) -> Problem:
        m, n = self.rows, self.features
        saved = self.residual or self.x
        split = self.x if self.residual and self.residual != self.x else None
        buffers = [
            ("n", (m, n), saved),
            ("weight", (n,), self.weight),
            ("rstd", (m,), F32),
            ("dy", (m, self.padded), self.y_type),
            ("dresidual_out", (m, n), self.residual),
            ("dx", (m, n), self.x),
            ("dresidual", (m, n), self.residual if split else None),
            ("dweight", (n,), self.weight),
        ]
        return problem("rmsnorm_bwd", self, buffers, {"weight_offset": self.settings()["weight_offset"]})

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        g = cases.rng(self.features + self.rows)
        shape = (self.rows, self.features)
        residual = cases.normal(g, shape, self.residual, std=2.0) if self.residual else None
        return cases.normal(g, shape, self.x), residual, cases.weight(g, self.features, self.weight)

    def expected(self, x, residual, weight) -> oracle.Forward:
        s = self.settings()
        shared = {
            "eps": s["eps"],
            "weight_offset": s["weight_offset"],
            "cast": s["cast"],
            "out_dtype": self.y,
            "pad_to_multiple": self.pad,
        }
        if residual is None:
            return oracle.rmsnorm(x, weight, **shared)
        return oracle.add_rmsnorm(x, residual, weight, residual_rounding=s["residual_rounding"], **shared)


def problem(stage: str, case: Case, buffers: list, options: dict) -> Problem:
    there = [b for b in buffers if b[2] is not None]
    return Problem(stage, case.rows, case.features, tuple((n, s) for n, s, _ in there), tuple((n, d) for n, _, d in there),
                   tuple(options.items()), case.target)  # fmt: skip


BEFORE = {"cast": "before_weight", "weight_offset": 1.0}
GEMMA = {"weight_offset": 1.0, "eps": 1e-5}
ROUNDED = {"residual_rounding": "input", "cast": "before_weight"}
FORWARD = [
    Case(1), Case(2, rows=9, residual=BF16), Case(3, x=F16, weight=F32, options=GEMMA),
    Case(7, rows=33, residual=F32, y=F32),
    Case(31, x=F32, weight=None), Case(97, rows=17, x=F16, residual=F16, options=ROUNDED), Case(128, rows=19, options=BEFORE),
    Case(128, rows=11, residual=BF16, weight=F32), Case(384, rows=3, pad=256), Case(769, residual=BF16, options=GEMMA),
    Case(1000, x=BF16, y=F32), Case(1000, x=F32, residual=BF16, weight=F16, y=BF16, rstd=False), Case(1024, rows=9, x=F16, y=BF16),
    Case(1024, rows=6, residual=F32, options=ROUNDED), Case(2880, rows=2, pad=256, residual=BF16),
    Case(5125, rows=2, x=F32, weight=BF16),
    Case(4096, rows=3, weight=F32, options=GEMMA), Case(4096, rows=2, residual=BF16, options={"residual_rounding": "input"}),
    Case(65536, rows=1, residual=BF16), Case(LONG, rows=1, rstd=False), Case(LONG, rows=1, x=F32, weight=F32),
]  # fmt: skip
BACKWARD = [
    Case(1, rows=70), Case(2, rows=9, residual=BF16), Case(3, x=F16, weight=F32, options=GEMMA),
    Case(31, rows=40, x=F32, weight=None),
    Case(97, rows=50, x=F16, residual=F16), Case(128, rows=300, options=GEMMA), Case(384, rows=30, pad=256),
    Case(769, residual=BF16),
    Case(1000, rows=60, y=F32, residual=F32), Case(1000, x=F32, residual=BF16, weight=F16, y=BF16),
    Case(1024, rows=130, weight=F32),
    Case(2880, rows=9, pad=256, residual=BF16, options=GEMMA), Case(5125, rows=7), Case(4096, rows=40), Case(8192, rows=3, x=F32),
    Case(65536, rows=5, residual=BF16),
]  # fmt: skip


def on_targets(listed: list[Case]) -> list[Case]:
    return [replace(c, target=t) for c in listed for t in TARGETS]


def forced(case: Case, **changes) -> tuple[Launch, ...]:
    """A forward plan with other storage than the ladder would choose."""
    p = case.forward()
    kind = rmsnorm_hip.Ahead if "depth" in changes else rmsnorm_hip.Forward
    return (rmsnorm_hip._forward_launch(p, kind(**changes)),)


# One row through every tier and thread count: all must give the same bits.
TIERS = Case(4096, rows=2, residual=BF16)
TIER_SHAPES = {
    32: [
        {"lanes": 32, "groups": 2, "regs": 16},
        {"lanes": 512},
        {"lanes": 96, "regs": 2, "shared": 2},
        {"lanes": 64, "regs": 1, "shared": 5},
        {"lanes": 160, "regs": 1, "shared": 1},
        {"lanes": 256, "regs": 2, "early": True},
        {"lanes": 64, "regs": 3},
    ],
    64: [
        {"lanes": 64, "groups": 2, "regs": 8},
        {"lanes": 512},
        {"lanes": 128, "regs": 1, "shared": 2},
        {"lanes": 192, "regs": 3, "early": True},
    ],
}
SHORT = Case(128, rows=37)
SHORT_SHAPES = [
    {"lanes": 16, "groups": 8},
    {"lanes": 4, "groups": 16, "unroll": 2, "regs": 4},
    {"lanes": 8, "groups": 16, "unroll": 4, "regs": 2, "early": True},
]
TIER_CASES = [(replace(TIERS, target=t), s) for t, w in zip(TARGETS, (32, 64), strict=True) for s in TIER_SHAPES[w]]
# Blocks that walk, one to three rows ahead, over more rows than blocks and fewer: the bits of the plan.
AHEAD = Case(1000, rows=11, pad=256, options=GEMMA)
AHEAD_SHAPES = [{"depth": d, "blocks": b, "early": d == 2} for d, b in ((1, 2), (2, 3), (3, 16))]
AHEAD_CASES = [
    (replace(AHEAD, target=t, residual=r), {"lanes": n, "regs": -(-125 // n), **s})
    for t, n in zip(TARGETS, (64, 128), strict=True) for r in (None, BF16) for s in AHEAD_SHAPES
]  # fmt: skip
SHORT_CASES = [(replace(SHORT, target=t), s) for t in TARGETS for s in SHORT_SHAPES]

# The backward pass with each way of walking the rows.
WALK = Case(1024, rows=23, residual=BF16)
WALKS = [
    {"lanes": 32, "groups": 4, "blocks": 1, "depth": 2, "shared_pipe": True, "hold_weight": False},
    {"lanes": 128, "groups": 1, "blocks": 1, "depth": 4, "shared_pipe": True, "hold_weight": True},
    {"lanes": 64, "groups": 1, "blocks": 1, "depth": 1, "shared_pipe": False, "hold_weight": True},
    {"lanes": 64, "groups": 1, "blocks": 16, "depth": 3, "shared_pipe": True, "hold_weight": True, "tile": 48},
]


def walks() -> list[tuple[Problem, tuple[Launch, ...]]]:
    p = WALK.backward()
    return [(p, rmsnorm_hip._backward_launches(p, rmsnorm_hip.Backward(**w))) for w in WALKS]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Kernels:
    needs.need("gxx", not (why := simt_build.missing()), why)
    plans = [(c.target, rmsnorm_hip.plan(c.forward())) for c in on_targets(FORWARD)]
    plans += [(c.target, rmsnorm_hip.plan(c.backward())) for c in on_targets(BACKWARD)]
    plans += [(c.target, forced(c, **s)) for c, s in TIER_CASES + SHORT_CASES + AHEAD_CASES]
    plans += [(c.target, rmsnorm_hip.plan(c.forward())) for c, _ in AHEAD_CASES]
    plans += [(p.target, plan) for p, plan in walks()]
    return simt_build.Kernels(plans)


def run_forward(kernels, case: Case, plan=None, order: str = "forward", arrays=None) -> dict[str, np.ndarray]:
    p = case.forward()
    x, residual, weight = arrays or case.arrays()
    operands = {n: a for n, a in (("x", x), ("residual", residual), ("weight", weight)) if a is not None}
    return kernels.run(p, plan or rmsnorm_hip.plan(p), operands, order)


@pytest.mark.parametrize("case", on_targets(FORWARD), ids=str)
def test_forward(kernels, case: Case) -> None:
    arrays = case.arrays()
    out = run_forward(kernels, case, order=("forward", "reverse", "shuffled")[case.features % 3], arrays=arrays)
    want = case.expected(*arrays)
    tolerances.assert_y(out["y"], want, case.settings()["cast"])
    if case.residual:
        tolerances.assert_same_bits(out["residual_out"], want.residual_out, "residual_out")
    if case.rstd:
        np.testing.assert_allclose(out["rstd"], want.rstd[:, 0], rtol=2.0**-20)


@pytest.mark.parametrize("case", on_targets(BACKWARD), ids=str)
def test_backward(kernels, case: Case) -> None:
    p = case.backward()
    x, residual, weight = case.arrays()
    forward = case.expected(x, residual, weight)
    g = cases.rng(7)
    dy = cases.normal(g, (case.rows, case.padded), case.y_type)
    dy[:, case.features :] = np.nan  # columns of the padding must not be looked at
    dr = cases.normal(g, x.shape, case.residual) if case.residual else None
    saved = x if residual is None else forward.residual_out
    operands = {
        "n": saved,
        "weight": weight,
        "rstd": forward.rstd[:, 0].astype(np.float32),
        "dy": dy,
        "dresidual_out": dr,
    }
    operands = {k: v for k, v in operands.items() if v is not None}
    plan = rmsnorm_hip.plan(p)
    out = kernels.run(p, plan, operands, order="reverse")
    # rstd is an operand here: the oracle takes the float32 that the kernel gets
    rounded = replace(forward, rstd=operands["rstd"].astype(np.float64)[:, None])
    want = oracle.rmsnorm_backward(rounded, weight, dy, dr, weight_offset=case.settings()["weight_offset"])
    tolerances.assert_dx(out["dx"], want)
    if p.has("dresidual"):
        tolerances.assert_dx(out["dresidual"], want, "dresidual")
    if weight is not None:
        tolerances.assert_dweight(out["dweight"], want)
        again = kernels.run(p, plan, operands, order="shuffled")
        tolerances.assert_same_bits(again["dweight"], out["dweight"], "dweight of a second run")


@pytest.mark.parametrize(("group", "shapes"), [("tiers", TIER_CASES), ("short", SHORT_CASES)], ids=["tiers", "short"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_plan_has_the_same_bits(kernels, target: str, group: str, shapes: list) -> None:
    shapes = [(c, s) for c, s in shapes if c.target == target]
    results = [run_forward(kernels, c, forced(c, **s)) for c, s in shapes]
    for (_, shape), other in zip(shapes[1:], results[1:], strict=True):
        for name, value in results[0].items():
            tolerances.assert_same_bits(other[name], value, f"{name} of {shape}")


@pytest.mark.parametrize(("case", "shape"), AHEAD_CASES, ids=str)
def test_rows_ahead(kernels, case: Case, shape: dict) -> None:
    want = run_forward(kernels, case)
    tolerances.assert_y(want["y"], case.expected(*case.arrays()), "output")
    out = run_forward(kernels, case, forced(case, **shape), "shuffled")
    for name, value in want.items():
        tolerances.assert_same_bits(out[name], value, name)


def test_walks_have_the_same_dx(kernels) -> None:
    x, residual, weight = WALK.arrays()
    forward = WALK.expected(x, residual, weight)
    dy, dr = cases.normal(cases.rng(8), x.shape, BF16), cases.normal(cases.rng(9), x.shape, BF16)
    operands = {
        "n": forward.residual_out,
        "weight": weight,
        "rstd": forward.rstd[:, 0].astype(np.float32),
        "dy": dy,
        "dresidual_out": dr,
    }
    want = oracle.rmsnorm_backward(forward, weight, dy, dr)
    results = [kernels.run(p, plan, operands, order="shuffled") for p, plan in walks()]
    for result in results:
        tolerances.assert_dweight(result["dweight"], want)
        tolerances.assert_same_bits(result["dx"], results[0]["dx"], "dx")
    tolerances.assert_dx(results[0]["dx"], want)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_do_not_depend_on_their_company(kernels, target: str) -> None:
    """Alone, in another position, beside a NaN or an infinity: the same bits. The plan may look at M, the sum may not."""
    case = Case(128, rows=19, options=BEFORE, target=target)
    x, _, weight = case.arrays()
    first = run_forward(kernels, case, arrays=(x, None, weight))
    spoiled = np.roll(x, 4, axis=0)
    spoiled[1, 5], spoiled[2, 7] = np.nan, np.inf
    second = run_forward(kernels, case, arrays=(spoiled, None, weight))
    for name in ("y", "rstd"):
        moved = np.roll(second[name], -4, axis=0)
        keep = np.delete(np.arange(case.rows), [case.rows - 3, case.rows - 2])
        tolerances.assert_same_bits(moved[keep], first[name][keep], name)
    assert np.isnan(second["y"][1].astype(np.float32)).all()
    assert not np.isfinite(second["y"][2, 7].astype(np.float32))


def test_plans_of_different_rows_share_their_order_of_sums() -> None:
    """The constants that the order of a sum depends on are the same for every M (csrc/include/jaxnorm/reduce.h)."""
    for features in (128, 1000, 4096, 5125, 65536):
        for target in TARGETS:
            plans = [
                rmsnorm_hip.plan(Case(features, rows=m, target=target).forward())[0]
                for m in (1, 16, 1000, 1 << 20, 1 << 31)
            ]
            assert len({dict(launch.constants)["JN_V"] for launch in plans}) == 1


def test_more_blocks_than_a_grid_dimension_holds() -> None:
    """Blocks beyond 2^21 are folded into y; kernel and plan agree on the fold, and every row has its block."""
    assert "kGridX = 1u << 21;" in (csrc_dir() / "include" / "jaxnorm" / "gpu.h").read_text()
    for features, rows in ((8192, 1 << 31), (128, (1 << 24) + 1), (4096, 1 << 21)):
        for target in TARGETS:
            (launch,) = rmsnorm_hip.plan(Case(features, rows=rows, target=target).forward())
            constants, (x, y, _) = dict(launch.constants), launch.grid
            assert x <= 1 << 21
            assert y == 1 or x == 1 << 21
            assert y < 1 << 16
            assert x * y * constants["JN_GROUPS"] * constants["JN_UNROLL"] >= rows
