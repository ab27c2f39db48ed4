"""The fused call: one kernel launch on each device of a group, over peer-mapped memory (csrc/include/jaxnorm/distributed.h).

When a call is traced, platform, sizes and options decide whether it may be fused. Which devices the ranks are is known when it is
lowered; where they cannot be served (several hosts, an abstract mesh, an export) the composite, which was traced beside it, is
lowered instead.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import batching, mlir

from .. import _compat, _dispatch, _launch, _native
from .._compile import cache, hip, target
from .._ref import quant as ref
from .._stage import Arrays
from .._types import Quantized
from ..errors import UnsupportedError
from ..kernels.configs import Launch, Problem, Unsupported, distributed_hip
from . import composite, processes, schedule
from ._config import Config

VARIABLE = "JAXNORM_FUSED_COMM"
BUFFERS = ("x", "residual", "weight", "values", "scale", "residual_out")
_sites = itertools.count()
_warned: set[str] = set()


@dataclass(frozen=True)
class Decision:
    """How a call runs, and why; ``explain`` prints it."""

    op: str
    fused: bool
    reason: str
    launch: Launch | None = None
    problem: Problem | None = None
    config: Config | None = None
    dtypes: tuple[tuple[str, str], ...] = ()
    """The call: its configuration, and the dtypes of its operands by name."""


def decide(config: Config, dtypes: tuple[tuple[str, str], ...], impl: str) -> Decision:
    """``dtypes``: of the operands, by name. Looks at nothing but the call, the target and the environment."""
    no = functools.partial(Decision, config.op, False)
    if impl == "composite":
        return no("impl='composite'")
    switch = os.environ.get(VARIABLE, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: got {switch!r}, expected 0 or 1.")
    if switch == "0":
        return no(f"{VARIABLE}=0")
    platform = schedule.platform()
    if platform == "cpu":
        return no("platform cpu: the fused kernel needs GPUs")
    if platform == "rocm" and switch != "1":
        return no(f"ROCm: compiled, never run on AMD silicon; {VARIABLE}=1 turns it on")
    if impl == "auto" and switch != "1" and config.ranks not in schedule.FUSED_RANKS[platform]:
        return no(f"not measured to be faster with {config.ranks} ranks")
    if config.norm != "rmsnorm" or config.reduce != "exact":
        return no(f"the fused kernel has no norm={config.norm!r} with reduce={config.reduce!r}")
    if not config.gather and config.ragged:
        return no("rows that the ranks do not divide, and no gather")
    if _native.fused_library() is None:
        status = _native.status()
        return no(status.reason if not status.ok else "the launcher was built without the fused calls")
    return _planned(config, dtypes, no)


def _planned(config: Config, dtypes: tuple[tuple[str, str], ...], no: Any) -> Decision:
    t = target.in_force(target.named())[0]
    usable, reason, _ = hip.available(t)
    if not usable and not cache.has_shipped():
        return no(reason)
    p = problem(config, dtypes, t)
    try:
        launch = distributed_hip.tuned(p, **dict(schedule.forced()[2]))
    except Unsupported as e:
        return no(str(e))
    if not usable and not _launch.shipped((launch,), p, "hip"):
        return no(f"{reason} {cache.directory()} holds precompiled kernels, but not that of this call.")
    half = distributed_hip.half_bytes(p)
    if half > schedule.HALF_BYTES:
        return no(f"its workspace would have halves of {half} bytes, more than {schedule.HALF_BYTES}")
    return Decision(config.op, True, f"{p.option('schedule')} over peer memory", launch, p)


def problem(config: Config, dtypes: tuple[tuple[str, str], ...], t: str) -> Problem:
    """The kernel side's view."""
    has_residual = any(n == "residual" for n, _ in dtypes)
    shots = schedule.shots(config, not config.scatter or not has_residual)
    options = {
        "ranks": config.ranks, "schedule": shots, "gather": config.gather, "replicated": not config.scatter, "spec": config.spec,
        "eps": config.eps, "weight_offset": config.weight_offset, "cast": config.cast,
    }  # fmt: skip
    return Problem(distributed_hip.STAGE, config.rows, config.features, (), dtypes, tuple(options.items()), t)


def run(config: Config, arrays: Arrays, impl: str) -> tuple[Any, jax.Array | None]:
    """(y or Quantized, residual_out or None), fused where it can be."""
    dtypes = tuple((n, a.dtype.name) for n, a in arrays.items())
    decision = replace(decide(config, dtypes, impl), config=config, dtypes=dtypes)
    if not decision.fused:
        _complain(config, decision, impl)
        return composite.run(config, {**arrays, "x": note(arrays["x"], decision)})
    whole = functools.partial(_with_composite, config, decision)
    return _composite_gradient(config, whole)(arrays) if config.spec is None else whole(arrays)


def _complain(config: Config, decision: Decision, impl: str) -> None:
    if impl != "fused":
        return
    if "fused" in _dispatch.required():
        raise UnsupportedError(config.op, schedule.platform(), f"impl='fused' cannot be served: {decision.reason}.",
                               "Leave impl='auto'.")  # fmt: skip
    if decision.reason not in _warned:
        _warned.add(decision.reason)
        warnings.warn(
            f"{config.op}: impl='fused' runs as the composite: {decision.reason}", RuntimeWarning, stacklevel=5
        )


def _composite_gradient(config: Config, whole: Any) -> Any:
    """Differentiated, it is the composite altogether."""

    @jax.custom_vjp
    def op(arrays: Arrays) -> Any:
        return whole(arrays)

    op.defvjp(lambda arrays: jax.vjp(functools.partial(composite.run, config), arrays), lambda vjp, cts: vjp(cts))
    return op


def _with_composite(config: Config, decision: Decision, arrays: Arrays) -> tuple[Any, jax.Array | None]:
    """Binds the fused primitive with the composite beside it."""
    names = tuple(n for n in BUFFERS[:3] if n in arrays)
    operands = tuple(arrays[n] for n in names)
    closed, shapes = jax.make_jaxpr(
        lambda *a: _flat(composite.run(config, dict(zip(names, a, strict=True)))), return_shape=True
    )(*operands)
    parts = tuple(shapes)
    out = fused_p.bind(*operands, config=config, names=names, parts=parts, decision=decision, composite=closed)
    found = dict(zip(parts, out, strict=True))
    result = found["values"]
    if config.spec is not None:
        result = Quantized(result, found["scale"], config.spec)
    return result, found.get("residual_out")


def _flat(results: tuple[Any, jax.Array | None]) -> dict[str, jax.Array]:
    result, residual_out = results
    quantised = isinstance(result, Quantized)
    found = {"values": result.values, "scale": result.scale} if quantised else {"values": result}
    return dict(sorted((found if residual_out is None else {**found, "residual_out": residual_out}).items()))


# ---- the primitives

fused_p = jex_core.Primitive("jaxnorm_fused")
fused_p.multiple_results = True
fused_p.def_abstract_eval(lambda *avals, composite, **_: list(composite.out_avals))

note_p = jex_core.Primitive("jaxnorm_note")
"""The identity, with a decision for ``explain`` to find."""
note_p.def_abstract_eval(lambda a, decision: a)
note_p.def_impl(lambda a, decision: a)
mlir.register_lowering(note_p, lambda ctx, a, decision: [a])
batching.primitive_batchers[note_p] = lambda args, dims, decision: (note_p.bind(*args, decision=decision), dims[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def note(a: jax.Array, decision: Decision) -> jax.Array:
    return note_p.bind(a, decision=decision)


note.defvjp(lambda a, decision: (note(a, decision), None), lambda decision, _, ct: (ct,))


def _fallback(composite: Any) -> Any:
    return jex_core.jaxpr_as_fun(composite)


def _lower_composite(ctx: Any, *args: Any, composite: Any, **_: Any) -> Any:
    return mlir.lower_fun(_fallback(composite), multiple_results=True)(ctx, *args)


def _batch(args: Any, dims: Any, *, composite: Any, **_: Any) -> Any:
    out = jax.vmap(_fallback(composite), in_axes=dims)(*args)
    return out, [0] * len(out)


def groups(mesh: Any, axis: Any) -> tuple[list[list[int]] | None, str]:
    """(device ids of each group along the axis, by rank, or None; the reason)."""
    if mesh is None:
        return None, "the devices of the mesh are not known when the program is lowered"
    axes = axis if isinstance(axis, tuple) else (axis,)
    order = [mesh.axis_names.index(a) for a in axes]
    ranks = int(np.prod([mesh.devices.shape[i] for i in order]))
    rows = np.moveaxis(mesh.devices, order, range(-len(order), 0)).reshape(-1, ranks)
    if any(d.platform != "gpu" for d in rows.flat):
        return None, "the mesh has devices that are no GPUs"
    return [[processes.device_id(d) for d in row] for row in rows], ""


def _lower(
    platform: str, ctx: Any, *args: Any, config: Config, names: Any, parts: Any, decision: Decision, composite: Any
) -> Any:
    found, reason = groups(_compat.lowered_mesh(ctx.module_context), config.axis)
    t, p, launch = target.resolve(platform, target.named()), decision.problem, decision.launch
    if found is not None and (p is None or p.target != t):
        found, reason = None, f"it was traced for another target than {t}"
    half = distributed_hip.half_bytes(p) if p else 0
    if found is not None and (problematic := processes.unreachable(found, half)):
        found, reason = None, problematic
    if found is None or p is None or launch is None:
        if "fused" in _dispatch.required():
            raise UnsupportedError(config.op, t, f"the fused kernel cannot serve it: {reason}.", "Leave impl='auto'.")
        return _lower_composite(ctx, *args, composite=composite)
    code = hip.compile(launch, p)

    def call(*operands: jax.Array) -> list[jax.Array]:
        out = _results(
            config, p, _ffi_call(config, p, launch, code, found, half, dict(zip(names, operands, strict=True)))
        )
        return [out[n] for n in parts]

    return _launch._lower(ctx, args, call)


def _ffi_call(
    config: Config, p: Problem, launch: Any, code: Any, found: list[list[int]], half: int, operands: Arrays
) -> dict[str, jax.Array]:
    """The custom call on plain arrays: values, scale in row layout, residual_out."""
    rows, n, spec = config.rows if config.gather else config.share, config.features, config.spec
    types: dict[str, jax.ShapeDtypeStruct] = {}
    if spec is None:
        types["values"] = jax.ShapeDtypeStruct((rows, n), config.dtype)
    else:
        types["values"] = jax.ShapeDtypeStruct((rows, n // 2 if spec.dtype == "fp4" else n), spec.value_dtype)
        types["scale"] = jax.ShapeDtypeStruct(
            (rows, spec.groups(n)), "uint8" if spec.scale_dtype == "e8m0" else "float32"
        )
    if "residual" in operands:
        types["residual_out"] = jax.ShapeDtypeStruct(operands["residual"].shape, operands["residual"].dtype)
    site = next(_sites)
    # what decides who sends what, and how
    what = repr((site, config, p.dtypes, launch.grid, launch.constants)).encode()
    call = jax.ffi.ffi_call(_native.FUSED_TARGET, tuple(types.values()))
    out = call(
        *operands.values(),
        op=config.op,
        image=code.image,
        name=code.name,
        target=code.target,
        layout="".join("p" if b in operands or b in types else "n" for b in BUFFERS),
        devices=np.array(found, np.int64).reshape(-1),
        ranks=np.int64(config.ranks),
        process=np.int64(processes.index()),
        site=np.int64(site),
        signature=np.int64(int.from_bytes(hashlib.sha256(what).digest()[:4], "little")),
        blocks=np.int64(launch.grid[0]),
        threads=np.int64(launch.threads),
        shared=np.int64(launch.shared),
        rows=np.int64(config.rows),
        share=np.int64(config.share),
        half_bytes=np.int64(half),
        timeout_ns=np.int64(int(config.timeout_s * 1e9)),
        key=np.int64(_native.digest(code)),
    )
    return dict(zip(types, out, strict=True))


def _results(config: Config, p: Problem, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In the form of the composite's: scales laid out, and zeros in the residual rows that no rank has."""
    if "scale" in out:
        assert config.spec is not None
        out["scale"] = ref.lay_out(out["scale"], config.spec)
    if "residual_out" in out and config.scatter and config.ragged:
        first = jax.lax.axis_index(config.axis) * config.share
        there = (first + jnp.arange(config.share) < config.rows)[:, None]
        out["residual_out"] = jnp.where(there, out["residual_out"], jnp.zeros((), out["residual_out"].dtype))
    return out


mlir.register_lowering(fused_p, _lower_composite)
mlir.register_lowering(fused_p, functools.partial(_lower, "cuda"), platform="cuda")
mlir.register_lowering(fused_p, functools.partial(_lower, "rocm"), platform="rocm")
batching.primitive_batchers[fused_p] = _batch
fused_p.def_impl(lambda *args, **params: jax.jit(functools.partial(fused_p.bind, **params))(*args))
