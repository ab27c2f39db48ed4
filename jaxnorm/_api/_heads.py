"""What the operators on attention heads share: checks of heads, tables and positions, and the dims of their stages.

Heads are ``[..., T, H, D]``. Their tokens are the rows of a stage, ``"... h0 d"``, with one position a row; where one row of
positions serves a whole batch, the tokens are a named dim, ``"... t h0 d"``, so that nobody repeats the positions. The three
positions of mrope stand in front of the tokens, ``"c ..."``, as the caller gives them.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _compat
from .._stage import StageCall, StageDef
from ..errors import type_error, value_error
from . import _checks as check

STYLES = ("neox", "gptj")
Sections = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """Everything static about one call of an operator on heads."""

    op: str
    style: str
    sections: Sections | None
    interleaved: bool
    shared: bool
    """One row of positions for all leading dims but the tokens."""
    backend: str | None
    backend_source: str
    targets: tuple[tuple[str, str], ...]
    eps: float = 0.0
    weight_offset: float = 0.0

    @property
    def tokens(self) -> str:
        return "... t" if self.shared else "..."

    @property
    def positions(self) -> str:
        return ("c " if self.sections else "") + ("t" if self.shared else "...")

    def heads(self, i: int) -> str:
        """Dims of the i-th array of heads."""
        return f"{self.tokens} h{i} d"

    def call(
        self,
        stage: StageDef,
        operands: dict[str, tuple[jax.Array, str]],
        results: list[tuple[str, str, str]],
        sums: tuple[tuple[str, str], ...] = (),
        **options: Any,
    ) -> StageCall:
        sizes = {"d": 0}
        for a, dims in operands.values():
            named = dims.split()
            at = named.index("...") if "..." in named else 0
            sizes |= {d: a.shape[i] if i < at else a.shape[i - len(named)] for i, d in enumerate(named) if d != "..."}
        return StageCall(
            stage=stage.name,
            op=self.op,
            operands=tuple((name, dims) for name, (_, dims) in operands.items()),
            results=tuple(results),
            sizes=tuple(sizes.items()),
            options=tuple(options.items()),
            backend=self.backend,
            backend_source=self.backend_source,
            targets=self.targets,
            sums=sums,
            feature_dims=(),
            parallel_dims=tuple((d, 1) for d in sizes if d[0] in "ht"),
        )


def heads(op: str, argument: str, value: Any) -> jax.Array:
    """A float array ``[..., T, H, D]`` with an even D."""
    a = check.array(op, argument, value)
    if a.ndim < 3 or a.shape[-1] < 2 or a.shape[-1] % 2:
        raise value_error(op, argument, f"shape {a.shape}", "[..., T, H, D] with D even")
    return a


def same_tokens(op: str, argument: str, a: jax.Array, first: jax.Array, name: str) -> None:
    if a.shape[:-2] != first.shape[:-2] or a.shape[-1] != first.shape[-1]:
        want = f"{first.shape[:-2]} tokens and D={first.shape[-1]} as {name}"
        raise value_error(op, argument, f"shape {a.shape}", want, "Only the number of heads may differ.")


def table(op: str, argument: str, value: Any, features: int) -> jax.Array:
    """``[P, rotary_dim]``, a row being [cos | sin]. No gradient flows into it."""
    a = check.array(op, argument, value)
    if a.ndim != 2 or a.shape[0] < 1:
        raise value_error(op, argument, f"shape {a.shape}", "[max_positions, rotary_dim]")
    width = a.shape[1]
    if width < 2 or width % 2 or width > features:
        raise value_error(op, argument, f"rotary_dim {width} (its last dim)", f"an even number from 2 to D={features}")
    return jax.lax.stop_gradient(a)


def style(op: str, value: Any) -> str:
    return check.choice(op, "style", value, STYLES)


def sections(op: str, argument: str, value: Any, rotary_dim: int) -> Sections:
    """Pairs that each of the three positions turns."""
    expected = f"three numbers of pairs whose sum is rotary_dim/2 = {rotary_dim // 2}"
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise type_error(op, argument, type(value).__name__, expected)
    whole = [isinstance(s, numbers.Integral) and not isinstance(s, bool) and int(s) >= 0 for s in value]
    if len(value) != 3 or not all(whole) or sum(value) != rotary_dim // 2:
        raise value_error(op, argument, tuple(value), expected)
    s0, s1, s2 = (int(s) for s in value)
    return s0, s1, s2


def positions(op: str, value: Any, lead: tuple[int, ...], rows: int, components: bool) -> tuple[jax.Array, bool]:
    """(positions, with the three components of mrope first; whether one row of them serves all leading dims but the tokens).

    Host values outside of the table's rows are an error here; arrays are left to the kernels, which drop the rotation.
    """
    if isinstance(value, jax.Array):
        a = value
        if a.dtype.name not in ("int32", "int64"):
            raise type_error(op, "positions", f"dtype {a.dtype.name}", "int32 or int64", "Cast them first.")
    else:
        a = _on_host(op, value, rows)
    shapes = [lead, lead[-1:]]
    if components:
        shapes = [(3, *s) for s in shapes]
    if a.shape not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        remedy = "mrope has a position for time, height and width." if components else ""
        raise value_error(op, "positions", f"shape {a.shape}", expected, remedy)
    shared = len(lead) > 1 and a.ndim - components == 1
    return a, shared


def _on_host(op: str, value: Any, rows: int) -> jax.Array:
    """An array from a list, a NumPy array or a number, its values checked."""
    try:
        a = np.asarray(value)
    except (TypeError, ValueError) as e:
        raise type_error(op, "positions", type(value).__name__, "an array of integers", str(e)) from None
    if a.dtype.kind not in "iu" and a.size:
        raise type_error(op, "positions", f"dtype {a.dtype.name}", "int32 or int64")
    outside = a[(a < 0) | (a >= rows)]
    if outside.size:
        raise value_error(
            op, "positions", int(outside[0]), f"0 to {rows - 1}, the rows of cos_sin", "Make a longer table."
        )
    return jnp.asarray(a.astype(np.int32))


def alike(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Indices of arrays that vary over the same manual mesh axes, so that one call can serve them.

    Inside ``shard_map`` the kv heads may be the same on all devices while the q heads differ; results of one call all vary alike.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for i, a in enumerate(arrays):
        groups.setdefault(_compat.varying(jax.typeof(a)), []).append(i)
    return list(groups.values())
