"""What each kernel reads and must give: one small entry a kernel family, from which a kernel case of any of its launches is made.

An entry fills the inputs of a launch with random data and says what its outputs must be, from the float64 oracle. A launch is taken
as it is, with few rows: kernels take the number of rows (and of persistent programs) at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kernels.configs import Launch, Problem, rmsnorm_hip
from . import oracle
from .oracle import Array, f64

NAN_ROW, ZERO_ROW = 2, 1
BITWISE = {"mode": "bitwise"}
UNIT = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-20}
"""Relative size of a unit in the last place at most; for float32 the bound of the contract."""
CODES = {"mode": "codes", "max_diff": 1, "max_fraction": 0.001}


@dataclass
class Output:
    """What a launch must write."""

    values: Array
    compare: dict[str, Any] | None = None
    """None: the default of the format for the dtype."""
    ignore: Array | None = None
    written: Array | None = None
    before: Array | None = None
    """What the buffer holds at first, where it is written in place."""


@dataclass
class Case:
    """One launch with data. ``launch`` and ``problem`` are for few rows."""

    problem: Problem
    launch: Launch
    g: np.random.Generator
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    scalars: dict[str, int | float] = field(default_factory=dict)
    scratch: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Buffers that the launches of the plan hand on to each other: (shape, dtype) by name."""
    params: dict[str, Any] = field(default_factory=dict)
    """For the case's ``params``."""
    tail: list[dict[str, Any]] = field(default_factory=list)
    """Arguments behind the outputs, in place of the launch's scalars: as in the JSON file, with arrays for their names."""

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.problem.options).get(name, default)

    def constant(self, name: str, default: Any = None) -> Any:
        return dict(self.launch.constants).get(name, default)

    def reads(self, name: str) -> bool:
        return name in self.launch.inputs and (self.problem.has(name) or name in self.scratch)

    def writes(self, name: str) -> bool:
        return name in self.launch.outputs and (self.problem.has(name) or name in self.temps)

    @property
    def temps(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (shape, kind) for name, shape, kind in self.launch.temps}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a buffer of the problem or of the plan's scratch."""
        return self.problem.shape(name) if self.problem.has(name) else (self.scratch | self.temps)[name][0]

    def normal(self, name: str, std: float = 1.7, mean: float = 0.0) -> Array:
        """Random rows as an input; its values in float64."""
        shape, kind = self.problem.shape(name), self.problem.dtype(name)
        return self.given(name, self.g.standard_normal(shape) * std + mean, kind)

    def vector(self, name: str, low: float = 0.5, high: float = 1.5) -> Array | None:
        """Random factors of both signs as an input, where the problem has it."""
        if not self.reads(name):
            return None
        shape = self.problem.shape(name)
        values = self.g.uniform(low, high, shape) * np.where(self.g.random(shape) < 0.25, -1.0, 1.0)
        return self.given(name, values, self.problem.dtype(name))

    def given(self, name: str, values: Array, kind: str = "float32") -> Array:
        """These values as an input, rounded to its dtype."""
        self.inputs[name] = oracle.rounded(values, kind)
        return f64(self.inputs[name])

    def expect(self, name: str, values: Array, **how: Any) -> None:
        """Float64 values of an output, rounded here once, where the launch writes it."""
        if self.writes(name):
            kind = self.temps[name][1] if name in self.temps else self.problem.dtype(name)
            self.outputs[name] = Output(oracle.rounded(values, kind), **how)

    def shares(self, rows: Array, programs: int, unit: int) -> Array:
        """``[programs, N]`` sums over the rows of each persistent program: units of rows p, p + programs, ..."""
        owner = np.arange(len(rows)) // unit % programs
        return np.stack([rows[owner == p].sum(0) for p in range(programs)])


Fill = Callable[[Case], None]


@dataclass(frozen=True)
class Kernel:
    """How the launches of a kernel are made small, and what they compute."""

    fill: Fill
    block_rows: Callable[[dict[str, Any]], int] = lambda constants: 1
    """Rows of a block (program), from the constants."""
    programs: int | None = None
    """The grid dim over persistent programs; None: the grid covers the rows. -1: it does neither."""
    as_planned: bool = False
    """The launch is taken as it was planned, for the fewest rows that it was planned for."""
    shrink: Callable[[Problem, Launch], tuple[Problem, Launch]] | None = None
    """Makes a launch small where none of this says how."""
    more: tuple[tuple[str, Fill], ...] = ()
    """Further cases of the same code object: (what is in their names, how they are filled)."""
    clusters: bool = False
    """Planned for targets whose blocks form clusters (sm_90), for no other."""


# RMSNorm and LayerNorm, forward


def _subtracted_first(c: Case, n: Array, mean: Array, rstd: Array) -> Array:
    """What a kernel takes off the row before it sums the rest, the shift: the mean, or a value of the row not far from it."""
    if c.launch.kernel != "layernorm.hip:layernorm_fwd" or not rmsnorm_hip.pivots(c.problem):
        return mean
    chunk = rmsnorm_hip.vector(c.problem)
    pivot = np.median(n[:, [i if i < chunk else 0 for i in range(3)]], axis=-1, keepdims=True)
    far = (mean - pivot) ** 2 > 4 * (rstd**-2 - c.option("eps"))
    return np.where(far, f64(oracle.rounded(mean, "float32")), pivot)


def _normalise(c: Case, special: bool) -> tuple[Array, Array | None, Array, Array]:
    """(y in float64, what the norm read in float32 form, mean, rstd); fills the inputs and expects what belongs to the norm."""
    p, centred = c.problem, c.problem.stage.startswith("layernorm")
    rows = p.rows
    data = c.g.standard_normal(p.shape("x")) * 1.7 + (0.75 if centred else 0.0)
    if special and rows > NAN_ROW:
        data[..., ZERO_ROW, :] = 0.0
        data[..., NAN_ROW, p.features // 2] = np.nan
    c.given("x", data, p.dtype("x"))
    bias_in = c.vector("x_bias")
    # No bias near 1.5 or 1.75: of a row of zeros it is all there is, and an exponent would lie on its boundary.
    weight, bias = c.vector("weight"), c.vector("bias", 0.3, 1.3)
    x = c.inputs["x"] if c.option("parts", 1) == 1 else oracle.rank_sum(c.inputs["x"])
    if c.reads("residual"):
        residual = c.g.standard_normal(p.shape("residual")) * 2.5
        if special and rows > NAN_ROW:
            residual[ZERO_ROW] = 0.0
        c.given("residual", residual, p.dtype("residual"))
        s = oracle.residual_sum(x, c.inputs["residual"], c.inputs.get("x_bias"))
        saved = oracle.rounded(f64(s), p.dtype("residual"))
        n = f64(s) if c.option("residual_rounding", "float32") == "float32" else f64(saved)
        exact = (
            {"mode": "ulp", "max": 0} if p.dtype("residual") != "float32" else {"mode": "close", "rtol": 0, "atol": 0}
        )
        c.expect("residual_out", f64(saved), compare=exact)
    else:
        n = f64(x) if bias_in is None else f64(x.astype(np.float32) + c.inputs["x_bias"].astype(np.float32))
    mean, rstd = oracle.statistics(n, c.option("eps"), centred)
    before = c.option("cast", "output") == "before_weight"
    with np.errstate(all="ignore"):
        normalised = (n - mean) * rstd
    y = oracle.affine(normalised, weight, bias, c.option("weight_offset", 0.0), p.dtype("x") if before else None)
    first = _subtracted_first(c, n, mean, rstd)
    for name, values in (("mean", first), ("shift", mean - first)):
        c.expect(name, values.reshape(rows), compare={"mode": "close", "rtol": 2e-6, "atol": 2e-6})
    c.expect("rstd", rstd.reshape(rows), compare={"mode": "close", "rtol": 2e-6, "atol": 0})
    c.params |= {
        "eps": c.option("eps"),
        "weight_offset": c.option("weight_offset", 0.0),
        "cast": c.option("cast", "output"),
    }
    if c.reads("residual"):
        c.params["residual_rounding"] = c.option("residual_rounding", "float32")
    if c.writes("y"):
        # The inner rounding may go the other way by one of its units; the outer one adds another.
        how = {"mode": "ulp", "max": 2} if before and p.dtype("y") != "float32" else None
        if before and p.dtype("y") == "float32":
            how = {"mode": "close", "rtol": 2.0**-7, "atol": 1e-6}
        if centred or bias is not None:  # y may cancel
            unit = UNIT[p.dtype("x" if before else "y")]
            how = {"mode": "close", "rtol": (2 if before else 1) * unit, "atol": 1e-5 + (unit if before else 0.0)}
        c.expect("y", _wide(y, p.shape("y")[-1]), compare=how)
    return y, n, mean, rstd


def _wide(a: Array, width: int) -> Array:
    return np.pad(a, ((0, 0), (0, width - a.shape[-1])))


def norm_forward(c: Case) -> None:
    """y = cast(n * rstd * (weight + offset)) and what is saved for the backward."""
    _normalise(c, special=False)


def quantise(c: Case) -> None:
    """Codes and scales of the norm's y, or of x itself, with a row of zeros and one with a NaN."""
    p, spec = c.problem, c.option("spec")
    packed = spec.dtype == "fp4"
    if p.stage == "quantize_fwd":
        data = c.g.standard_normal(p.shape("x")) * 1.7
        if p.rows > NAN_ROW:
            data[ZERO_ROW] = 0.0
            data[NAN_ROW, p.features // 2] = np.nan
        z = c.given("x", data, p.dtype("x"))
    else:
        z = _normalise(c, special=True)[0]
    smooth = c.vector("smooth_scale", 0.25, 2.0)
    with np.errstate(all="ignore"):
        z = z if smooth is None else z * smooth
    z = _wide(z, p.shape("values")[-1] * (2 if packed else 1))
    static = None
    if c.reads("static_scale"):
        static = float(np.float32(4.5 / oracle.TOP[spec.dtype]))
        c.given("static_scale", np.full(p.shape("static_scale"), static))
    q = oracle.quantise(z, spec, static)
    if q.boundary:
        raise Retry
    values = oracle.packed(q.codes, spec.dtype)
    ignore = q.undefined[:, ::2] if packed else q.undefined
    if static is not None:
        ignore = np.repeat(np.isnan(z).any(-1, keepdims=True), values.shape[-1], -1)
    kind = np.dtype(np.uint8) if packed else oracle.dtype(spec.dtype)
    how = CODES | {"mode": "codes4"} if packed else CODES
    c.outputs["values"] = Output(values.view(kind), how, ignore if ignore.any() else None)
    if c.writes("scale"):
        assert q.scale is not None
        how = BITWISE if spec.scale_dtype == "e8m0" else {"mode": "close", "rtol": 2.0**-20, "atol": 0}
        c.outputs["scale"] = Output(oracle.laid_out(q.scale, spec.scale_layout, p.shape("scale")), how)
    c.params["group_size"] = spec.group_size


class Retry(Exception):
    """The random data came to lie where two results are right: take other."""


# Backward


@dataclass(frozen=True)
class _Saved:
    """What a backward launch starts from, float64; as inputs where the launch reads them."""

    n: Array
    """What the norm read: n, or n + x_bias."""
    mean: Array
    rstd: Array
    weight: Array | None
    dy: Array
    offset: float
    centred: bool

    @property
    def gw(self) -> Array:
        return self.dy * (1.0 if self.weight is None else self.weight + self.offset)

    @property
    def xh(self) -> Array:
        return (self.n - self.mean) * self.rstd

    def gradients(self) -> oracle.Gradients:
        return oracle.backward(self.n, self.mean, self.rstd, self.weight, self.dy, self.offset, self.centred)


def _saved(c: Case) -> _Saved:
    p, centred = c.problem, c.problem.stage.startswith("layernorm")
    n = c.normal("n", 1.7, 0.75 if centred else 0.0)
    if c.vector("x_bias") is not None:
        n = f64(c.inputs["n"].astype(np.float32) + c.inputs["x_bias"].astype(np.float32))
    mean, rstd = oracle.statistics(n, 1e-6, centred)
    rstd = f64(rstd.astype(np.float32))
    high = mean.astype(np.float32)
    for name, values in (("mean", high), ("shift", mean - high), ("rstd", rstd)):
        if c.reads(name):
            c.inputs[name] = values.astype(np.float32).reshape(p.shape(name))
    weight = c.vector("weight")
    dy = c.normal("dy")[:, : p.features]
    return _Saved(n, mean, rstd, weight, dy, c.option("weight_offset", 0.0), centred)


def _close(values: Array, kind: str) -> dict[str, Any]:
    """Within 2 units in the last place of max(|dx|, its row's rms)."""
    return {"mode": "close", "rtol": UNIT[kind], "atol": float(UNIT[kind] * np.sqrt(np.mean(values**2)))}


def norm_backward(c: Case) -> None:
    """dx, and the sums over the rows of each program."""
    p, saved = c.problem, _saved(c)
    grad = saved.gradients()
    dx = grad.dx + (c.normal("dresidual_out") if c.reads("dresidual_out") else 0.0)
    gw, xh = saved.gw, saved.xh
    if c.constant("JN_TILED"):
        c.given("dot", _dots(saved))
    for name, values in (("product", np.mean(gw * xh, -1)), ("average", gw.mean(-1))):
        if name in c.launch.inputs:
            c.given(name, values)
        c.expect(name, values, compare={"mode": "close", "rtol": 1e-5, "atol": 1e-6})
    for name in ("dx", "dresidual"):
        c.expect(name, dx, compare=_close(dx, p.dtype(name)) if p.has(name) else None)
    programs = int(c.scalars.get("programs", c.scalars.get("PROGRAMS", 1)))
    unit = int(c.constant("JN_GROUPS") or c.constant("ROWS") or 1)
    terms = {"dweight": grad.dweight, "dbias": grad.dbias, "dx_bias": dx}
    for name, each in terms.items():
        for written in (name, f"{name}_share"):
            if c.writes(written):
                how = _sum_bound(each, p.dtype(written) if written == name else "float32")
                c.expect(written, c.shares(each, programs, unit).reshape(c.shape(written)), compare=how)
    if c.writes("partials"):
        wanted = [each for name, each in terms.items() if p.has(name)]
        total = np.stack([c.shares(each, programs, unit) for each in wanted], 1)
        c.expect("partials", total.reshape(c.shape("partials")), compare=_sum_bound(np.concatenate(wanted, 1)))


def _dots(saved: _Saved) -> Array:
    """Of each row sum(gw * n), or sum(gw * (n - mean)) and sum(gw), the mean being the rounded one."""
    if not saved.centred:
        return (saved.gw * saved.n).sum(-1)
    high = f64(saved.mean.astype(np.float32))
    return np.stack([(saved.gw * (saved.n - high)).sum(-1), saved.gw.sum(-1)], -1)


def _sum_bound(terms: Array, kind: str = "float32") -> dict[str, Any]:
    rounding = 0.0 if kind == "float32" else UNIT[kind]
    return {"mode": "close", "rtol": 1e-5 + rounding, "atol": float(2.0**-20 * np.abs(terms).sum(0).max())}


def row_dot(c: Case) -> None:
    """The row sums that a tiled backward needs."""
    saved = _saved(c)
    c.expect("dot", _dots(saved), compare=_sum_bound((saved.gw * (1 + np.abs(saved.n))).T))


def near_tie(values: Array, kind: str) -> Array:
    """Where the error of a float32 computation may turn the rounding to a 16-bit dtype."""
    if kind == "float32":
        return np.zeros(values.shape, bool)
    with np.errstate(all="ignore"):
        low, high = (oracle.rounded(values * (1 + s * 2.0**-19), kind) for s in (-1, 1))
    return low != high


def add_partials(c: Case) -> None:
    """The column sums of partial sums: of one stack of all vectors, or of an input for each."""
    programs = int(c.scalars.get("programs", c.scalars.get("PROGRAMS", 1)))
    wanted = [name for name in c.launch.outputs if c.writes(name)]
    random = c.g.standard_normal((programs, len(wanted), c.problem.features))
    if c.launch.inputs == ("partials",):
        c.given("partials", random.reshape(c.shape("partials")))
    for i, name in enumerate(wanted):
        partial = random[:, i].astype(np.float32).astype(np.float64)
        if f"{name}_share" in c.launch.inputs:
            c.given(f"{name}_share", partial)
        c.expect(name, partial.sum(0), compare=_sum_bound(partial, c.problem.dtype(name)))


# Which kernels there are


def _hip_rows(constants: dict[str, Any]) -> int:
    return int(constants.get("JN_GROUPS", 1)) * int(constants.get("JN_UNROLL", 1))


def _triton_rows(constants: dict[str, Any]) -> int:
    return int(constants.get("ROWS", 1))


def _norm_kernels() -> dict[str, Kernel]:
    found = {}
    for norm, back in (("rmsnorm", "rmsnorm"), ("layernorm", "layernorm_bwd")):
        found |= {
            f"{norm}.hip:{norm}_fwd": Kernel(norm_forward, _hip_rows),
            f"{norm}.hip:{norm}_bwd": Kernel(norm_backward, programs=0),
            f"{norm}.hip:{norm}_bwd_dot": Kernel(row_dot),
            f"{norm}.hip:{norm}_bwd_reduce": Kernel(add_partials, programs=-1),
            f"{norm}:{norm}_fwd": Kernel(norm_forward, _triton_rows),
            f"{norm}:{norm}_fwd_long": Kernel(norm_forward),
            f"{back}:{norm}_bwd": Kernel(norm_backward, programs=0),
            f"{back}:{norm}_bwd_long": Kernel(norm_backward),
            f"{back}:{norm}_bwd_columns": Kernel(norm_backward, programs=1),
            f"{back}:{norm}_bwd_reduce": Kernel(add_partials, programs=-1),
        }
    return found


KERNELS: dict[str, Kernel] = {
    **_norm_kernels(),
    **{
        f"quant.hip:{s}": Kernel(quantise, _hip_rows)
        for s in ("rmsnorm_quant_fwd", "layernorm_quant_fwd", "quantize_fwd")
    },
    "quant:quant_fwd": Kernel(quantise, _triton_rows),
    "quant:quant_fwd_long": Kernel(quantise),
}
