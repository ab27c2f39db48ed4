"""From an op to timed programs: one for each contestant, all on the same rotating inputs, and the copy of the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .timing import Program

Arguments = tuple[Any, ...]


def copy(nbytes: int, sets: int, name: str = "copy") -> Program:
    """An elementwise kernel of XLA's that reads and writes half of ``nbytes`` each.

    In 4-byte words, which XLA moves faster than 2-byte ones; and a negation, for a plain copy would become a memcpy.
    """
    fill = jax.jit(lambda i: lax.iota(jnp.int32, max(nbytes // 8, 1)) * 747796405 + i)
    return program(name, jax.jit(lambda a: -a), [(fill(jnp.int32(i)),) for i in range(sets)])


def program(name: str, f: Callable[..., Any], sets: Sequence[Arguments]) -> Program:
    return Program(name, [functools.partial(f, *arguments) for arguments in sets], jax.block_until_ready)


def forward(name: str, f: Callable[..., Any], sets: Sequence[Arguments]) -> Program:
    return program(name, jax.jit(f), sets)


def backward(
    name: str,
    f: Callable[..., Any],
    sets: Sequence[Arguments],
    cotangents: Sequence[Any],
    keep: Sequence[int],
    recompute: bool = False,
) -> Program:
    """The gradients of ``f``, timed alone on what the forward saved.

    Args:
      keep:      the gradients that come back. Not the residual's: it is that of x again, and asking for both would add a copy.
      recompute: put the forward into the timed program instead, from which XLA drops what the gradients do not need: for plain
        jax.numpy, whose saved values would be float32 arrays as large as x.
    """
    if recompute:

        def both(arguments: Arguments, cotangent: Any) -> Any:
            return _gradients(keep, jax.vjp(f, *arguments)[1], cotangent)

        return program(name, jax.jit(both), list(zip(sets, cotangents, strict=True)))
    # One trace of the forward for all sets: the saved values then have one tree structure and the backward compiles once.
    save = jax.jit(lambda *arguments: jax.vjp(f, *arguments)[1])
    saved = [save(*arguments) for arguments in sets]
    return program(name, jax.jit(functools.partial(_gradients, keep)), list(zip(saved, cotangents, strict=True)))


def _gradients(keep: Sequence[int], vjp: Any, cotangent: Any) -> tuple[Any, ...]:
    gradients = vjp(cotangent)
    return tuple(gradients[i] for i in keep)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes with dtypes, of a tree."""
    return sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def distance(got: Any, want: Any) -> float:
    """Largest ``||got - want|| / ||want||`` over the results; quantised ones are compared as what they stand for.

    Raises:
      ValueError: the number of results or a shape differs.
    """
    got, want = _floats(got), _floats(want)
    if [a.shape for a in got] != [a.shape for a in want]:
        raise ValueError(f"results: got shapes {[a.shape for a in got]}, expected {[a.shape for a in want]}")
    norms = [(jnp.linalg.norm(g - w), jnp.linalg.norm(w)) for g, w in zip(got, want, strict=True)]
    return max(float(d / jnp.maximum(n, 1e-30)) for d, n in norms)


def _floats(tree: Any) -> list[jax.Array]:
    def is_quantized(leaf: Any) -> bool:
        return hasattr(leaf, "dequantize")

    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return [(a.dequantize() if is_quantized(a) else a).astype(jnp.float32).ravel() for a in leaves]
