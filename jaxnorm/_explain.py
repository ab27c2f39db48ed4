"""``explain``: which backend and kernel each jaxnorm op of a function gets, and why the others were not taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from . import _dispatch, _launch
from ._compile import target


@dataclass(frozen=True)
class Choice:
    """What one stage of an op runs on."""

    op: str
    backend: str
    kernel: str
    """Kernels in launch order, or ``jnp``; not those that stand in for one of them, which ``config`` names."""
    config: str
    """Grid and tile of each launch."""
    reason: str
    rejected: tuple[tuple[str, str], ...]
    """(backend, reason) of those that were tried before."""

    def __str__(self) -> str:
        text = f"{self.op:16s} {self.backend:7s} {self.kernel:28s} {self.config}  [{self.reason}]"
        return text + "".join(f"\n{'':16s} not {name}: {why}" for name, why in self.rejected)


class Choices(list[Choice]):
    """A list of :class:`Choice` that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no jaxnorm op in this function"


def explain(fn: Callable[..., Any], *args: Any) -> Choices:
    """The choices for each jaxnorm op that ``fn(*args)`` runs, in program order.

    Traces ``fn`` without running it; ``args`` may be arrays or ``jax.ShapeDtypeStruct``. The platform is that of the default
    device, or the one named by ``use_target``. An op inside a loop is listed once; shapes are those of one shard where the
    function maps over a mesh by ``shard_map``, and of the whole array otherwise.
    """
    platform = _platform()
    found = Choices()
    for call, avals in _stages(jax.make_jaxpr(fn)(*args).jaxpr):
        if avals is None:
            found.append(_distributed(call))
            continue
        p = _launch.problem(call, avals, "" if platform == "cpu" else target.resolve(platform, call.targets))
        found.append(_choice(call, p, _dispatch.choose(call, p, platform)))
    return found


@contextlib.contextmanager
def recording() -> Iterator[Choices]:
    """The choices of everything that is lowered inside the ``with`` block, each different one once."""
    found = Choices()

    def listener(call: Any, p: Any, chosen: _dispatch.Chosen) -> None:
        choice = _choice(call, p, chosen)
        if choice not in found:
            found.append(choice)

    _dispatch.listeners.append(listener)
    try:
        yield found
    finally:
        _dispatch.listeners.remove(listener)


def _choice(call: Any, p: Any, chosen: _dispatch.Chosen) -> Choice:
    # Where blocks meet, whether a device has room for them is known when it runs.
    meet = chosen.road in (None, "launcher")
    plan = [launch for launch in chosen.plan if launch.meeting == 0 or (launch.meeting > 0) == meet]
    kernels = ", ".join(launch.kernel for launch in plan) or "jnp"
    config = ", ".join(_config(launch) for launch in plan) or f"rows={p.rows} N={p.features}"
    if stand_ins := [launch.kernel for launch in chosen.plan if launch.meeting < 0 and meet]:
        config += f", on a device without room for so many blocks {' and '.join(stand_ins)}"
    if (parts := dict(p.options).get("parts", 1)) != 1:
        config = f"adds up the partial sums of {parts} ranks, {config}"
    return Choice(_name(call), chosen.backend, kernels, config, chosen.reason, chosen.rejected)


def _distributed(decision: Any) -> Choice:
    """A distributed call; the local ops of a composite follow as entries of their own."""
    if not decision.fused:
        return Choice(decision.op, "composite", "XLA collectives", "", decision.reason, ())
    return Choice(decision.op, "fused", decision.launch.kernel, _config(decision.launch), decision.reason, ())


def _platform() -> str:
    named = dict(target.named())
    default = target.default_platform()
    if default in target.DEFAULT or not named:
        return default if default in target.DEFAULT else "cpu"
    return next(iter(named))


def _name(call: Any) -> str:
    return call.op + (" backward" if call.stage.endswith("_bwd") else "")


def _config(launch: Any) -> str:
    size = f"{launch.threads} threads" if launch.threads else f"{launch.num_warps} warps"
    return f"grid {'x'.join(map(str, launch.grid))}, {size}"


def _stages(jaxpr: Any) -> Iterator[tuple[Any, list[Any] | None]]:
    """Every stage in a jaxpr and in the jaxprs inside it, each call once; (decision, None) for a distributed call."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jaxnorm_fused", "jaxnorm_note"):
            yield eqn.params["decision"], None
            continue
        if eqn.primitive is _launch.stage_p:
            yield eqn.params["call"], [v.aval for v in eqn.invars]
            continue
        for value in eqn.params.values():
            for inner in _jaxprs(value):
                yield from _stages(inner)


def _jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _jaxprs(value.jaxpr)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _jaxprs(v)
