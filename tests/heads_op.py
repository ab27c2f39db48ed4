"""qk_norm_rope as an op of the registry's suites: rows of features are four heads, positions come from the rows themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tolerances
from oracle_rope import Case
from registry import OPTIONS, Op

import jaxnorm

HEADS, ROWS = 4, 29


def table(features: int) -> np.ndarray:
    angle = np.arange(ROWS)[:, None] * (0.3 + np.arange(features // 3))
    return np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def positions(x: Any) -> Any:
    """A number of each row, the same by NumPy and in a program; some lie beyond the table."""
    return (abs(x[..., 0].astype(np.float32)) * np.float32(12)).astype(np.int32)


def split(a: Any) -> Any:
    return a.reshape(*a.shape[:-1], HEADS, a.shape[-1] // HEADS)


def call(x: Any, residual: Any, weight: Any, backend: str | None = None) -> tuple[Any, Any]:
    d = x.shape[-1] // HEADS
    where, w = positions(jax.lax.stop_gradient(jnp.asarray(x))), jnp.asarray(weight)[:d]
    out = jaxnorm.qk_norm_rope(split(x), split(residual), w, w, where, table(d), backend=backend, **OPTIONS)
    return out[0].reshape(x.shape), out[1].reshape(x.shape)


@dataclass(frozen=True)
class HeadsOp(Op):
    """x is q, residual is k, one weight (the first D elements of the vector) serves both."""

    def parts(self, args: Sequence[np.ndarray], cotangents: Sequence[np.ndarray] = ()) -> tuple[Case, dict[str, Any]]:
        x, residual, weight = (np.asarray(v) for v in args)
        d = x.shape[-1] // HEADS
        where = x[..., 0] if x.ndim > 1 else x[:1]
        case = Case(
            (HEADS, HEADS), d, where.shape, 2 * (d // 3), dtypes=(x.dtype.name, residual.dtype.name),
            weights=(weight.dtype.name,) * 2, offset=OPTIONS["weight_offset"], eps=OPTIONS["eps"])  # fmt: skip
        a = {"x0": split(x), "x1": split(residual), "w0": weight[:d], "w1": weight[:d], "positions": positions(x)}
        return case, a | {"cos_sin": table(d)} | {f"g{i}": split(np.asarray(c)) for i, c in enumerate(cotangents)}

    def check(self, args: Sequence[np.ndarray], results: Sequence[Any], what: str = "") -> None:
        case, a = self.parts(args)
        case.check(a, [split(np.asarray(r)) for r in results], what)

    def check_gradients(self, args, cotangents, gradients, what: str = "") -> None:
        case, a = self.parts(args, cotangents)
        d = case.features
        want = [case.backward(a, i) for i in range(2)]
        for got, w, arg in zip(gradients[:2], want, args[:2], strict=True):
            assert got.dtype == arg.dtype and got.shape == arg.shape
            tolerances.assert_dx(split(np.asarray(got)), w, f"{what} dx")
        dw = np.asarray(gradients[2])
        assert dw.dtype == args[2].dtype and not dw[d:].any()
        both = dataclasses.replace(
            want[0],
            dweight=want[0].dweight + want[1].dweight,
            dweight_terms=want[0].dweight_terms + want[1].dweight_terms,
        )
        tolerances.assert_dweight(dw[:d], both, f"{what} dweight")


QK_NORM_ROPE = HeadsOp("qk_norm_rope", call, ("x", "residual", "weight"), (True, True, False), lambda *a: a)
