"""Which backend serves a call, and why: argument > context > environment > measured table > heuristic.

The choice is made from the operator, features, dtypes, options and target, never from the number of rows: the same row must give
the same bits whatever rows stand beside it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import _context, _launch, _native
from ._compile import cache
from ._compile import target as _target
from ._stage import StageCall
from ._tune import plans, table
from .errors import UnsupportedError, value_error
from .kernels.configs import Launch, Problem, Unsupported

BACKENDS = ("xla", "triton", "hip")
listeners: list[Callable[[StageCall, Problem, Chosen], None]] = []
"""Called with every choice, as it is made; what ``explain`` of a whole program hangs itself into."""


@dataclass(frozen=True)
class Chosen:
    """The outcome for one stage; ``explain`` prints it."""

    backend: str
    reason: str
    plan: tuple[Launch, ...] = ()
    road: str | None = None
    rejected: tuple[tuple[str, str], ...] = ()


def use_backend(name: str | None) -> Any:
    """Context manager: every op without ``backend=`` uses this backend. None returns to the free choice.

    Part of the key of ``jax.jit``'s cache: a function that was jitted under another backend is traced again.
    """
    return _context.backend(_check("use_backend", "name", name))


def requested(op: str, backend: str | None) -> tuple[str | None, str]:
    """(backend named by the caller, the context or the environment, or None; who named it)."""
    if backend is not None:
        return _check(op, "backend", backend), "backend="
    if _context.backend.value is not None:
        return _context.backend.value, "use_backend"
    if name := os.environ.get("JAXNORM_BACKEND"):
        return _check("JAXNORM_BACKEND", "value", name), "JAXNORM_BACKEND"
    return None, ""


def _check(op: str, argument: str, name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise value_error(op, argument, repr(name), "None, 'xla', 'triton' or 'hip'")
    return name


def required() -> frozenset[str]:
    """``JAXNORM_REQUIRE``: what must be there instead of being worked around."""
    return frozenset(p.strip() for p in os.environ.get("JAXNORM_REQUIRE", "").split(",") if p.strip())


def choose(call: StageCall, p: Problem, platform: str) -> Chosen:
    """The backend of one stage on one platform.

    Raises:
      UnsupportedError: a kernel backend was named, or is required, and cannot serve the call here.
    """
    chosen = _choose(call, p, platform)
    if chosen.plan:
        chosen = _tuned(call, p, platform, chosen)
    for listener in listeners:
        listener(call, p, chosen)
    return chosen


def backend_of(call: StageCall, p: Problem, platform: str) -> str:
    """The backend that :func:`choose` would take, asked ahead of a lowering; it raises as that does."""
    return _choose(call, p, platform).backend


def _tuned(call: StageCall, p: Problem, platform: str, chosen: Chosen) -> Chosen:
    """With the plan of a tuned table where one holds: the same kernels, the same bits, other tiles."""
    module = importlib.import_module(f"jaxnorm.kernels.configs.{call.definition.plans[chosen.backend]}")
    plan, note = plans.choose(
        chosen.plan,
        chosen.backend,
        p,
        _target.kind(platform, p.target),
        getattr(module, "candidates", lambda problem: []),
        lambda launch: _launch.compile_launch(launch, p, chosen.backend).image,
    )
    return replace(chosen, plan=plan, reason=f"{chosen.reason}; {note}") if note else chosen


def _choose(call: StageCall, p: Problem, platform: str) -> Chosen:
    named, by = call.backend, call.backend_source
    if platform == "cpu":
        if named in (None, "xla"):
            return Chosen(
                "xla",
                f"named by {by}" if named else "platform cpu: the xla backend is what runs there",
                rejected=() if named else tuple((b, "needs a GPU") for b in ("triton", "hip")),
            )
        raise UnsupportedError(
            call.op,
            "cpu",
            f"backend={named!r} is not usable: it needs a GPU and this call is for the {platform.upper()}.",
            "Leave backend=None (the xla backend runs here)."
            if by == "backend="
            else f"It was named by {by}: take that back, and backend=None runs on xla here.",
        )
    if named == "xla":
        return Chosen("xla", f"named by {by}")
    if named is not None:
        plan, road = _serve(call, p, platform, named)
        return Chosen(named, f"named by {by}", plan, road)
    order, why = _order(call, p)
    rejected: list[tuple[str, str]] = []
    for backend in order:
        if backend == "xla":
            return Chosen(
                "xla", why if not rejected else "no kernel backend serves this call", rejected=tuple(rejected)
            )
        try:
            plan, road = _serve(call, p, platform, backend)
        except _NoKernelError as e:
            rejected.append((backend, e.reason))
            continue
        except UnsupportedError as e:
            if backend in required() or ("launcher" in required() and "launcher" in e.reason):
                raise
            rejected.append((backend, e.reason))
            continue
        first = why if not rejected else f"{rejected[0][0]} cannot serve it"
        return Chosen(backend, first, plan, road, tuple(rejected))
    raise AssertionError("the order of backends ends with xla")


def _order(call: StageCall, p: Problem) -> tuple[tuple[str, ...], str]:
    """Backends to try, best first, and the reason for the first."""
    entry = table.lookup(p.target, call.stage, p.dtype(call.names[0]), p.features, has_residual(p))
    if entry is not None:
        rest = tuple(b for b in ("hip", "triton") if b != entry.backend)
        order = ("xla",) if entry.backend == "xla" else (entry.backend, *rest, "xla")
        return order, f"measured best at N={entry.features} on {entry.device}"
    # Without a measurement: HIP first. Its first call takes a quarter of Triton's time, and at decode sizes on the H200 its kernels
    # were ahead (benchmarks/results/h200); for rows in plenty Triton's are up to 5 % faster, which is what the table is for.
    return (
        "hip",
        "triton",
        "xla",
    ), f"no measurement for {p.target}, N={p.features}: kernels before xla, hip before triton"


def has_residual(p: Problem) -> bool:
    return any(p.has(name) for name in ("residual", "residual_out", "dresidual_out"))


class _NoKernelError(UnsupportedError):
    """The backend is there but has no kernel for this call: nothing is missing that ``JAXNORM_REQUIRE`` could ask for."""


def _serve(call: StageCall, p: Problem, platform: str, backend: str) -> tuple[tuple[Launch, ...], str]:
    """(plan, road) of a kernel backend, or UnsupportedError with the reason."""
    usable, reason, remedy = compiler(backend, p.target)
    if not usable and not cache.has_shipped():
        raise UnsupportedError(call.op, p.target, f"backend={backend!r} is not usable: {reason}", remedy)
    road, why = _launch.road(backend, platform)
    if road is None:
        raise UnsupportedError(call.op, p.target, f"backend={backend!r} is not usable: {why}", "Leave backend=None.")
    module = call.definition.plans.get(backend)
    try:
        if module is None:
            raise Unsupported(f"{call.op} has no {backend} kernel.")
        if not isinstance(p.rows, int):
            raise Unsupported(
                f"the number of rows is symbolic ({p.rows}), and a kernel is launched for a known number."
            )
        plan = importlib.import_module(f"jaxnorm.kernels.configs.{module}").plan(p)
    except Unsupported as e:
        raise _NoKernelError(call.op, p.target, str(e), "Leave backend=None to fall back to another backend.") from None
    if not usable and not _launch.shipped(plan, p, backend):
        reason = f"{reason} {cache.directory()} holds precompiled kernels, but not those of this call."
        raise UnsupportedError(call.op, p.target, f"backend={backend!r} is not usable: {reason}", remedy)
    return plan, road


def compiler(backend: str, target: str) -> tuple[bool, str, str]:
    """(usable, reason, remedy) of the compiler behind a kernel backend."""
    if backend == "triton":
        from ._compile import triton

        return triton.available()
    from ._compile import hip

    return hip.available(target)


@dataclass(frozen=True)
class BackendInfo:
    """Whether a backend can be used on this machine's default device; if not, why, and what to do about it."""

    usable: bool
    reason: str
    remedy: str = ""


def backends() -> dict[str, BackendInfo]:
    """``{"xla": ..., "triton": ..., "hip": ...}``: what can run on the default device of this process.

    Also registers our custom calls with XLA and ``Quantized`` with jax.export, which a process needs that runs a deserialised
    export and calls no op itself.
    """
    from . import _types  # noqa: F401  registers Quantized

    _native.status()
    platform = _target.default_platform()
    info = {"xla": BackendInfo(True, f"runs on {platform}")}
    for backend in ("triton", "hip"):
        info[backend] = _info(backend, platform)
    return info


def _info(backend: str, platform: str) -> BackendInfo:
    if platform not in _target.DEFAULT:
        device = f"jax's default device is {platform}"
        return BackendInfo(
            False, f"needs a GPU; {device}.", "Install jax[cuda13], or the ROCm plugin of jax, on a machine with a GPU."
        )
    try:
        t = _target.resolve(platform, _target.named())
        usable, reason, remedy = compiler(backend, t)
        if not usable and not cache.has_shipped():
            return BackendInfo(False, reason, remedy)
        road, why = _launch.road(backend, platform)
    except (UnsupportedError, ValueError) as e:
        return BackendInfo(False, str(e), "")
    if road is None:
        return BackendInfo(False, why, "Reinstall jaxnorm with a C++ compiler present.")
    by = "" if usable else f", precompiled calls of {cache.directory()} only: {reason}"
    return BackendInfo(True, f"{t} through {road}" + (f" ({why})" if why else "") + by)
