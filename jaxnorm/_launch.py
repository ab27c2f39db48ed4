"""The primitive behind every stage, its lowering per platform, and the roads by which a code object is launched.

On CPU the primitive is the reference. On a GPU platform the dispatch picks a backend, the plan of that backend gives the launches,
and they become custom calls through the first road that is there, one for the plan (launcher) or one for each launch (others):

    launcher     our own typed-FFI launcher: Triton and HIP kernels, both vendors, captured in command buffers
    jaxlib       jaxlib's own Triton call with the image embedded (jaxlib >= 0.11.2): Triton kernels without our .so
    jax-triton   ``jax_triton.triton_call``: Triton kernels, when asked for or when nothing else is there
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Container, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import mlir

from . import _compat, _native
from ._stage import StageCall
from .errors import UnsupportedError, value_error
from .kernels.configs import Launch, Problem

BRIDGES = ("launcher", "jaxlib", "jax-triton")
JAXLIB_TARGET = "triton_kernel_call_ffi"

stage_p = jex_core.Primitive("jaxnorm_stage")
stage_p.multiple_results = True
stage_p.def_impl(lambda *args, call: _jitted(call)(*args))


@functools.cache
def _jitted(call: StageCall) -> Any:
    return jax.jit(functools.partial(stage_p.bind, call=call))


@stage_p.def_abstract_eval
def _(*avals: Any, call: StageCall) -> list[Any]:
    first = avals[0]
    if any(_compat.varying(a) != _compat.varying(first) for a in avals):
        raise ValueError(
            f"{call.op}: operands vary over different mesh axes: {[sorted(_compat.varying(a)) for a in avals]}"
        )
    lead = call.lead(first.shape)
    return [_compat.like(first, call.result_shape(name, lead), np.dtype(dtype)) for name, _, dtype in call.results]


def _lower_reference(ctx: Any, *args: Any, call: StageCall) -> Any:
    return _lower(ctx, args, lambda *operands: list(call.compute(operands)))


def _lower(ctx: Any, args: Any, fun: Any) -> Any:
    plain = ctx.replace(
        avals_in=[_compat.plain(a) for a in ctx.avals_in], avals_out=[_compat.plain(a) for a in ctx.avals_out]
    )
    return mlir.lower_fun(fun, multiple_results=True)(plain, *args)


def _lower_cpu(ctx: Any, *args: Any, call: StageCall) -> Any:
    from . import _dispatch

    if (
        len(ctx.module_context.platforms) > 1
    ):  # one export for several platforms; a plain CPU run may imitate any flavour
        _check_fp8(call, "cpu")
    _dispatch.choose(call, problem(call, ctx.avals_in, ""), "cpu")  # raises when a kernel backend was named
    return _lower_reference(ctx, *args, call=call)


def _check_fp8(call: StageCall, t: str) -> None:
    """A program has one result type, so "fp8" must mean the same format on every platform it is lowered for."""
    from ._compile import target

    options = dict(call.options)
    if options.get("fp8") and options["spec"].dtype != target.native_fp8(t):
        got = f"'fp8', traced as {options['spec'].dtype}, lowered for {t} whose own is {target.native_fp8(t)}"
        raise value_error(
            call.op, "spec.dtype", got, "one flavour", "Name the dtype, or trace inside jaxnorm.use_target."
        )


def _lower_gpu(platform: str, ctx: Any, *args: Any, call: StageCall) -> Any:
    from . import _dispatch
    from ._compile import target

    p = problem(call, ctx.avals_in, target.resolve(platform, call.targets))
    _check_fp8(call, p.target)
    chosen = _dispatch.choose(call, p, platform)
    if chosen.backend == "xla":
        return _lower_reference(ctx, *args, call=call)

    def launches(*operands: jax.Array) -> list[jax.Array]:
        out = run_plan(chosen.plan, p, dict(zip(call.names, operands, strict=True)), chosen.backend, chosen.road)
        return [out[name] for name, _, _ in call.results]

    return _lower(ctx, args, launches)


mlir.register_lowering(stage_p, _lower_cpu)  # the CPU, and every platform that we have no kernels for
mlir.register_lowering(stage_p, functools.partial(_lower_gpu, "cuda"), platform="cuda")
mlir.register_lowering(stage_p, functools.partial(_lower_gpu, "rocm"), platform="rocm")


def problem(call: StageCall, avals: Any, target: str) -> Problem:
    """The kernel side's view of a call on folded operands."""
    (rows,) = call.lead(avals[0].shape)
    operands = [(n, tuple(a.shape), np.dtype(a.dtype).name) for n, a in zip(call.names, avals, strict=True)]
    results = [(n, call.result_shape(n, (rows,)), dtype) for n, _, dtype in call.results]
    buffers = operands + results
    return Problem(
        stage=call.stage,
        rows=rows,
        features=call.features,
        shapes=tuple((n, s) for n, s, _ in buffers),
        dtypes=tuple((n, d) for n, _, d in buffers),
        options=call.options,
        target=target,
    )


def bridge() -> str | None:
    """``JAXNORM_TRITON_BRIDGE``, checked."""
    name = os.environ.get("JAXNORM_TRITON_BRIDGE") or None
    if name is not None and name not in BRIDGES:
        raise ValueError(f"JAXNORM_TRITON_BRIDGE: got {name!r}, expected one of {', '.join(BRIDGES)}.")
    return name


def road(backend: str, platform: str) -> tuple[str | None, str]:
    """(road for the launches of a backend, why): the bridge that was asked for, else the first that is there; None = no road."""
    from . import _dispatch

    status = _native.status()
    asked = bridge() if backend == "triton" else None
    if asked == "launcher" or (asked is None and (status.ok or "launcher" in _dispatch.required())):
        return ("launcher", "") if status.ok else (None, f"{status.reason} {status.remedy}")
    if backend == "hip":
        return None, f"{status.reason} {status.remedy}"
    has_image_call = _jaxlib_version() >= (0, 11, 2)
    if asked == "jaxlib" or (asked is None and has_image_call):
        if has_image_call:
            return "jaxlib", status.reason
        return (
            None,
            f"jaxlib {'.'.join(map(str, _jaxlib_version()))} cannot launch an embedded image; 0.11.2 or newer can.",
        )
    from ._compile import jax_triton_bridge

    usable, reason, remedy = jax_triton_bridge.available(platform)
    return ("jax-triton", status.reason) if usable else (None, f"{status.reason} {reason} {remedy}".strip())


def _jaxlib_version() -> tuple[int, ...]:
    import jaxlib.version

    return tuple(int(p) for p in jaxlib.version.__version__.split(".")[:3])


def run_plan(
    plan: tuple[Launch, ...], p: Problem, operands: dict[str, jax.Array], backend: str, by: str | None = None
) -> dict[str, jax.Array]:
    """Run the launches of a plan on folded operands, inside a trace; every buffer by name, scratch included."""
    platform = "rocm" if p.target.startswith("gfx") else "cuda"
    if by is None:
        by, why = road(backend, platform)
        if by is None:
            raise UnsupportedError(
                p.stage, p.target, f"no way to launch {backend} kernels: {why}", "See `python -m jaxnorm doctor`."
            )
    if by == "launcher":
        return _by_launcher(plan, p, operands, backend)
    buffers = dict(operands)
    for launch in plan:
        if launch.meeting > 0:  # only the launcher keeps all blocks on the device: what stands in for it follows
            continue
        outputs = _present(launch, p, buffers)[1]
        types = list(_types(launch, p, outputs).values())
        out = _ROADS[by](launch, p, types, platform, buffers)
        buffers.update(zip(outputs, out, strict=True))
    return buffers


def _types(launch: Launch, p: Problem, outputs: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    temps = {name: (shape, dtype) for name, shape, dtype in launch.temps}
    return {n: jax.ShapeDtypeStruct(*(temps[n] if n in temps else (p.shape(n), p.dtype(n)))) for n in outputs}


def _present(launch: Launch, p: Problem, buffers: Container[str]) -> tuple[list[str], list[str]]:
    """The inputs and outputs that are there."""
    temps = {name for name, _, _ in launch.temps}
    return [n for n in launch.inputs if n in buffers], [n for n in launch.outputs if n in temps or p.has(n)]


def _layout(launch: Launch, p: Problem, buffers: Container[str]) -> tuple[str, list[int]]:
    """One character a kernel parameter, and the scalars as integers (see _native)."""
    temps = {name for name, _, _ in launch.temps}
    chars = ["p" if n in buffers else "n" for n in launch.inputs]
    scalars = []
    for _, kind, value in launch.scalars:
        chars.append({"i32": "i", "i64": "l", "fp32": "f"}[kind])
        scalars.append(struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value))
    chars += ["p" if n in temps or p.has(n) else "n" for n in launch.outputs]
    return "".join(chars), scalars


def _compiler(backend: str) -> Any:
    if backend == "triton":
        from ._compile import triton as compiler
    else:
        from ._compile import hip as compiler
    return compiler


def compile_launch(launch: Launch, p: Problem, backend: str) -> Any:
    """The code object of one launch."""
    return _compiler(backend).compile(launch, p)


def portable_key(launch: Launch, p: Problem, backend: str) -> list[str]:
    """What a shipped code object of one launch is found by."""
    return _compiler(backend).portable_key(launch, p)


def shipped(plan: tuple[Launch, ...], p: Problem, backend: str) -> bool:
    """Whether the directory of code objects was shipped with all that a plan needs, so that no compiler is."""
    from ._compile import cache

    return cache.has_shipped() and all(cache.shipped(portable_key(launch, p, backend)) is not None for launch in plan)


def _by_launcher(plan: tuple[Launch, ...], p: Problem, operands: dict[str, jax.Array], backend: str) -> Any:
    written = [_present(launch, p, ())[1] for launch in plan]
    types = {n: t for launch, names in zip(plan, written, strict=True) for n, t in _types(launch, p, names).items()}
    used = [n for n in operands if any(n in launch.inputs for launch in plan)]
    place = {name: i for i, name in enumerate((*used, *types))}
    kernels, aliases = [], {}
    for launch, outputs in zip(plan, written, strict=True):
        layout, scalars = _layout(launch, p, place)
        inputs = _present(launch, p, place)[0]
        buffers = tuple(place[n] for n in (*inputs, *outputs))
        code = compile_launch(launch, p, backend)
        kernels.append(
            _native.Kernel(code, launch.grid, layout, tuple(scalars), buffers, launch.overlaps, launch.meeting)
        )
        aliases |= {place[a]: place[b] - len(used) for a, b in launch.aliases if a in used and b in types}
    out = _native.launch(kernels, [operands[n] for n in used], list(types.values()), aliases)
    return dict(operands) | dict(zip(types, out, strict=True))


def _by_jaxlib(launch: Launch, p: Problem, types: Any, platform: str, buffers: Any) -> Any:
    from ._compile import jaxlib_proto

    attributes = jaxlib_proto.ffi_arguments(compile_launch(launch, p, "triton"), launch, p, platform)
    ffi = functools.partial(jax.ffi.ffi_call, JAXLIB_TARGET, input_output_aliases=launch.aliased())
    call = lambda args, outs: ffi(outs)(*args, **attributes)  # noqa: E731
    return _without_absent(launch, p, types, buffers, call)


def _by_jax_triton(launch: Launch, p: Problem, types: Any, platform: str, buffers: Any) -> Any:
    from ._compile import jax_triton_bridge

    return _without_absent(launch, p, types, buffers, lambda args, outs: jax_triton_bridge.call(launch, p, args, outs))


def _without_absent(launch: Launch, p: Problem, types: Any, buffers: Any, call: Any) -> list[jax.Array]:
    """Roads without null pointers: the first operand stands in for an absent operand, one element for an absent result."""
    temps = {name for name, _, _ in launch.temps}
    first = next(iter(buffers.values()))
    present = [n in temps or p.has(n) for n in launch.outputs]
    wanted = iter(types)
    outs = [next(wanted) if there else jax.ShapeDtypeStruct((1,), first.dtype) for there in present]
    out = call([buffers.get(n, first) for n in launch.inputs], outs)
    return [o for o, there in zip(out, present, strict=True) if there]


_ROADS = {"jaxlib": _by_jaxlib, "jax-triton": _by_jax_triton}
