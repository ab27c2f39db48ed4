"""The torch contestants: eager, torch.compile, Liger, quack; on the same device buffers as the JAX ones (DLPack, no copy).

torch is imported inside the functions: without it, or without one of the libraries, the contestant is reported as absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxnorm._bench.timing import Program, rotation

from .cells import EPS, Cell
from .inputs import Inputs

LIBRARIES = ("quack", "liger", "torch-compile", "torch-eager")


def _functions(library: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(norm(x, w) -> y, add_norm(x, residual, w) -> (y, residual_out)) of a library, differentiable."""
    import torch

    def norm(x: Any, w: Any) -> Any:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, EPS)

    def add_norm(x: Any, r: Any, w: Any) -> Any:
        s = x + r
        return torch.nn.functional.rms_norm(s, (s.shape[-1],), w, EPS), s

    if library == "torch-eager":
        return norm, add_norm
    if library == "torch-compile":
        _configure_compile(torch)
        options = {"dynamic": False, "fullgraph": True}
        return torch.compile(norm, **options), torch.compile(add_norm, **options)
    if library == "quack":
        from quack.rmsnorm import rmsnorm

        return lambda x, w: rmsnorm(x, w, eps=EPS), lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)
    if library == "liger":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # "gemma" casting: float32 throughout, as everyone else here. Not in place: the inputs are used again.
        return (
            lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "gemma", False),
            lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "gemma", False),
        )
    raise ValueError(f"torch library: got {library!r}, expected one of {', '.join(LIBRARIES)}")


@functools.cache
def _configure_compile(torch: Any) -> None:
    import torch._dynamo.config
    import torch._functorch.config

    for name in ("cache_size_limit", "recompile_limit", "accumulated_cache_size_limit", "accumulated_recompile_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 4096)
    torch._functorch.config.donated_buffer = False  # the backward is run many times on one graph


def _views(inputs: Inputs) -> list[dict[str, Any]]:
    """The input sets as torch tensors over the same memory."""
    if "torch" not in inputs.cached:
        inputs.cached["torch"] = [{k: _to_torch(v) for k, v in s.items()} for s in inputs.sets]
    return inputs.cached["torch"]


def _to_torch(array: Any) -> Any:
    import torch

    try:
        return torch.from_dlpack(array)
    except (BufferError, TypeError, RuntimeError):
        return torch.utils.dlpack.from_dlpack(array.__dlpack__())  # the protocol without versions and read-only flags


def torch_program(library: str, inputs: Inputs) -> Program:
    """The op of the cell through a torch library.

    Raises:
      ImportError: torch or the library is missing.
      NotImplementedError: the op is not offered.
    """
    import torch

    op = inputs.cell.op
    if op == "rmsnorm_valgrad":
        raise NotImplementedError("value_and_grad is compared among the JAX programs only")
    norm, add_norm = _functions(library)
    sets = _views(inputs)

    def wait(out: Any) -> Any:
        torch.cuda.synchronize()
        return out

    if op == "rmsnorm":
        calls = [functools.partial(_no_grad, norm, s["x"], s["weight"]) for s in sets]
    elif op == "add_rmsnorm":
        calls = [functools.partial(_no_grad, add_norm, s["x"], s["residual"], s["weight"]) for s in sets]
    elif op == "rmsnorm_fwdbwd":
        calls = [functools.partial(_forward_backward, norm, *_leaves(s), s["dy"]) for s in sets]
    else:
        calls = [_backward_call(op, norm, add_norm, s) for s in sets]
    torch.cuda.synchronize()
    return Program(library, calls, wait, "torch")


def _leaves(s: dict[str, Any]) -> tuple[Any, Any]:
    return s["x"].detach().requires_grad_(), s["weight"].detach().requires_grad_()


def _no_grad(f: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    import torch

    with torch.no_grad():
        out = f(*args)
    return out if isinstance(out, tuple) else (out,)


def _forward_backward(norm: Callable[..., Any], x: Any, w: Any, dy: Any) -> tuple[Any, ...]:
    import torch

    y = norm(x, w)
    return (y.detach(), *torch.autograd.grad(y, (x, w), dy))


def _backward_call(
    op: str, norm: Callable[..., Any], add_norm: Callable[..., Any], s: dict[str, Any]
) -> Callable[[], Any]:
    """The forward runs now; the call repeats the backward alone, on what it saved."""
    import torch

    x, w = _leaves(s)
    if op == "rmsnorm_bwd":
        outputs, cotangents = (norm(x, w),), (s["dy"],)
    else:
        outputs, cotangents = tuple(add_norm(x, s["residual"], w)), (s["dy"], s["dresidual_out"])
    return lambda: torch.autograd.grad(outputs, (x, w), cotangents, retain_graph=True)


def to_jax(tensors: Any) -> list[Any]:
    """Outputs of a torch call as JAX arrays over the same memory."""
    return [_to_jax(t.detach().contiguous()) for t in tensors]


def _to_jax(tensor: Any) -> Any:
    import jax
    import jax.numpy as jnp

    try:
        return jax.dlpack.from_dlpack(tensor)
    except (BufferError, TypeError, RuntimeError, ValueError):
        return jnp.asarray(tensor.float().cpu().numpy())  # through the host: slower, the same values


def torch_copy_program(cell: Cell) -> Program:
    """torch's elementwise negation into buffers of its own, half of the cell's bytes read and half written."""
    import torch

    words = max(cell.bytes // 8, 1)
    count, _ = rotation(cell.input_bytes)
    pairs = []
    for i in range(count):
        source = torch.arange(words, dtype=torch.int32, device="cuda").mul_(747796405).add_(i)
        pairs.append((source, torch.empty_like(source)))

    def wait(out: Any) -> Any:
        torch.cuda.synchronize()
        return out

    torch.cuda.synchronize()
    return Program("copy-torch", [functools.partial(torch.neg, a, out=b) for a, b in pairs], wait, "torch")
