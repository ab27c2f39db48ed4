"""Searches the candidates of a plan module for the fastest one whose results have the bits of the module's own choice.

The public function is called as a user calls it; only the plan of its last stage is replaced. Times as in ``jaxnorm._bench``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import _explain, _launch
from .._bench import measure, programs, timing
from .._bench.ops import OPS, Case, input_types, inputs
from .._compile import target as targets
from ..kernels.configs import Problem
from . import plans

CHECKED = 1 << 22
"""Elements whose bits are compared at least. Another order of a sum moves its last bit in about half of the rows, and that shows in
a bfloat16 result once in some 10^4 elements."""
MOST_SETS = 1024
GAIN = 0.98
"""A candidate counts as faster below this share of the own choice's time: two series of one kernel differ by a percent."""
FINALISTS = 3

Plan = plans.Plan


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a search is about: one stage of one case on one backend."""

    case: Case
    backend: str
    call: Any
    problem: Problem
    candidates: tuple[Plan, ...]
    """The module's own choice first."""


@dataclasses.dataclass
class Found:
    """What came out of one search."""

    tried: int
    failed: dict[str, str]
    """label -> error of candidates that did not compile or run."""
    other_bits: int
    own_us: float
    us: float
    best: Plan
    label: str
    copy_us: float | None


def subject(case: Case, backend: str, limit: int, platform: str | None = None) -> Subject | str:
    """The last stage of a case and its candidates; a sentence where there is nothing to search.

    Args:
      limit: most candidates; of more, every so many are taken. 0 = all.
    """
    function = backward(case, backend) if OPS[case.op].gradients else forward(case, backend)
    types = input_types(case)
    if OPS[case.op].gradients:
        types = (types, jax.eval_shape(OPS[case.op].ours("xla", case.quant_spec()), *types))
    *_, (call, avals) = _explain._stages(jax.make_jaxpr(function)(*types).jaxpr)
    module = call.definition.plans.get(backend)
    if module is None:
        return f"{call.op} has no {backend} kernel"
    configs = importlib.import_module(f"jaxnorm.kernels.configs.{module}")
    if not hasattr(configs, "candidates"):
        return f"{module} offers no candidates"
    problem = _launch.problem(call, avals, targets.resolve(platform or targets.default_platform(), call.targets))
    try:
        own = configs.plan(problem)
    except configs.Unsupported as why:
        return str(why)
    others = [p for p in dict.fromkeys(configs.candidates(problem)) if p != own]
    if limit and len(others) >= limit:
        others = [others[i * len(others) // (limit - 1)] for i in range(limit - 1)]
    return Subject(case, backend, call, problem, (own, *others))


def forward(case: Case, backend: str) -> Callable[..., Any]:
    return OPS[case.op].ours(backend, case.quant_spec())


def backward(case: Case, backend: str) -> Callable[..., Any]:
    """(inputs, cotangents) -> the gradients that are timed; the forward is in it."""
    op = OPS[case.op]

    def gradients(arguments: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        found = jax.vjp(op.ours(backend, None), *arguments)[1](cotangent)
        return tuple(found[i] for i in op.gradients)

    return gradients


def search(
    about: Subject, timer: timing.Timer, jobs: int, step: Callable[[str, int], None], stop: Callable[[], bool]
) -> Found:
    """The fastest candidate of a subject.

    Args:
      jobs: threads that compile.
      step: called with what is being done and how many candidates are through.
      stop: asked between candidates; once it says True no further one is taken up.
    """
    failed: dict[str, str] = {}
    label = functools.partial(label_of, among=about.candidates)
    step("compile", 0)
    for plan, error in compile_all(about, jobs, step):
        failed[label(plan)] = error
    kept = [p for p in about.candidates if label(p) not in failed]
    if not kept or kept[0] != about.candidates[0]:
        raise RuntimeError(f"the own choice does not compile: {failed.get(label(about.candidates[0]), 'unknown')}")
    expected, right, other = None, [], 0
    checked = _checked_sets(about.case)
    for i, plan in enumerate(kept):
        if i and stop():
            break
        step("compare bits", i)
        try:
            bits = _bits(about, plan, checked)
        except Exception as error:
            if i == 0:
                raise
            failed[label(plan)] = f"{type(error).__name__}: {error}"[:300]
            continue
        expected = bits if i == 0 else expected
        if i == 0 or _equal(expected, bits):
            right.append(plan)
        else:
            other += 1
    del checked, expected
    times, copy_us = _times(about, right, timer, failed, step)
    own = about.candidates[0]
    if own not in times:
        raise RuntimeError(f"the own choice was not timed: {failed.get(label(own), 'unknown')}")
    ranked = sorted(times, key=lambda p: times[p])[:FINALISTS]
    if ranked[0] != own and times[ranked[0]] <= GAIN * times[own]:
        # Once more, so that the luckiest series of many does not win.
        times, copy_us = _times(about, [own, *(p for p in ranked if p != own)], timer, failed, step)
    best = min(times, key=lambda p: times[p])
    best = best if times[best] <= GAIN * times[own] else own
    return Found(len(right) + other, failed, other, times[own], times[best], best, label(best), copy_us)


def compile_all(about: Subject, jobs: int, step: Callable[[str, int], None]) -> Iterator[tuple[Plan, str]]:
    """Compiles every candidate into the cache; yields those that fail, with the error, each after a second try alone."""

    def build(plan: Plan) -> str:
        try:
            for launch in plan:
                _launch.compile_launch(launch, about.problem, about.backend)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
        return ""

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        errors = []
        for i, error in enumerate(pool.map(build, about.candidates)):
            errors.append(error)
            step("compile", i + 1)
    for plan, error in zip(about.candidates, errors, strict=True):
        if error and (again := build(plan)):
            yield plan, again


def _checked_sets(case: Case) -> Any:
    """So many sets of inputs, stacked, that CHECKED elements come out; for a backward with cotangents."""
    op = OPS[case.op]
    wide = input_types(case)[0]
    count = min(MOST_SETS, max(2, -(-CHECKED // max(wide.size, 1))))
    make = jax.jit(jax.vmap(lambda key: op.make(key, case.shape, jnp.dtype(case.dtype))))
    stacked = make(jax.random.split(jax.random.key(2, impl="rbg"), count))
    if not op.gradients:
        return stacked
    out = jax.eval_shape(op.ours("xla", None), *input_types(case))
    leaves, tree = jax.tree.flatten(out)
    key = jax.random.key(3, impl="rbg")
    cotangents = [
        jax.random.normal(jax.random.fold_in(key, i), (count, *a.shape), a.dtype) for i, a in enumerate(leaves)
    ]
    return stacked, jax.tree.unflatten(tree, cotangents)


def _bits(about: Subject, plan: Plan, checked: Any) -> list[Any]:
    """The results of all checked sets with a plan, one call after the other."""
    if OPS[about.case.op].gradients:
        f: Callable[[Any], Any] = lambda a: backward(about.case, about.backend)(*a)  # noqa: E731
    else:
        f = lambda a: forward(about.case, about.backend)(*a)  # noqa: E731
    with plans.forced(about.backend, about.problem, plan):
        out = jax.jit(lambda stacked: lax.map(f, stacked)).lower(checked).compile()(checked)
    return [_as_integers(leaf) for leaf in jax.tree.leaves(jax.block_until_ready(out))]


def _as_integers(a: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))


def _equal(a: Sequence[jax.Array] | None, b: Sequence[jax.Array]) -> bool:
    return a is not None and all(bool(jnp.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def _times(
    about: Subject,
    chosen: Sequence[Plan],
    timer: timing.Timer,
    failed: dict[str, str],
    step: Callable[[str, int], None],
) -> tuple[dict[Plan, float], float | None]:
    """Median time of every plan, and of the copy of the same bytes, all in turns."""
    case, op = about.case, OPS[about.case.op]
    nbytes_in, nbytes = programs.nbytes(input_types(case)), measure.traffic(case)
    count, _ = timing.rotation(nbytes_in)
    sets = inputs(case, count)
    f = forward(case, about.backend)
    cotangents = measure.cotangents(jax.eval_shape(f, *sets[0]), count) if op.gradients else []
    built = []
    for i, plan in enumerate(chosen):
        step("time", i)
        with plans.forced(about.backend, about.problem, plan):
            if op.gradients:
                program = programs.backward(str(i), lambda *a: f(*a), sets, cotangents, op.gradients)
            else:
                program = programs.forward(str(i), lambda *a: f(*a), sets)
            jax.block_until_ready(program.calls[0]())  # compiled here, with this plan
        built.append(program)

    def error(name: str, why: BaseException) -> None:
        if name.isdigit():
            failed[label_of(chosen[int(name)], about.candidates)] = f"{type(why).__name__}: {why}"[:300]

    timed = timing.measure(timer, [programs.copy(nbytes, count), *built], nbytes, nbytes_in, error)
    copy = timed.pop("copy", {}).get("median_us")
    return {chosen[int(name)]: summary["median_us"] for name, summary in timed.items()}, copy


def entry(about: Subject, found: Found) -> dict[str, Any]:
    """The line of the table."""
    images = [_launch.compile_launch(launch, about.problem, about.backend).image for launch in found.best]
    return {
        "case": about.case.key,
        "stage": about.problem.stage,
        "own": plans.digest(about.candidates[0]),
        "plan": plans.digest(found.best),
        "sources": plans.sources_digest(about.backend),
        "code": plans.code_digest(images),
        "label": found.label,
        "own_us": found.own_us,
        "us": found.us,
        "copy_us": found.copy_us,
        "tried": found.tried,
        "other_bits": found.other_bits,
        "failed": found.failed,
        "checked_elements": CHECKED,
    }


def describe_launch(launch: Any) -> dict[str, Any]:
    """The parts of a launch that a configuration chooses."""
    d = dataclasses.asdict(launch)
    d["constants"] = dict(launch.constants)
    d["options"] = dict(launch.options)
    return {k: v for k, v in d.items() if v not in (0, (), {}, 1) and k not in ("inputs", "outputs", "scalars")} | {
        "grid": launch.grid
    }


def label_of(plan: Plan, among: tuple[Plan, ...]) -> str:
    """The choices in which a plan differs from the others."""
    varying = _varying(among)
    return " ".join(f"{k}={v}" for k, v in _choices(plan).items() if k in varying) or "only"


@functools.cache
def _varying(among: tuple[Plan, ...]) -> frozenset[str]:
    seen: dict[str, set[str]] = {}
    for plan in among:
        for name, value in _choices(plan).items():
            seen.setdefault(name, set()).add(value)
    return frozenset(n for n, v in seen.items() if len(v) > 1 or any(n not in _choices(p) for p in among))


def _choices(plan: Plan) -> dict[str, str]:
    out = {}
    for i, launch in enumerate(plan):
        d = describe_launch(launch)
        flat = {**d.pop("constants", {}), **d.pop("options", {}), **d}
        out |= {f"{k}{i or ''}": "x".join(map(str, v)) if k == "grid" else str(v) for k, v in flat.items()}
    return out
