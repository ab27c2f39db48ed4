"""The JAX contestants: jaxnorm by backend, the norm as people write it in jax.numpy, tokamax, and the copy."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._bench import plain, programs
from jaxnorm._bench.timing import Program, rotation

from .cells import EPS, OUTPUTS, Cell
from .inputs import Arrays, Inputs

Norm = Callable[[jax.Array, jax.Array], jax.Array]
AddNorm = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _jnp_backward_saved(n: jax.Array, rstd: jax.Array, weight: jax.Array, dy: jax.Array, dres: jax.Array | None) -> Any:
    """The backward as one would write it by hand, from the saved rstd."""
    xhat = n.astype(jnp.float32) * rstd
    dy32 = dy.astype(jnp.float32)
    wdy = dy32 * weight.astype(jnp.float32)
    dx = rstd * (wdy - xhat * jnp.mean(wdy * xhat, axis=-1, keepdims=True))
    if dres is not None:
        dx = dx + dres.astype(jnp.float32)
    return dx.astype(n.dtype), jnp.sum(dy32 * xhat, axis=0).astype(weight.dtype)


def _bind(f: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Callable[[], Any]]:
    return [functools.partial(f, *a) for a in arguments]


def _program(name: str, f: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Program:
    return Program(name, _bind(f, arguments), jax.block_until_ready)


def _columns(inputs: Inputs, *names: str) -> list[tuple[jax.Array, ...]]:
    return [tuple(s[n] for n in names) for s in inputs.sets]


def norm_program(
    name: str, inputs: Inputs, norm: Norm | None, add_norm: AddNorm | None, recompute: bool = False
) -> Program:
    """The op of the cell built from a library's forward function(s) and autodiff, under one jit.

    A backward is timed alone, on what the forward saved. ``recompute`` puts the forward into the timed program instead, from
    which XLA drops what the gradient does not need: for plain jax.numpy, whose saved values would be float32 [M, N] arrays.

    Raises:
      NotImplementedError: the library has no function for this op.
    """
    op = inputs.cell.op
    f: Any = add_norm if op.startswith("add_") else norm
    if f is None:
        raise NotImplementedError(f"{name} has no {op}")
    if op == "rmsnorm":
        return _program(name, jax.jit(lambda x, w: (f(x, w),)), _columns(inputs, "x", "weight"))
    if op == "add_rmsnorm":
        return _program(name, jax.jit(lambda x, r, w: tuple(f(x, r, w))), _columns(inputs, "x", "residual", "weight"))
    if op == "rmsnorm_fwdbwd":
        return _program(name, jax.jit(functools.partial(_forward_backward, f)), _columns(inputs, "x", "weight", "dy"))
    if op == "rmsnorm_valgrad":
        return _program(name, jax.jit(functools.partial(_value_and_grad, f)), _columns(inputs, "x", "weight"))
    primals = ("x", "residual", "weight") if op == "add_rmsnorm_bwd" else ("x", "weight")
    cotangents = ("dy", "dresidual_out") if op == "add_rmsnorm_bwd" else ("dy",)
    if recompute:
        fun = jax.jit(functools.partial(_backward_recompute, f, len(primals)))
        return _program(name, fun, _columns(inputs, *primals, *cotangents))
    # One trace of the forward for all sets: the saved values then have one tree structure and the backward compiles once.
    forward = jax.jit(lambda *p: jax.vjp(f, *p)[1])
    saved = [forward(*p) for p in _columns(inputs, *primals)]
    backward = jax.jit(_apply_vjp)
    return _program(name, backward, [(v, *c) for v, c in zip(saved, _columns(inputs, *cotangents), strict=True)])


def _first_and_last(grads: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """dx and dweight; the residual's gradient is dx again, and asking for both would add a copy."""
    return grads[0], grads[-1]


def _apply_vjp(vjp: Any, *cotangents: jax.Array) -> Any:
    return _first_and_last(vjp(cotangents if len(cotangents) > 1 else cotangents[0]))


def _backward_recompute(f: Any, primals: int, *args: jax.Array) -> Any:
    _, vjp = jax.vjp(f, *args[:primals])
    return _apply_vjp(vjp, *args[primals:])


def _forward_backward(f: Any, x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
    y, vjp = jax.vjp(f, x, w)
    return (y, *vjp(dy))


def _value_and_grad(f: Any, x: jax.Array, w: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(lambda *a: 0.5 * jnp.sum(f(*a).astype(jnp.float32) ** 2), argnums=(0, 1))(x, w)
    return (loss, *grads)


def jaxnorm_program(backend: str | None, inputs: Inputs) -> Program:
    """jaxnorm's public functions; ``None`` is what a user gets who names no backend."""
    import jaxnorm

    return norm_program(
        "jaxnorm" if backend is None else f"jaxnorm-{backend}",
        inputs,
        lambda x, w: jaxnorm.rmsnorm(x, w, eps=EPS, backend=backend),
        lambda x, r, w: jaxnorm.add_rmsnorm(x, r, w, eps=EPS, backend=backend),
    )


def xla_program(inputs: Inputs) -> Program:
    return norm_program("xla", inputs, plain.rmsnorm, plain.add_rmsnorm, recompute=True)


def xla_saved_program(inputs: Inputs) -> Program:
    """The hand-written backward on saved values: what XLA makes of the best one can give it."""
    op = inputs.cell.op
    if op not in ("rmsnorm_bwd", "add_rmsnorm_bwd"):
        raise NotImplementedError("xla-saved is a backward only")

    @jax.jit
    def save(s: Arrays) -> tuple[jax.Array, jax.Array]:
        n = s["x"] if op == "rmsnorm_bwd" else s["x"] + s["residual"]
        n32 = n.astype(jnp.float32)
        return n, lax.rsqrt(jnp.mean(n32 * n32, axis=-1, keepdims=True) + EPS)

    arguments = [(*save(s), s["weight"], s["dy"], s.get("dresidual_out")) for s in inputs.sets]
    return _program("xla-saved", jax.jit(_jnp_backward_saved), arguments)


@functools.cache
def _tokamax() -> Any:
    """tokamax's normalisation. Its profiling packages serve its own benchmarks only, so stand-ins will do where they are absent."""
    for name in ("xprof.cli.tools.get_kernel_stats_tool", "tensorboardX"):
        try:
            importlib.import_module(name)
        except ImportError:
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                stand_in = types.ModuleType(".".join(parts[:i]))
                stand_in.__path__ = []  # a package, so that what lies below can be imported
                sys.modules[stand_in.__name__] = stand_in
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], stand_in)
    from tokamax._src.ops.normalization import api

    return api


def tokamax_program(implementation: str, inputs: Inputs) -> Program:
    """tokamax.layer_norm without the mean."""
    api = _tokamax()

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return api.layer_norm(x, w, None, epsilon=EPS, subtract_mean=False, implementation=implementation)

    return norm_program(f"tokamax-{implementation}", inputs, norm, None, recompute=implementation == "xla")


def copy_program(cell: Cell) -> Program:
    """The copy of the cell's bytes, as many buffers of it as there are input sets."""
    return programs.copy(cell.bytes, rotation(cell.input_bytes)[0], "copy-xla")


def outputs_of(program: Program, index: int, cell: Cell) -> list[jax.Array]:
    """The outputs of one call, in the order of ``OUTPUTS[op]``."""
    out = program.calls[index % len(program.calls)]()
    program.wait(out)
    if len(out) != len(OUTPUTS[cell.op]):
        raise ValueError(f"{program.name}: got {len(out)} outputs, expected {len(OUTPUTS[cell.op])}")
    return list(out)
