"""Entries of the kernels on heads: rotary embedding, and the norm of q and k with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import oracle
from .families import Case, Kernel, _close, _sum_bound, near_tie
from .oracle import Array, f64

POSITIONS_BEYOND = 3
"""How far behind the table the one position lies that is not in it."""


def _tokens(a: Array) -> Array:
    """``[..., H, D]`` as ``[T, H, D]``."""
    return a.reshape(-1, *a.shape[-2:])


class Angles:
    """cos and sin of each pair of each token, ``[T, 1, R / 2]``."""

    def __init__(self, cos: Array, sin: Array, style: str) -> None:
        self.cos, self.sin, self.style = cos[:, None], sin[:, None], style
        self.rotary = 2 * cos.shape[-1]

    def pairs(self, x: Array) -> tuple[Array, Array]:
        turned = x[..., : self.rotary]
        if self.style == "gptj":
            return turned[..., ::2], turned[..., 1::2]
        return turned[..., : self.rotary // 2], turned[..., self.rotary // 2 :]

    def join(self, first: Array, second: Array, x: Array) -> Array:
        out = x.copy()
        a, b = self.pairs(out)
        a[...], b[...] = first, second
        return out

    def turn(self, x: Array, back: bool = False) -> Array:
        """x ``[T, H, D]`` turned, or turned back."""
        a, b = self.pairs(x)
        sin = -self.sin if back else self.sin
        return self.join(a * self.cos - b * sin, b * self.cos + a * sin, x)

    def either(self, mask: Array) -> Array:
        """Of a mask over elements: both of a pair where one is."""
        a, b = self.pairs(mask)
        return self.join(a | b, a | b, mask)


def _table(c: Case, name: str) -> Array:
    """A table of random angles as an input, ``[P, R]``."""
    shape = c.problem.shape(name)
    angle = c.g.uniform(-np.pi, np.pi, (shape[0], shape[1] // 2))
    return c.given(name, np.concatenate([np.cos(angle), np.sin(angle)], -1), c.problem.dtype(name))


def _rows(table: Array, positions: Array) -> tuple[Array, Array]:
    """(cos, sin) of positions; a position that the table does not have turns nothing."""
    half = table.shape[1] // 2
    inside = (positions >= 0) & (positions < table.shape[0])
    row = table[np.where(inside, positions, 0)]
    cos, sin = row[..., :half], row[..., half:]
    return np.where(inside[..., None], cos, 1.0), np.where(inside[..., None], sin, 0.0)


def angles(c: Case, tokens: int) -> Angles:
    """Positions and table as inputs; what they give for each token."""
    p, table = c.problem, _table(c, "cos_sin")
    shape = p.shape("positions")  # [tokens], or [3, tokens] for mrope
    positions = c.g.integers(0, table.shape[0], shape)
    if shape[-1] > 2:
        positions[..., 1] = table.shape[0] + POSITIONS_BEYOND
    c.inputs["positions"] = positions.astype(p.dtype("positions"))
    sections = c.option("sections")
    if sections is None:
        cos, sin = _rows(table, np.resize(positions, tokens))
        return Angles(cos, sin, c.option("style"))
    each = np.resize(positions.reshape(3, -1).T, (tokens, 3))
    pair = np.arange(table.shape[1] // 2)
    if c.option("interleaved"):
        axis = np.where(
            (pair % 3 == 1) & (pair < 3 * sections[1]), 1, np.where((pair % 3 == 2) & (pair < 3 * sections[2]), 2, 0)
        )
    else:
        axis = np.searchsorted(np.cumsum(sections), pair, side="right")
    found = [_rows(table, each[:, k]) for k in range(3)]
    pick = lambda i: np.take_along_axis(np.stack([f[i] for f in found], 1), axis[None, None, :], 1)[:, 0]  # noqa: E731
    return Angles(pick(0), pick(1), c.option("style"))


def rope(c: Case) -> None:
    """y = turned x, or turned back."""
    names = [n for n in c.launch.inputs if n[0] == "x" and c.reads(n)]
    xs = {n: _tokens(c.normal(n)) for n in names}
    turning = angles(c, len(next(iter(xs.values()))))
    for name, x in xs.items():
        out = f"y{name[1:]}"
        turned = turning.turn(x, back=bool(c.option("inverse")))
        c.expect(out, turned.reshape(c.problem.shape(out)))


class Part:
    """q or k of a stream: names of its buffers, its values, the angles of its tokens."""

    def __init__(self, c: Case, x: str, weight: str) -> None:
        self.x, self.weight_name = x, weight
        self.n = _tokens(c.normal(x))
        self.weight = c.vector(weight)
        self.offset = c.option("weight_offset", 0.0)
        _, self.rstd = oracle.statistics(self.n, c.option("eps"), centred=False)

    def normed(self) -> Array:
        return oracle.affine(self.n * self.rstd, self.weight, None, self.offset, None)


def _parts(c: Case) -> list[tuple[Part, Angles]]:
    if "two_stream" not in c.problem.stage:
        names = [(f"x{i}", f"w{i}") for i in (0, 1) if c.reads(f"x{i}")]
        parts = [Part(c, *n) for n in names]
        turning = angles(c, len(parts[0].n))
        return [(part, turning) for part in parts]
    found = []
    for stream in "01":
        table = _table(c, f"cos_sin{stream}")
        for kind in "qk":
            part = Part(c, kind + stream, f"{kind}_weight{stream}")
            where = np.resize(np.arange(table.shape[0]), len(part.n))
            found.append((part, Angles(*_rows(table, where), c.option("style"))))
    return found


def _joined(c: Case, kind: str, by_stream: list[Array]) -> Array:
    """Both streams of q or k in one array ``[B, T0 + T1, H, D]``."""
    batch = c.problem.rows
    return np.concatenate([a.reshape(batch, -1, *a.shape[-2:]) for a in by_stream], 1)


def norm_rope(c: Case) -> None:
    """y = turned cast(x * rstd * (w + offset)); where the inner rounding may go either way, a pair is not compared."""
    results: dict[str, list[tuple[Array, Array]]] = {}
    for part, turning in _parts(c):
        kind = c.problem.dtype(part.x)
        n = part.normed()
        turned = turning.turn(f64(oracle.rounded(n, kind)))
        out = part.x[0] if "two_stream" in c.problem.stage else f"y{part.x[1:]}"
        results.setdefault(out, []).append((turned, turning.either(near_tie(n, kind))))
    for name, parts in results.items():
        shape = c.problem.shape(name)
        if len(parts) == 2:
            values, ignore = (_joined(c, name, [p[i] for p in parts]) for i in (0, 1))
        else:
            values, ignore = parts[0]
        c.expect(name, values.reshape(shape), ignore=ignore.reshape(shape))


def norm_rope_backward(c: Case) -> None:
    """dx of every part, and the whole weight gradient where one block has all of it."""
    two = "two_stream" in c.problem.stage
    found = _parts(c)
    cotangents = {n: c.normal(n) for n in c.launch.inputs if n in ("dq", "dk", "dy0", "dy1") and c.reads(n)}
    for i, (part, turning) in enumerate(found):
        dy = cotangents[f"d{part.x[0]}"] if two else cotangents[f"dy{part.x[1:]}"]
        if two:
            first = c.problem.shape("q0")[1]
            dy = dy[:, :first] if part.x[1] == "0" else dy[:, first:]
        g = turning.turn(_tokens(dy), back=True)
        zero = np.zeros_like(part.rstd)
        grad = oracle.backward(part.n, zero, part.rstd, part.weight, g, part.offset, centred=False)
        name = f"d{part.x}"
        if c.writes(name):
            c.expect(name, grad.dx.reshape(c.problem.shape(name)), compare=_close(grad.dx, c.problem.dtype(name)))
        rows = grad.dweight.reshape(-1, grad.dweight.shape[-1])
        for scratch in (f"partials{i}", f"partial{i}"):
            if scratch in c.temps and c.temps[scratch][0][0] == 1:
                c.expect(scratch, rows.sum(0)[None], compare=_sum_bound(rows))


def add_all_partials(c: Case) -> None:
    """The column sums of each part's partial sums."""
    for i, (name, result) in enumerate(zip(c.launch.inputs, c.launch.outputs, strict=True)):
        if not c.writes(result):
            continue
        partial = c.given(name, c.g.standard_normal((int(c.scalars[f"blocks{i}"]), c.problem.features)))
        c.expect(result, partial.sum(0), compare=_sum_bound(partial, c.problem.dtype(result)))


def _planned(fill: Any) -> Kernel:
    return Kernel(fill, as_planned=True)


KERNELS: dict[str, Kernel] = {
    "rope.hip:rope": _planned(rope),
    "rope:rope": _planned(rope),
    **{
        f"{file}:{name}{suffix}": _planned(fill)
        for file in ("qk.hip", "qk")
        for name in ("qk_norm_rope", "qk_norm_rope_two_stream")
        for suffix, fill in (("", norm_rope), ("_bwd", norm_rope_backward))
    },
    "qk.hip:qk_norm_rope_bwd_reduce": _planned(add_all_partials),
    "qk:qk_norm_rope_bwd_reduce": _planned(add_all_partials),
}
