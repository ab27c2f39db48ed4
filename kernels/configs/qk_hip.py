"""Launches of the q/k norm stages through ``csrc/kernels/qk.hip``: all parts (q and k, of one stream or two) in one.

The sum of a head has one order, by D, dtype and target (``_heads.lanes``), so every plan gives the same y and dx and may look at
the number of tokens. Backward, blocks walk over the heads and leave partial sums of the weight gradients, which a second launch
adds. The choices follow from registers, bytes on their way and lanes; those for AMD targets were compiled and inspected, not run on
AMD silicon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import Launch, Problem, compute_units, next_power_of_2, wave_size
from ._heads import ONE, TWO, Part, gptj, lane_elements, qk_parts, shares, two_stream, weights
from ._heads_hip import (
    THREADS,
    Deal,
    blocks,
    check,
    constants,
    forward,
    forward_candidates,
    groups,
    position_constants,
    position_scalars,
    table_type,
)
from ._hip import Constants, _ceil, _grid, _nvidia, _type

SOURCE = "qk.hip"


@dataclass(frozen=True)
class Walk:
    """Backward: ``per_unit`` blocks a compute unit walk over the heads; ``ahead``: the next ones are on their way meanwhile."""

    deal: Deal
    per_unit: int
    ahead: bool


def plan(problem: Problem) -> tuple[Launch, ...]:
    """The launches that compute ``problem``: one forward, two backward where there is a weight.

    Raises:
      Unsupported: another stage, no heads, or more than the kernels count.
    """
    found = _parts(problem)
    if problem.stage.endswith("_fwd"):
        return (_forward_launch(problem, found, _deal(problem, found)),)
    return _backward_launches(problem, found, _walk(problem, found))


def candidates(problem: Problem) -> list[tuple[Launch, ...]]:
    """Other tunings of the same computation, the plan first; all give the same y and dx."""
    found = _parts(problem)
    whole = lambda d: d.threads % wave_size(problem.target) == 0  # noqa: E731
    if problem.stage.endswith("_fwd"):
        more = [(_forward_launch(problem, found, d),) for d in forward_candidates(problem) if whole(d)]
    else:
        walks = [
            Walk(Deal(t, u, b), threads // t, ahead)
            for t in (128, 256)
            for u, ahead in ((1, False), (1, True), (2, False), (2, True))
            for threads in ((256, 384, 512) if u == 2 else (384, 512, 640, 768))
            for b in (1, threads // t)
            if threads % t == 0
        ]
        more = [_backward_launches(problem, found, w) for w in walks if whole(w.deal)]
    return list(dict.fromkeys([plan(problem), *more]))


def _parts(problem: Problem) -> list[Part]:
    found = qk_parts(problem)
    check(problem, found)
    return found


def _constants(problem: Problem, found: list[Part], deal: Deal) -> Constants:
    offset = float(problem.option("weight_offset"))
    out: list[tuple[str, object]] = [*constants(problem, found, deal)]
    for i, (part, weight) in enumerate(zip(found, weights(problem, found), strict=True)):
        table = f"cos_sin{part.name[1]}" if two_stream(problem) else "cos_sin"
        out += [
            (f"JN_R{i}", part.rotary),
            (f"JN_W{i}", _type(problem, weight)),
            (f"JN_TABLE{i}", table_type(problem, table)),
        ]
    if not two_stream(problem):
        out += position_constants(problem)
    out += [("JN_EPS", float(problem.option("eps"))), ("JN_OFFSET", offset), ("JN_HAS_OFFSET", offset != 0)]
    return tuple(out)


def _scalars(problem: Problem, found: list[Part]) -> tuple[tuple[str, str, int], ...]:
    if not two_stream(problem):
        return position_scalars(problem, found[0].tokens)
    tokens = [problem.shape(n)[-3] for n in ("q0", "q1")]
    return (("batch", "i32", problem.rows), ("tokens0", "i32", tokens[0]), ("tokens1", "i32", tokens[1]))


def _inputs(problem: Problem, found: list[Part]) -> tuple[str, ...]:
    if two_stream(problem):
        return (*(p.name for p in found), *weights(problem, found), "cos_sin0", "cos_sin1")
    return ("x0", "x1", "w0", "w1", "positions", "cos_sin")


def _forward_launch(problem: Problem, found: list[Part], deal: Deal) -> Launch:
    return Launch(
        kernel=f"{SOURCE}:{TWO if two_stream(problem) else ONE}",
        inputs=_inputs(problem, found),
        outputs=("q", "k") if two_stream(problem) else ("y0", "y1"),
        grid=_grid(sum(blocks(problem, p, deal) for p in found)),
        constants=_constants(problem, found, deal),
        scalars=_scalars(problem, found),
        threads=deal.threads,
    )


def _deal(problem: Problem, found: list[Part]) -> Deal:
    """*H200*, 8192 tokens of 64 + 8 heads of 128: two heads a group and eight blocks of 128 a unit 1.045 of a copy, four heads
    1.085, one 1.12. Eight blocks leave 64 registers, which spill in the gptj style, with mrope, two streams and tables of float16
    (seen in the sm_90 code): there as many as there are registers for."""
    if not _nvidia(problem):
        return forward(problem, found)
    deal = forward(problem, found, 2)
    if deal.unroll < 2 or two_stream(problem) or gptj(problem) or problem.option("sections") is not None:
        return deal
    return deal if problem.dtype("cos_sin") == "float16" else replace(deal, min_blocks=8)


def _walk(problem: Problem, found: list[Part]) -> Walk:
    """On NVIDIA as many blocks of 128 threads as registers allow, each with one head a group on its way: 64 bytes a thread of bf16.

    80 registers, which six blocks a unit leave, are enough for 16 elements a lane, 64 for eight and 128 with the three positions of
    mrope (seen to do without spills in the sm_90 code). *H200*, 8192 tokens of 64 + 8 heads of 128: 1.036 of a copy; two heads and
    the next on their way 1.03 with four blocks. AMD has registers for eight blocks of two heads.
    """
    held = max(lane_elements(problem, p) for p in found)
    if not _nvidia(problem):
        return Walk(Deal(THREADS, 2 if held <= 16 else 1), 8, ahead=False)
    mrope = not two_stream(problem) and problem.option("sections") is not None
    per_unit = 2 if held > 16 else 4 if mrope else 6 if held > 8 else 8
    return Walk(Deal(THREADS, 1, per_unit), per_unit, ahead=False)


def _backward_launches(problem: Problem, found: list[Part], walk: Walk) -> tuple[Launch, ...]:
    total = compute_units(problem.target) * walk.per_unit
    each, d = shares(found, [blocks(problem, p, walk.deal) for p in found], total), problem.features
    names = weights(problem, found)
    present = [i for i, w in enumerate(names) if problem.has(w)]
    cotangents = ("dq", "dk") if two_stream(problem) else ("dy0", "dy1")
    count = 4 if two_stream(problem) else 2
    padded = [*each, *[1] * (count - len(each))]
    first = Launch(
        kernel=f"{SOURCE}:{TWO if two_stream(problem) else ONE}_bwd",
        inputs=(*_inputs(problem, found), *cotangents),
        outputs=(
            *(("dq0", "dk0", "dq1", "dk1") if two_stream(problem) else ("dx0", "dx1")),
            *(f"partials{i}" for i in range(count)),
        ),
        grid=(sum(each), 1, 1),
        constants=(*_constants(problem, found, walk.deal), ("JN_AHEAD", walk.ahead)),
        scalars=(*_scalars(problem, found), *((f"blocks{i}", "i32", b) for i, b in enumerate(padded))),
        threads=walk.deal.threads,
        shared=_sum_bytes(problem, found, walk.deal) if present else 0,
        temps=tuple((f"partials{i}", (each[i], d), "float32") for i in present),
    )
    return (first, _reduce_launch(problem, each, names)) if present else (first,)


def _sum_bytes(problem: Problem, found: list[Part], deal: Deal) -> int:
    """add_head_groups: the sums of half the groups, with the lanes that no item falls to."""
    threads = [groups(problem, p, deal) // 2 * deal.threads // groups(problem, p, deal) for p in found]
    return max(t * lane_elements(problem, p) * 4 for t, p in zip(threads, found, strict=True))


def _reduce_launch(problem: Problem, each: list[int], weights: list[str]) -> Launch:
    """One block for 128 bytes of columns of a part; few rows a thread, for there are few columns and the rows' latency counts."""
    v = next(v for v in (4, 2, 1) if problem.features % v == 0)
    columns, slices = 8, min(128, max(32, next_power_of_2(_ceil(max(each), 8))))
    names = [*weights, *(f"absent{i}" for i in range(len(weights), 4))]
    padded = [*each, *[1] * (4 - len(each))]
    return Launch(
        kernel=f"{SOURCE}:qk_norm_rope_bwd_reduce",
        inputs=tuple(f"partials{i}" for i in range(4)),
        outputs=tuple(f"d{n}" for n in names),
        grid=(_ceil(problem.features, columns * v), len(weights), 1),
        constants=(
            ("JN_N", problem.features),
            ("JN_V", v),
            ("JN_COLUMNS", columns),
            ("JN_SLICES", slices),
            *((f"JN_DW{i}", _type(problem, f"d{n}")) for i, n in enumerate(names)),
        ),
        scalars=tuple((f"blocks{i}", "i32", b) for i, b in enumerate(padded)),
        threads=columns * slices,
        shared=slices // 2 * columns * v * 4,
    )
