"""Which code objects a call needs: traced once for a target, then planned for every number of rows.

A plan may choose threads and storage by the number of rows, so what serves 8 rows need not serve 8000. Plans are pure Python and
fast, and change at few places: all numbers up to 512 are asked for, then 32 for each doubling, and between two neighbours
that differ every change is found by halving.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from .. import _dispatch, _explain, _launch
from .._compile import cache
from .._compile.target import use_target
from .._stage import StageCall
from ..distributed import fused, summed
from ..distributed._config import Config
from ..kernels.configs import COMPUTE_UNITS, Launch, Problem, Unsupported, distributed_hip
from .spec import Call

MOST_ROWS = 1 << 24


@dataclass(frozen=True)
class Stage:
    """One stage of a call, as a target would run it."""

    call: StageCall
    avals: tuple[jax.ShapeDtypeStruct, ...]
    """Of the folded operands."""
    target: str
    backend: str
    """``hip`` or ``triton``; ``xla`` where the measured table or the lack of a kernel says so."""
    why: str

    def on(self, backend: str) -> Stage:
        """The same on another backend."""
        return replace(self, backend=backend)

    def problem(self, rows: int) -> Problem:
        """The stage for another number of rows."""
        avals = []
        for name, a in zip(self.call.names, self.avals, strict=True):
            dims = self.call.dims(name)
            at = dims.index("...") if "..." in dims else len(dims)
            shape = (*a.shape[:at], rows, *a.shape[at + 1 :]) if at < len(dims) else a.shape
            avals.append(jax.ShapeDtypeStruct(shape, a.dtype))
        return _launch.problem(self.call, avals, self.target)

    def plan(self, rows: int) -> tuple[Launch, ...]:
        """Its launches; empty where the backend does not serve so many rows."""
        module = importlib.import_module(f"jaxnorm.kernels.configs.{self.call.definition.plans[self.backend]}")
        try:
            return module.plan(self.problem(rows))
        except Unsupported:
            return ()


@dataclass(frozen=True)
class Fused:
    """Stands for the :class:`StageCall` of a fused distributed call."""

    op: str
    stage: str = distributed_hip.STAGE


@dataclass(frozen=True)
class FusedStage(Stage):
    """A distributed call as one kernel on each rank; ``call`` is a :class:`Fused`."""

    config: Config | None = None
    dtypes: tuple[tuple[str, str], ...] = ()

    def problem(self, rows: int) -> Problem:
        assert self.config is not None
        return fused.problem(replace(self.config, rows=rows), self.dtypes, self.target)

    def plan(self, rows: int) -> tuple[Launch, ...]:
        try:
            return distributed_hip.plan(self.problem(rows))
        except Unsupported:
            return ()


@dataclass(frozen=True)
class Instance:
    """One code object to make: a launch of a stage at one of the numbers of rows that it serves."""

    stage: Stage
    rows: int
    """The smallest number of rows it was planned for."""
    launch: Launch

    @property
    def problem(self) -> Problem:
        return self.stage.problem(self.rows)

    @property
    def parts(self) -> list[str]:
        return _launch.portable_key(self.launch, self.problem, self.stage.backend)

    @property
    def key(self) -> str:
        return cache.shipped_key(self.parts)


def check_target(target: str) -> str:
    """``rocm`` or ``cuda``.

    Raises:
      ValueError: no kernel here is written for it.
    """
    served = [t for t in COMPUTE_UNITS if t.startswith("gfx")]
    if target in served:
        return "rocm"
    if target.startswith("sm_") and target[3:].isdigit() and int(target[3:]) >= 80:
        return "cuda"
    from ..errors import value_error

    raise value_error("aot", "--target", repr(target), f"one of {', '.join(served)}, or sm_80 and later")


def stages(call: Call, target: str, backend: str | None = None, compilers: bool = True) -> list[Stage]:
    """The stages of a call in program order, each with the first backend of the dispatch that has a kernel and, unless
    ``compilers`` is False, that this machine can compile for.

    Raises:
      UnsupportedError: ``backend`` (or the call) names one that does not serve a stage or has no compiler here.
    """
    platform = check_target(target)
    found: dict[Stage, None] = {}
    x64 = call.x64 or jax.config.jax_enable_x64  # type: ignore[attr-defined]
    with use_target({platform: target}), jax.enable_x64(x64), summed.apart():
        for function, arguments in call.functions():
            for stage_call, avals in _explain._stages(jax.make_jaxpr(function)(*arguments).jaxpr):
                if avals is None:
                    found |= dict.fromkeys(_of_ranks(stage_call, target, backend or call.backend, compilers))
                    continue
                shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
                found[_chosen(stage_call, shapes, target, backend or call.backend, compilers)] = None
    return list(found)


def _of_ranks(decision: Any, target: str, named: str | None, compilers: bool) -> list[Stage]:
    """The kernels that distributed calls alone have, all HIP: the fused one, where there is one for the call, and the norm of
    partial sums between the composite's collectives. The norm of their sum is a stage like any other."""
    config = decision.config
    if named == "triton" or config.reduce != "exact" or (compilers and not _dispatch.compiler("hip", target)[0]):
        return []
    avals = summed.operands(config, {n: jax.numpy.dtype(d) for n, d in decision.dtypes}, config.share)
    found: list[Stage] = [
        Stage(summed.stage_call(config, avals, spec), tuple(avals.values()), target, "hip", "the norm of partial sums")
        for spec in dict.fromkeys((config.spec, summed.row_layout(config.spec)))
    ]
    if config.norm == "rmsnorm":
        found.append(FusedStage(Fused(config.op), (), target, "hip", "the fused kernel", config, decision.dtypes))  # type: ignore[arg-type]
    return [stage for stage in found if stage.plan(config.rows)]


def _chosen(
    call: StageCall, avals: tuple[jax.ShapeDtypeStruct, ...], target: str, named: str | None, compilers: bool
) -> Stage:
    start = Stage(replace(call, targets=()), avals, target, "xla", "")
    problem = start.problem(*call.lead(avals[0].shape))
    order, why = ((named,), "named") if named else _dispatch._order(call, problem)
    rejected = []
    for backend in order:
        if backend == "xla":
            return replace(start, why=f"{why}; {'; '.join(rejected)}" if rejected else why)
        reason = _missing(start.on(backend), problem, compilers)
        if not reason:
            return replace(start, backend=backend, why="; ".join([why, *rejected]))
        rejected.append(f"{backend}: {reason}")
    from ..errors import UnsupportedError

    raise UnsupportedError(call.op, target, " ".join(rejected), "Name another backend, or install its compiler.")


def _missing(stage: Stage, problem: Problem, compilers: bool) -> str:
    """Why a backend does not serve a stage, or cannot be compiled for here; empty when it can."""
    module = stage.call.definition.plans.get(stage.backend)
    if module is None:
        return f"no kernel for {stage.call.stage}"
    try:
        importlib.import_module(f"jaxnorm.kernels.configs.{module}").plan(problem)
    except Unsupported as e:
        return str(e)
    usable, reason, remedy = _dispatch.compiler(stage.backend, stage.target) if compilers else (True, "", "")
    return "" if usable else f"{reason} {remedy}"


def row_counts(limit: int = MOST_ROWS) -> Iterator[int]:
    """1 to 512, then 32 for each doubling."""
    yield from range(1, 513)
    step = 16
    while (step := step * 2) * 16 <= limit // 2:
        yield from range(step * 17, step * 32 + 1, step)


def instances(stage: Stage, rows: Iterable[int] = ()) -> dict[str, Instance]:
    """Every code object that a stage needs, by key: for these numbers of rows, or for all."""
    if stage.backend == "xla":
        return {}
    plans: dict[int, dict[Any, Launch]] = {}

    def at(count: int) -> dict[Any, Launch]:
        if count not in plans:
            plans[count] = {_identity(launch): launch for launch in stage.plan(count)}
        return plans[count]

    def between(low: int, high: int) -> None:
        middle = (low + high) // 2
        if low < middle and set(at(low)) != set(at(high)):
            between(low, middle)
            between(middle, high)

    rows = tuple(rows)
    counts = sorted(rows) or list(row_counts())
    for low, high in zip([counts[0], *counts], counts, strict=False):
        at(high)
        if not rows:
            between(low, high)
    found: dict[Any, Instance] = {}
    for count in sorted(plans):
        for identity, launch in plans[count].items():
            found.setdefault(identity, Instance(stage, count, launch))
    return {i.key: i for i in found.values()}


def _identity(launch: Launch) -> Any:
    """What of a launch is in its code object."""
    return (launch.kernel, launch.constants, launch.threads, launch.shared, launch.num_warps, launch.num_stages, launch.options,
            launch.inputs, launch.outputs, tuple(t[::2] for t in launch.temps), tuple(s[:2] for s in launch.scalars))  # fmt: skip
