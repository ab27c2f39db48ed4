"""The ops that the transformation, sharding, invariance and GPU suites run over. A new op is covered by adding it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_layernorm
import tolerances

import jaxnorm

OPTIONS = {"eps": 1e-5, "weight_offset": 1.0}
MIXED = {"x": "bfloat16", "residual": "float32", "weight": "float32", "bias": "float32", "x_bias": "float32"}


@dataclass(frozen=True)
class Op:
    """One op with fixed options, its arguments in order, and its oracle."""

    name: str
    call: Callable[..., Any]
    """``call(*arrays, backend=None)``"""
    arguments: tuple[str, ...]
    per_row: tuple[bool, ...]
    """Which arguments have the leading dims; the others are vectors over the features."""
    forward: Callable[..., oracle.Forward]

    def make(
        self, lead: tuple[int, ...], features: int, *, dtypes: dict[str, str] = MIXED, seed: int = 0
    ) -> tuple[np.ndarray, ...]:
        g = cases.rng(seed)
        return tuple(
            cases.normal(g, (*lead, features), dtypes[name], std=1.5)
            if rows
            else cases.weight(g, features, dtypes[name])
            for name, rows in zip(self.arguments, self.per_row, strict=True)
        )

    def function(self, backend: str | None = None) -> Callable[..., tuple[jax.Array, ...]]:
        """The op on one backend; always a tuple of results."""
        return lambda *args: tuple(jax.tree.leaves(self.call(*args, backend=backend)))

    def cotangents(self, args: Sequence[np.ndarray], seed: int = 1) -> tuple[np.ndarray, ...]:
        """Random, of the shape and dtype of every result."""
        g = cases.rng(seed)
        lead = args[0].shape
        names = ("x", "residual")[: sum(self.per_row)]
        return tuple(cases.normal(g, lead, args[self.arguments.index(n)].dtype.name) for n in names)

    def check(self, args: Sequence[np.ndarray], results: Sequence[Any], what: str = "") -> None:
        """Results against the oracle."""
        want = self.forward(*args)
        tolerances.assert_y(results[0], want, what=f"{what} y")
        if want.residual_out is not None:
            tolerances.assert_same_bits(results[1], want.residual_out, f"{what} residual_out")

    def gradients(self, args: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> oracle.Backward:
        return oracle.rmsnorm_backward(
            self.forward(*args), args[-1], *cotangents, weight_offset=OPTIONS["weight_offset"]
        )

    def check_gradients(self, args, cotangents, gradients, what: str = "") -> None:
        """Gradients of all arguments against the float64 formula; each in its argument's dtype and shape."""
        want = self.gradients(args, cotangents)
        for name, rows, arg, got in zip(self.arguments, self.per_row, args, gradients, strict=True):
            assert got.dtype == arg.dtype and got.shape == arg.shape, f"{what} d{name}: {got.dtype}{got.shape}"
            (tolerances.assert_dx if rows else tolerances.assert_dweight)(np.asarray(got), want, f"{what} d{name}")

    def gradients64(self, args: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """All gradients in float64."""
        want = self.gradients(args, cotangents)
        return tuple(want.dx if rows else want.dweight for rows in self.per_row)


@dataclass(frozen=True)
class LayerNormOp(Op):
    """An op whose oracle takes its arguments by name."""

    def named(self, args: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.arguments, args, strict=True))

    def check(self, args: Sequence[np.ndarray], results: Sequence[Any], what: str = "") -> None:
        want = self.forward(*args)
        oracle_layernorm.assert_y(results[0], want, f"{what} y")
        tolerances.assert_same_bits(results[1], want.residual_out, f"{what} residual_out")

    def gradients(self, args: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> Any:
        offset = OPTIONS["weight_offset"]
        return oracle_layernorm.backward(self.forward(*args), self.named(args), *cotangents, weight_offset=offset)

    def check_gradients(self, args, cotangents, gradients, what: str = "") -> None:
        want = self.gradients(args, cotangents)
        for name, arg, got in zip(self.arguments, args, gradients, strict=True):
            assert got.dtype == arg.dtype and got.shape == arg.shape, f"{what} d{name}: {got.dtype}{got.shape}"
            if name in oracle_layernorm.SUMS:
                oracle_layernorm.assert_sum(got, want, oracle_layernorm.SUMS[name], what)
            else:
                tolerances.assert_dx(np.asarray(got), want, f"{what} d{name}")

    def gradients64(self, args: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        want = self.gradients(args, cotangents)
        return tuple(
            want.sums[oracle_layernorm.SUMS[n]] if n in oracle_layernorm.SUMS else want.dx for n in self.arguments
        )


_LAYERNORM = ("x", "residual", "weight", "bias", "x_bias")

OPS: tuple[Op, ...] = (
    Op(
        "rmsnorm", lambda x, w, backend=None: jaxnorm.rmsnorm(x, w, backend=backend, **OPTIONS), ("x", "weight"), (True, False),
        lambda x, w: oracle.rmsnorm(x, w, **OPTIONS),
    ),
    Op(
        "add_rmsnorm", lambda x, r, w, backend=None: jaxnorm.add_rmsnorm(x, r, w, backend=backend, **OPTIONS),
        ("x", "residual", "weight"), (True, True, False), lambda x, r, w: oracle.add_rmsnorm(x, r, w, **OPTIONS),
    ),
)  # fmt: skip

ADD_LAYERNORM = LayerNormOp(
    "add_layernorm",
    lambda x, r, w, b, xb, backend=None: jaxnorm.add_layernorm(x, r, w, b, x_bias=xb, backend=backend, **OPTIONS),
    _LAYERNORM,
    (True, True, False, False, False),
    lambda *args: oracle_layernorm.layernorm(dict(zip(_LAYERNORM, args, strict=True)), **OPTIONS),
)
"""Every operand there is. test_layernorm_transforms.py takes a part of the suites to it, the GPU suite all of them."""


def with_gradients(f: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., Any]:
    """``(args, cotangents) -> (results, gradients)``: forward and backward in one program."""

    def both(args, cotangents):
        results, pull = jax.vjp(f, *args)
        return results, pull(tuple(cotangents))

    return both


def device_arrays(arrays: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(a) for a in arrays)
