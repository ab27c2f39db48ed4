"""Entry of the kernel behind the fused distributed calls: one rank of a group, alone on one GPU.

The other ranks are memory. Their partial rows and results lie in this rank's workspace and their flags are set, as if they had
been quicker; what this rank pushes into their workspaces is compared. So one launch shows indices, flags, epochs, values and what
happens when a rank stays away. What it cannot show is the order of memory between GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..kernels.configs import ITEMSIZE, Launch, Problem, distributed_hip
from . import oracle
from .families import BITWISE, CODES, Case, Kernel, Output, Retry
from .oracle import Array, f64

KERNEL = f"{distributed_hip.SOURCE}:{distributed_hip.STAGE}"
RANK, BLOCKS, SIGNATURE, PATIENCE = 1, 2, 0x5EED0007, 1 << 24
MOST_RANKS, FLAGS_AT, PHASE_BYTES = 8, 128, distributed_hip.MAX_BLOCKS * 8 * 8  # peers.h:Header
HEADER = -(-distributed_hip.HEADER_BYTES // 1024) * 1024
TIMED_OUT = 1  # peers.h:Failure


def with_buffers(problem: Problem) -> Problem:
    """The problem of a rank with the shape and dtype of every buffer that its kernel reads and writes."""
    rows, n, spec = problem.rows, problem.features, problem.option("spec")
    share = -(-rows // problem.option("ranks"))
    mine = rows if problem.option("gather") else share
    stream = rows if problem.option("replicated") else share
    x = problem.dtype("x")
    found: dict[str, tuple[tuple[int, ...], str]] = {"x": ((rows, n), x)}
    if problem.has("weight"):
        found["weight"] = (n,), problem.dtype("weight")
    if problem.has("residual"):
        found |= dict.fromkeys(("residual", "residual_out"), ((stream, n), problem.dtype("residual")))
    if spec is None:
        found["values"] = (mine, n), x
    else:
        fp4, power = spec.dtype == "fp4", spec.scale_dtype == "e8m0"
        found["values"] = (mine, n // (2 if fp4 else 1)), "uint8" if fp4 else spec.dtype
        found["scale"] = (mine, spec.groups(n)), "uint8" if power else "float32"
    shapes, dtypes = ({k: v[i] for k, v in found.items()} for i in (0, 1))
    return replace(problem, shapes=tuple(shapes.items()), dtypes=tuple(dtypes.items()))


def few_rows(problem: Problem, launch: Launch) -> tuple[Problem, Launch]:
    """Five rows for everyone, or three rows an owner with one too few; two blocks."""
    ranks = problem.option("ranks")
    rows = 5 if problem.option("schedule") == "one-shot" else 2 * ranks + 1
    scalars = (("rows", "i32", rows), ("share", "i32", -(-rows // ranks)))
    return with_buffers(replace(problem, rows=rows)), replace(launch, grid=(BLOCKS, 1, 1), scalars=scalars)


@dataclass
class _Group:
    """What the ranks of a call have and get, every row of it."""

    partials: Array
    residual: Array | None
    results: dict[str, Output]


@dataclass(frozen=True)
class _Place:
    """Whose rows and which bytes are whose (distributed.h, two_shot and one_shot)."""

    p: Problem
    packed: bool = False
    """Partial sums travel packed (packed.h)."""

    @property
    def ranks(self) -> int:
        return self.p.option("ranks")

    @property
    def one_shot(self) -> bool:
        return self.p.option("schedule") == "one-shot"

    @property
    def share(self) -> int:
        return -(-self.p.rows // self.ranks)

    @property
    def epoch(self) -> int:
        """Odd and even ones use different halves."""
        return 7 if self.one_shot else 8

    @property
    def half(self) -> int:
        return HEADER + (self.epoch & 1) * distributed_hip.half_bytes(self.p)

    def rows(self, rank: int) -> slice:
        """That a rank owns."""
        return slice(min(rank * self.share, self.p.rows), min((rank + 1) * self.share, self.p.rows))

    def pushed(self, to: int) -> slice:
        """Whose partial sums a rank needs."""
        return slice(0, self.p.rows) if self.one_shot else self.rows(to)

    def slot(self, rank: int) -> int:
        """Where the partial sums of a rank go."""
        rows = self.p.rows if self.one_shot else self.share
        return self.half + rank * rows * self.p.features * ITEMSIZE[self.p.dtype("x")]

    def tops(self, rank: int) -> int:
        """Where the largest exponents of a rank's packed partial sums go."""
        rows = self.share if self.packed else 0
        return self.slot(self.ranks) + rank * rows * distributed_hip.tops_bytes(self.p)

    @property
    def gathers(self) -> bool:
        """Whether owners push their results to everyone."""
        return not self.one_shot and bool(self.p.option("gather"))

    def gathered(self, group: _Group) -> list[tuple[str, int]]:
        """(result, offset of row 0) of what owners push."""
        if not self.gathers:
            return []
        places, at = [], self.tops(self.ranks)
        for name in ("values", "scale"):
            if name in group.results:
                places.append((name, at))
                at += self.ranks * self.share * group.results[name].values[0].nbytes
                at = (at + 15) // 16 * 16 if name == "scale" else at
        if self.p.option("replicated") and "residual_out" in group.results:
            places.append(("residual_out", at))
        return places


def _make(c: Case) -> _Group:
    """Random partial sums and all results; with codes a row of zeros and one with a NaN among this rank's own."""
    p, spec = c.problem, c.option("spec")
    ranks, before = c.option("ranks"), c.option("cast") == "before_weight"
    partials = c.g.standard_normal((ranks, p.rows, p.features)) * 1.3
    residual = c.g.standard_normal((p.rows, p.features)) * 2.5
    first = _Place(p).rows(RANK).start
    if spec is not None:
        partials[:, first], residual[first] = 0.0, 0.0
        partials[0, first + 1, p.features // 2] = np.nan
    partials = oracle.rounded(partials, p.dtype("x"))
    with np.errstate(all="ignore"):
        s = partials[0].astype(np.float32)
        for part in partials[1:]:
            s = s + part.astype(np.float32)
        rounded = oracle.rounded(residual, p.dtype("residual")) if p.has("residual") else None
        if rounded is not None:
            s = s + rounded.astype(np.float32)
        n = f64(s)
        normalised = n * oracle.statistics(n, c.option("eps"), centred=False)[1]
    y = oracle.affine(normalised, c.vector("weight"), None, c.option("weight_offset"), p.dtype("x") if before else None)
    results: dict[str, Output] = {}
    if rounded is not None:
        exact = {"mode": "close", "rtol": 0, "atol": 0}
        results["residual_out"] = Output(oracle.rounded(n, p.dtype("residual")), exact)
    if spec is None:
        narrow = p.dtype("x") != "float32"
        twice = {"mode": "ulp", "max": 2} if narrow else {"mode": "close", "rtol": 2.0**-7, "atol": 1e-6}
        results["values"] = Output(oracle.rounded(y, p.dtype("x")), twice if before else None)
        return _Group(partials, rounded, results)
    q = oracle.quantise(y, spec)
    if q.boundary:
        raise Retry
    fp4 = spec.dtype == "fp4"
    codes = oracle.packed(q.codes, spec.dtype).view(np.uint8 if fp4 else oracle.dtype(spec.dtype))
    results["values"] = Output(
        codes, CODES | ({"mode": "codes4"} if fp4 else {}), q.undefined[:, ::2] if fp4 else q.undefined
    )
    assert q.scale is not None
    how = BITWISE if spec.scale_dtype == "e8m0" else {"mode": "close", "rtol": 2.0**-20, "atol": 0}
    results["scale"] = Output(q.scale, how)
    return _Group(partials, rounded, results)


def rank_norm(c: Case) -> None:
    """All ranks came: own results, and what the others get."""
    _fill(c, absent=None)


def rank_norm_alone(c: Case) -> None:
    """A rank stays away: results that nobody takes for such, its number for the host, and word to the others."""
    c.launch = replace(c.launch, grid=(1, 1, 1))  # one block: which of several is first to give up would be open
    _fill(c, absent=(RANK + 1) % c.option("ranks"))


def _fill(c: Case, absent: int | None) -> None:
    place, group = _Place(c.problem, distributed_hip.packed(c.launch)), _make(c)
    if absent is not None:
        group.results = {n: _poisoned(n, o, "scale" in group.results) for n, o in group.results.items()}
    c.inputs["x"] = group.partials[RANK]
    if group.residual is not None:
        c.inputs["residual"] = group.residual if c.option("replicated") else _own_rows(place, group.residual)
    for name, out in group.results.items():
        everyones = c.option("replicated" if name == "residual_out" else "gather")
        c.outputs[name] = out if everyones else _sharded(place, out)
    blocks, late = c.launch.grid[0], absent is not None
    others = [_other(place, group, blocks, (RANK + d) % place.ranks, late) for d in range(1, place.ranks)]
    nobody = [{"kind": "null"}] * (MOST_RANKS - place.ranks)
    failure = np.array([TIMED_OUT + 256 * absent if absent is not None else 0], np.uint32)
    scalar = lambda name, kind, value: {"name": name, "kind": "scalar", "dtype": kind, "value": value}  # noqa: E731
    c.tail = [
        {"name": "peers", "kind": "pointers", "to": [_own(place, group, blocks, absent), *others, *nobody]},
        {"name": "error", "kind": "inout", "dtype": "uint32", "shape": [1], "data": failure * 0, "expect": failure},
        scalar("half_bytes", "uint64", distributed_hip.half_bytes(c.problem)),
        scalar("patience", "uint64", PATIENCE),
        scalar("rows", "uint32", c.problem.rows),
        scalar("share", "uint32", place.share),
        scalar("rank", "uint32", RANK),
        scalar("signature", "uint32", SIGNATURE),
        scalar("blocks", "uint32", blocks),
    ]


def _own_rows(place: _Place, rows: Array) -> Array:
    """This rank's share of all rows; zeros where it has fewer."""
    own = rows[place.rows(RANK)]
    return np.concatenate([own, np.zeros((place.share - len(own), *rows.shape[1:]), rows.dtype)])


def _sharded(place: _Place, out: Output) -> Output:
    written = np.ones(out.values.shape, bool) if out.written is None else out.written
    ignore = None if out.ignore is None else _own_rows(place, out.ignore)
    return Output(_own_rows(place, out.values), out.compare, ignore, _own_rows(place, written))


def _poisoned(name: str, out: Output, quantised: bool) -> Output:
    """NaN in place of a result; codes stay as they were, under scales of NaN."""
    a = out.values
    if name == "values" and quantised:
        return Output(a, out.compare, written=np.zeros(a.shape, bool))
    if name == "scale" and a.dtype == np.float32:
        return Output(np.full_like(a, np.nan))
    return Output(np.full(a.nbytes, 0xFF, np.uint8).view(a.dtype).reshape(a.shape))


# Workspaces


def _part(name: str, at: int, values: Array, **more: Any) -> dict[str, Any]:
    return {"name": name, "at": at, "dtype": values.dtype.name, "shape": list(values.shape)} | more


def _workspace(place: _Place, rank: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
    size = HEADER + 2 * distributed_hip.half_bytes(place.p)
    return {"name": f"workspace{rank}", "kind": "inout", "dtype": "uint8", "shape": [size], "parts": parts}


def _flags(place: _Place, blocks: int, phase: int, ranks: list[int]) -> tuple[int, Array]:
    """(offset, flags of the blocks with those of some ranks set)"""
    flags = np.zeros((blocks, MOST_RANKS), np.uint64)
    flags[:, ranks] = SIGNATURE << 32 | place.epoch
    return FLAGS_AT + phase * PHASE_BYTES, flags


def _partials(place: _Place, group: _Group, source: int, to: int) -> list[dict[str, Any]]:
    """What a rank pushes to another before anything is summed; the bytes under ``rows``."""
    rows, name = group.partials[source][place.pushed(to)], f"partials{source}"
    if not len(rows):
        return []
    if not place.packed:
        return [_part(name, place.slot(source), rows, rows=rows)]
    planes, unsent, tops = packed_rows(rows, distributed_hip.tops_bytes(place.p))
    unused = np.broadcast_to(np.arange(tops.shape[1]) >= place.p.features // distributed_hip.PACK_GROUP, tops.shape)
    return [_part(name, place.slot(source), planes, rows=planes, ignore=unsent),
            _part(f"tops{source}", place.tops(source), tops, rows=tops, ignore=unused)]  # fmt: skip


def packed_rows(rows: Array, tops_bytes: int) -> tuple[Array, Array, Array]:
    """Rows of bfloat16 as packed.h sends them: planes as bytes, which of these are not sent, and the tops of each row."""
    bits = rows.view(np.uint16).reshape(len(rows), -1, distributed_hip.PACK_GROUP)
    exponent, rest = (bits >> 7) & 255, ((bits >> 8) & 0x80) | (bits & 0x7F)
    top = exponent.max(-1, keepdims=True)
    below = np.where(exponent == 0, 15, top - exponent)
    wide = ((exponent != 0) & (below > 14)).any(-1, keepdims=True) | (top == 255)
    low, high = np.where(wide, exponent & 15, below), exponent >> 4
    planes = np.concatenate([rest, *(a[..., ::2] | a[..., 1::2] << 4 for a in (low, high))], -1).astype(np.uint8)
    unsent = np.zeros(planes.shape, bool)
    unsent[..., planes.shape[-1] * 3 // 4 :] = ~wide
    tops = np.zeros((len(rows), tops_bytes), np.uint8)
    tops[:, : top.shape[1]] = np.where(wide, 255, top)[..., 0]
    return planes.reshape(len(rows), -1), unsent.reshape(len(rows), -1), tops


def _phases(place: _Place, late: bool) -> tuple[int, ...]:
    """In which this rank signals."""
    return (0,) if late or not place.gathers else (0, 1)


def _own(place: _Place, group: _Group, blocks: int, absent: int | None) -> dict[str, Any]:
    """What the other ranks have pushed here before the launch, and the header after it."""
    others = [r for r in range(place.ranks) if r != RANK]
    before = np.array([place.epoch - 1, 0, 0], np.uint32)
    after = np.array([place.epoch, 0, absent is not None], np.uint32)
    parts = [_part("header", 0, before, data=before, expect=after)]
    for phase in (0, 1):
        at, flags = _flags(place, blocks, phase, [r for r in others if r != absent])
        parts.append(_part(f"flags{phase}", at, flags, data=flags))
    for r in others:
        parts += [part | {"data": part.pop("rows")} for part in _partials(place, group, r, RANK)]
    if absent is not None:
        return _workspace(place, RANK, parts)
    for name, at in place.gathered(group):
        values = group.results[name].values
        for r in others:
            rows = values[place.rows(r)]
            if len(rows):
                start = at + place.rows(r).start * values[0].nbytes
                parts.append(_part(f"{name}{r}", start, rows, data=rows))
    return _workspace(place, RANK, parts)


def _other(place: _Place, group: _Group, blocks: int, rank: int, late: bool) -> dict[str, Any]:
    """What this rank pushes into the workspace of another."""
    parts = []
    for phase in _phases(place, late):
        at, before = _flags(place, blocks, phase, [])
        parts.append(_part(f"flags{phase}", at, before, data=before, expect=_flags(place, blocks, phase, [RANK])[1]))
    parts += [part | {"expect": part.pop("rows"), "compare": BITWISE} for part in _partials(place, group, RANK, rank)]
    if late:
        parts.append(_part("dead", 8, np.ones(1, np.uint32), expect=np.ones(1, np.uint32)))
        return _workspace(place, rank, parts)
    for name, at in place.gathered(group):
        out, own = group.results[name], place.rows(RANK)
        rows = out.values[own]
        how = {"compare": out.compare} if out.compare else {}
        how |= {"ignore": out.ignore[own]} if out.ignore is not None else {}
        parts.append(_part(name, at + own.start * out.values[0].nbytes, rows, expect=rows, **how))
    return _workspace(place, rank, parts)


KERNELS = {KERNEL: Kernel(rank_norm, shrink=few_rows, more=(("alone", rank_norm_alone),))}
