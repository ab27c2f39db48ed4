"""The RMSNorm kernels in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import dataclasses

import needs
import numpy as np
import oracle
import pytest
import tolerances

triton = pytest.importorskip("triton", reason="needs triton: not installed")

import interpreter  # noqa: E402
from jaxnorm.kernels.configs import Problem, rmsnorm_triton  # noqa: E402

BF16, F16, F32 = "bfloat16", "float16", "float32"
FLOATS = (BF16, F16, F32)


def problem(stage, arrays, results, target, **options) -> Problem:
    """``arrays``: operands by name; ``results``: (name, shape, dtype)."""
    first = next(iter(arrays.values()))
    buffers = [*((k, a.shape, a.dtype.name) for k, a in arrays.items()), *results]
    return Problem(stage, *first.shape, tuple((k, s) for k, s, _ in buffers), tuple((k, d) for k, _, d in buffers),
                   tuple(options.items()), target)  # fmt: skip


def normal(rng, shape, name, mean=0.0) -> np.ndarray:
    return oracle.round_to(rng.standard_normal(shape) + mean, name)


@dataclasses.dataclass
class Case:
    """One forward and its backward; ``padded`` is P."""

    rows: int
    features: int
    x: str = BF16
    weight: str | None = BF16
    residual: str | None = None
    out: str | None = None
    padded: int | None = None
    offset: float = 0.0
    cast: str = "output"
    residual_rounding: str = "float32"
    eps: float = 1e-6
    rstd: bool = True
    target: str = "sm_90"

    @property
    def width(self) -> int:
        return self.padded or self.features

    def operands(self, seed=0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        shape = (self.rows, self.features)
        arrays = {"x": normal(rng, shape, self.x)}
        if self.residual:
            arrays["residual"] = normal(rng, shape, self.residual)
        if self.weight:
            arrays["weight"] = normal(rng, shape[1:], self.weight, 1.0 - self.offset)
        return arrays

    def problem(self, arrays) -> Problem:
        shape = (self.rows, self.features)
        results = [("y", (self.rows, self.width), self.out or self.x)]
        if self.residual:
            results.append(("residual_out", shape, self.residual))
        if self.rstd:
            results.append(("rstd", shape[:1], F32))
        return problem("rmsnorm_fwd", arrays, results, self.target, eps=self.eps, weight_offset=self.offset, cast=self.cast,
                       residual_rounding=self.residual_rounding)  # fmt: skip

    def oracle(self, arrays) -> oracle.Forward:
        options = {
            "eps": self.eps,
            "weight_offset": self.offset,
            "cast": self.cast,
            "out_dtype": self.out,
            "pad_to_multiple": self.padded,
        }
        weight = arrays.get("weight")
        if self.residual:
            residual_rounding = self.residual_rounding
            return oracle.add_rmsnorm(
                arrays["x"], arrays["residual"], weight, residual_rounding=residual_rounding, **options
            )
        return oracle.rmsnorm(arrays["x"], weight, **options)

    def check(self, got, arrays) -> None:
        want = self.oracle(arrays)
        tolerances.assert_y(got["y"], want, self.cast)
        if self.residual:
            tolerances.assert_same_values(got["residual_out"], want.residual_out, "residual_out")
        if self.rstd:
            np.testing.assert_allclose(got["rstd"], want.rstd[:, 0], rtol=2.0**-20)


def forward(case: Case, arrays=None, plan=rmsnorm_triton.plan, **kw):
    arrays = arrays or case.operands()
    p = case.problem(arrays)
    return interpreter.run(plan(p), p, arrays, **kw)


def long_plan(block=64):
    """The loop over a row that one tile would hold: the same code at a size the interpreter likes."""

    def plan(p):
        loop = dataclasses.replace(rmsnorm_triton._loop(p), block=block)
        if p.stage == "rmsnorm_fwd":
            return (rmsnorm_triton._fwd_long(p, loop),)
        return rmsnorm_triton._bwd_long(p, loop)

    return plan


def test_the_interpreter_is_the_one_we_know():
    missing = interpreter.expected_internals()
    assert not missing, (
        f"the interpreter changed: triton {triton.__version__} has no {missing}; adapt tests/interpreter.py"
    )


def test_the_interpreter_rounds_to_nearest_even_and_truncates_without_us():
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    values = np.array([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 3 * 2.0**-9], np.float32)
    want = oracle.round_to(values, BF16)
    cast = interpreter_builder.create_fp_trunc
    raw = cast(TensorHandle(values, tl.float32), tl.bfloat16).data
    good = interpreter._rounding_cast(cast)(TensorHandle(values, tl.float32), tl.bfloat16).data
    assert (good.view(np.uint16) == want.view(np.uint16)).all()
    assert (raw.view(np.uint16) != want.view(np.uint16)).any(), (
        "the interpreter changed: it rounds by itself now, drop ours"
    )


def test_guards_catch_a_write_next_to_the_array():
    guarded = interpreter.Guarded((3, 5), np.float32)
    guarded.check("clean")
    guarded.raw[guarded.stop] = 0
    with pytest.raises(AssertionError, match="after the array"):
        guarded.check("dirty")


FORWARD = [
    Case(1, 4096),
    Case(3, 1024),
    Case(7, 769),
    Case(7, 768, x=F32, weight=F32),
    Case(3, 2880, padded=3072),
    Case(5, 1),
    Case(3, 2),
    Case(5, 3),
    Case(40, 7),
    Case(3, 10),
    Case(7, 31, x=F16, weight=F32),
    Case(2, 97),
    Case(9, 128),
    Case(3, 409),
    Case(3, 1245, x=F16),
    Case(2, 3571, x=F32, weight=BF16),
    Case(2, 5125),
    Case(17, 128, padded=160),
    Case(3, 1152, weight=F32, offset=1.0),
    Case(3, 1000, weight=None),
    Case(3, 257, out=F32),
    Case(3, 512, x=F32, out=F16, weight=F16),
    Case(3, 768, cast="before_weight"),
    # float32 results show a missing inner rounding, which the tolerance of a 16-bit result hides
    Case(3, 768, out=F32, cast="before_weight"),
    Case(3, 300, residual=BF16, residual_rounding="input", out=F32),
    Case(3, 768, x=F16, weight=F32, cast="before_weight", offset=0.5),
    Case(3, 2560, residual=BF16),
    Case(3, 1024, residual=F32, weight=F32, offset=1.0),
    Case(7, 96, residual=F16, residual_rounding="input"),
    Case(3, 83, x=F32, residual=BF16, residual_rounding="input", cast="before_weight"),
    Case(3, 130, residual=F32, padded=256, rstd=False),
    Case(5, 1024, target="gfx942"),
    Case(9, 2048, residual=BF16, target="gfx942"),
    Case(3, 769, target="gfx1100"),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    arrays = case.operands()
    case.check(forward(case, arrays), arrays)


@pytest.mark.parametrize(
    "case",
    [Case(3, 256), Case(2, 200, weight=F32, offset=1.0), Case(2, 97, residual=BF16), Case(2, 130, padded=192, residual=F32),
     Case(2, 128, residual=F16, residual_rounding="input", cast="before_weight"), Case(2, 70, x=F32, weight=None, padded=128)],
    ids=str,
)  # fmt: skip
def test_forward_of_long_rows(case):
    arrays = case.operands()
    case.check(forward(case, arrays, long_plan()), arrays)


@pytest.mark.parametrize("case", [Case(3, 256), Case(2, 97, residual=BF16, offset=1.0, weight=F32), Case(2, 70, padded=128)],
                         ids=str)  # fmt: skip
def test_the_weight_may_be_asked_for_early(case):
    """A row of one block; the same bits either way."""
    arrays = case.operands()

    def plan(early):
        return lambda p: (
            rmsnorm_triton._fwd_long(p, dataclasses.replace(rmsnorm_triton._loop(p), block=256, early=early)),
        )

    got, want = forward(case, arrays, plan(True)), forward(case, arrays, plan(False))
    case.check(got, arrays)
    tolerances.assert_same_bits(got["y"], want["y"])


def test_plans_take_the_loop_where_a_row_does_not_fit():
    wide, long = Case(1, 4096), Case(1, 131072)
    assert [s.kernel for s in rmsnorm_triton.plan(wide.problem(wide.operands()))] == ["rmsnorm:rmsnorm_fwd"]
    again = Case(1, 8192)
    assert [s.kernel for s in rmsnorm_triton.plan(again.problem(again.operands()))] == ["rmsnorm:rmsnorm_fwd_long"]
    arrays = long.operands()
    assert [s.kernel for s in rmsnorm_triton.plan(long.problem(arrays))] == ["rmsnorm:rmsnorm_fwd_long"]
    long.check(forward(long, arrays), arrays)


@pytest.mark.parametrize("features", [7, 64, 256, 409, 512])
def test_a_row_has_the_same_bits_alone_and_in_a_tile(features):
    """Alone in a program of one wave, in the tile of the plan, at any position, and in a taller tile."""
    case = Case(9, features, residual=BF16, weight=F32)
    arrays = case.operands()
    whole = forward(case, arrays)

    def with_rows(rows, warps):
        def plan(p):
            tile = rmsnorm_triton._tile(p, 1 << (features - 1).bit_length())
            return (rmsnorm_triton._fwd(p, dataclasses.replace(tile, rows=rows, warps=warps)),)

        return plan

    for rows, warps in ((1, 1), (2, 2), (16, 4)):
        tolerances.assert_same_bits(
            forward(case, arrays, with_rows(rows, warps))["y"], whole["y"], f"{rows} rows a program"
        )
    for row in (0, 5, 8):
        one = {k: a[row : row + 1] if a.ndim == 2 else a for k, a in arrays.items()}
        got = forward(dataclasses.replace(case, rows=1), one)
        for name in ("y", "residual_out", "rstd"):
            tolerances.assert_same_bits(got[name][0], whole[name][row], f"{name} of row {row}")


@pytest.mark.parametrize(
    ("features", "plan"), [(100, rmsnorm_triton.plan), (1500, rmsnorm_triton.plan), (100, long_plan())]
)
def test_nan_and_inf_stay_in_their_row_and_out_of_the_padding(features, plan):
    case = Case(5, features, padded=(features // 128 + 1) * 128)
    arrays = case.operands()
    clean = forward(case, arrays, plan)["y"]
    arrays["x"][1, 3], arrays["x"][3, features - 1] = np.nan, np.inf
    got = forward(case, arrays, plan)["y"]
    assert np.isnan(got[1, :features]).all()
    assert np.isnan(got[3, features - 1])
    assert not tolerances.bits(got[:, features:]).any()
    for row in (0, 2, 4):
        tolerances.assert_same_bits(got[row], clean[row], f"row {row}")


@pytest.mark.parametrize("plan", [rmsnorm_triton.plan, long_plan()])
def test_residual_out_may_share_the_buffer_of_residual(plan):
    case = Case(3, 200, residual=BF16)
    arrays = case.operands()
    case.check(forward(case, arrays, plan, aliases={"residual_out": "residual"}), arrays)


@dataclasses.dataclass
class Back:
    """A backward on the saved values of ``forward``; ``dresidual_out`` and ``dresidual`` only with a residual."""

    forward: Case
    dy: str | None = None
    dresidual_out: str | None = None
    dresidual: str | None = None

    def operands(self, seed=0):
        case, rng = self.forward, np.random.default_rng(seed + 1)
        given = case.operands(seed)
        want = case.oracle(given)
        arrays = {"n": given["x"] if want.residual_out is None else want.residual_out}
        if case.weight:
            arrays["weight"] = given["weight"]
        arrays["rstd"] = want.rstd[:, 0].astype(np.float32)
        arrays["dy"] = normal(rng, (case.rows, case.width), self.dy or case.out or case.x)
        arrays["dy"][:, case.features :] = np.nan  # the padded tail is not read
        if self.dresidual_out:
            arrays["dresidual_out"] = normal(rng, (case.rows, case.features), self.dresidual_out)
        return arrays, want

    def problem(self, arrays) -> Problem:
        case = self.forward
        shape = (case.rows, case.features)
        results = [("dx", shape, case.x)]
        if self.dresidual:
            results.append(("dresidual", shape, self.dresidual))
        if case.weight:
            results.append(("dweight", shape[1:], case.weight))
        return problem("rmsnorm_bwd", arrays, results, case.target, weight_offset=case.offset)

    def check(self, got, arrays, want) -> None:
        case = self.forward
        back = oracle.rmsnorm_backward(
            want, arrays.get("weight"), arrays["dy"], arrays.get("dresidual_out"), weight_offset=case.offset
        )
        tolerances.assert_dx(got["dx"], back)
        if self.dresidual:
            tolerances.assert_dx(got["dresidual"], back, "dresidual")
        if case.weight:
            tolerances.assert_dweight(got["dweight"], back)


def run_backward(p, arrays, plan=rmsnorm_triton.plan):
    """The last launch with wide blocks of columns: the plan's narrow ones are hundreds of programs."""
    steps = plan(p)
    if steps[-1].kernel.endswith("_reduce"):
        block = 1024
        constants = tuple((k, {"BLOCK": block, "ROWS": 16}.get(k, v)) for k, v in steps[-1].constants)
        grid = (-(-dict(constants)["N"] // block), *steps[-1].grid[1:])
        steps = (*steps[:-1], dataclasses.replace(steps[-1], constants=constants, grid=grid))
    return interpreter.run(steps, p, arrays)


def backward(back: Back, plan=rmsnorm_triton.plan, seed=0):
    arrays, want = back.operands(seed)
    p = back.problem(arrays)
    got = run_backward(p, arrays, plan)
    back.check(got, arrays, want)
    return got


def few_programs(p):
    """The plan on a GPU of two compute units: the persistent loop runs several times with the few rows of a test."""
    units = rmsnorm_triton.compute_units
    rmsnorm_triton.compute_units = lambda target: 2
    try:
        return rmsnorm_triton.plan(p)
    finally:
        rmsnorm_triton.compute_units = units


BACKWARD = [
    Back(Case(7, 1024)),
    Back(Case(1, 4096)),
    Back(Case(3, 769)),
    Back(Case(5, 2880, padded=3072)),
    Back(Case(40, 3)),
    Back(Case(3, 1)),
    Back(Case(9, 128, x=F16, weight=F32, offset=1.0)),
    Back(Case(3, 1000, weight=None)),
    Back(Case(5, 1245, x=F32)),
    Back(Case(5, 96, residual=F32), dresidual_out=F32, dresidual=F32),
    Back(Case(3, 2560, residual=BF16, weight=F32), dresidual_out=BF16),
    Back(Case(5, 83, residual=F16, offset=0.5, out=F32), dresidual_out=F16, dresidual=F16),
    Back(Case(9, 1100, target="gfx942")),
    Back(Case(3, 3571, target="gfx1100")),
]


@pytest.mark.parametrize("back", BACKWARD, ids=str)
def test_backward(back):
    backward(back)


@pytest.mark.parametrize(
    "back", [Back(Case(43, 1024)), Back(Case(9, 3000)), Back(Case(150, 31, x=F16, weight=F32))], ids=str
)
@pytest.mark.parametrize(("prefetch", "reread"), [(True, False), (False, True), (False, False)])
def test_backward_with_several_tiles_a_program(back, prefetch, reread):
    def plan(p):
        steps = few_programs(p)
        constants = tuple((k, {"PREFETCH": prefetch, "REREAD": reread}.get(k, v)) for k, v in steps[0].constants)
        assert 1 < steps[0].grid[0] < p.rows / dict(steps[0].constants)["ROWS"]
        return (dataclasses.replace(steps[0], constants=constants), *steps[1:])

    first, again = backward(back, plan), backward(back, plan)
    for name in ("dx", "dweight"):
        tolerances.assert_same_bits(first[name], again[name], name)


@pytest.mark.parametrize(
    "back",
    [Back(Case(5, 256)), Back(Case(3, 97, residual=BF16, weight=F32, offset=1.0), dresidual_out=BF16),
     Back(Case(3, 130, residual=F32, padded=192), dresidual_out=F32, dresidual=F32), Back(Case(3, 70, weight=None))],
    ids=str,
)  # fmt: skip
def test_backward_of_long_rows(back):
    backward(back, long_plan())


def test_the_reduction_of_the_plan():
    rng = np.random.default_rng(0)
    for programs, features in ((1, 16), (5, 50), (132, 33), (700, 16)):
        partial = rng.standard_normal((programs, features)).astype(np.float32)
        p = problem("rmsnorm_bwd", {"dweight_share": partial}, [("dweight", (features,), F32)], "sm_90")
        got = interpreter.run(
            rmsnorm_triton._reduce(p, programs), dataclasses.replace(p, features=features), {"dweight_share": partial}
        )
        bound = 2.0**-20 * np.abs(partial).sum(0).max()
        np.testing.assert_allclose(got["dweight"], partial.astype(np.float64).sum(0), rtol=0, atol=bound)


@pytest.mark.parametrize("features", [31, 1024, 1500])
def test_dx_of_a_row_does_not_depend_on_the_other_rows(features):
    back = Back(Case(6, features, weight=F32))
    arrays, _ = back.operands()
    p = back.problem(arrays)
    whole = run_backward(p, arrays)["dx"]
    for row in (0, 5):
        one = {k: a if k == "weight" else a[row : row + 1] for k, a in arrays.items()}
        p = Back(dataclasses.replace(back.forward, rows=1)).problem(one)
        tolerances.assert_same_bits(run_backward(p, one)["dx"][0], whole[row], f"row {row}")


def test_a_nan_row_reaches_only_its_own_dx():
    back = Back(Case(5, 300))
    arrays, _ = back.operands()
    p = back.problem(arrays)
    clean = run_backward(p, arrays)
    arrays["dy"][2, 7] = np.nan
    got = run_backward(p, arrays)
    assert np.isnan(got["dx"][2]).all()
    assert np.isnan(got["dweight"][7])
    keep = np.arange(5) != 2
    tolerances.assert_same_bits(got["dx"][keep], clean["dx"][keep])
    tolerances.assert_same_bits(np.delete(got["dweight"], 7), np.delete(clean["dweight"], 7))


def test_a_kernel_compiles_after_it_was_interpreted():
    needs.need("triton", True, "")
    from jaxnorm._compile import triton as compiler

    case = Case(2, 64)
    forward(case)
    p = case.problem(case.operands())
    step = rmsnorm_triton.plan(p)[0]
    options = {"num_warps": step.num_warps, "num_stages": step.num_stages, "enable_fp_fusion": True}
    assert compiler.run(step, compiler.signature(step, p), "gfx942", options).asm["hsaco"][:4] == b"\x7fELF"


def test_every_plan_covers_every_row_of_a_large_problem():
    """More rows than one grid column holds, and more elements than 31 bits count: by arithmetic, without arrays."""
    for rows, features in (((1 << 20) + 3, 8192), (16777217, 128), ((1 << 31) - 1, 64)):
        p = Problem("rmsnorm_fwd", rows, features, (("x", (rows, features)), ("y", (rows, features))), (("x", BF16), ("y", BF16)),
                    (("eps", 1e-6), ("weight_offset", 0.0), ("cast", "output")), "gfx942")  # fmt: skip
        step = rmsnorm_triton.plan(p)[0]
        columns, lines, _ = step.grid
        tile_rows = dict(step.constants)["ROWS"]
        assert columns <= rmsnorm_triton.GRID_COLUMNS
        assert columns * step.num_warps * 64 < 1 << 32
        assert (lines - 1) * rmsnorm_triton.GRID_COLUMNS * tile_rows < rows <= columns * lines * tile_rows
