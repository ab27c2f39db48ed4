"""Which way the rows go, from shapes and the target alone: every way gives the same bits (except ``reduce="native"``).

Figures are bytes. Those that were measured say so.
"""

from __future__ import annotations

from typing import Any

from .. import _context
from .._compile import target
from ._config import Config

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

# Partials that a rank receives, up to which one all_gather of them takes the place of an exchange and one or two gathers; by
# numbers of ranks, else OTHERS. H200s, N = 8192 (benchmarks/results/h200/sweeps/0513-composite.json), gather (timed twice) against
# exchange: two ranks 59 and 64 us against 65 at 8 MB, 107 against 101 at 17 MB; four ranks 42 and 48 against 48 at 3 MB, 51 and 50
# against 44 at 6 MB (N = 7168: 46 to 49 against 45 and 51, in two runs). Nothing else was measured; the CPU has nothing to
# save but the copies.
FEW_BYTES = {"cuda": {2: 8 << 20, 4: 4 << 20}, "rocm": {}, "cpu": {}}
OTHERS = {"cuda": 4 << 20, "rocm": 512 << 10, "cpu": 0}

# ``reduce="native"``: bytes of a rank's partial sums up to which all ranks norm all rows of an all-reduce, instead of their own of
# a reduce-scatter. H200s (same file), all-reduce against scatter: two ranks 101 us against 103 at 17 MB, 581 against 504 at 134 MB;
# four ranks 74 against 84 at 8 MB, 118 against 114 at 17 MB. Without a figure: as for the partials.
NATIVE_BYTES = {"cuda": {2: 16 << 20, 4: 8 << 20}, "rocm": {}, "cpu": {}}

# Bytes of a rank's partial sums up to which the fused kernel sends them to everyone (one exchange) instead of to their owners
# (two). H200s (benchmarks/results/h200/distributed.json), one shot against two: two ranks 9.4 us against 12.0 at 256 KB, 15.4
# against 16.3 at 2 MB, 60 against 41 at 16 MB; four ranks 14.3 against 16.6 at 256 KB, 31 against 20 at 2 MB. Eight were not
# measured.
ONE_SHOT_BYTES = {2: 2 << 20, 4: 512 << 10, 8: 192 << 10}

# Numbers of ranks for which ``impl="auto"`` takes the fused kernel: those where it was measured to beat the composite. H200s,
# N = 8192, 1 to 8192 rows: two ranks 1.8 (8192 rows) to 2.7 times as fast, four ranks 1.5 (8192 rows) to 2.4.
FUSED_RANKS = {"cuda": (2, 4), "rocm": ()}

# Largest half of a workspace; a rank holds two.
HALF_BYTES = 512 << 20


def force(schedule: str | None = None, few: bool | None = None, **tuning: int) -> Any:
    """Context manager for tests and measurements: a schedule of the fused kernel, whether few rows are gathered, and parts of the
    launch (``distributed_hip.tuned``)."""
    return _context.schedule((schedule, few, tuple(sorted(tuning.items()))))


def forced() -> tuple[str | None, bool | None, tuple[tuple[str, int], ...]]:
    return _context.schedule.value or (None, None, ())


def few_rows(config: Config) -> bool:
    """Composite: all ranks do all rows, of a gather of the partials (``native``: an all-reduce), instead of exchanging blocks.

    Fewer rows than ranks always are few.
    """
    if (few := forced()[1]) is not None:
        return few
    mine, where = config.rows * config.features * ITEMSIZE[config.dtype], platform()
    if config.rows < config.ranks:
        return True
    if config.reduce == "native" and config.ranks in NATIVE_BYTES[where]:
        return mine <= NATIVE_BYTES[where][config.ranks]
    return (config.ranks - 1) * mine <= FEW_BYTES[where].get(config.ranks, OTHERS[where])


def shots(config: Config, replicated: bool) -> str:
    """``one-shot`` or ``two-shot``. ``replicated``: every rank has the residual of every row, or there is none."""
    named = forced()[0]
    possible = config.gather and replicated
    if named is not None:
        return named if possible else "two-shot"
    small = config.rows * config.features * ITEMSIZE[config.dtype] <= ONE_SHOT_BYTES.get(config.ranks, 0)
    return "one-shot" if possible and small else "two-shot"


def platform() -> str:
    """What is traced now is for this platform; ``cpu`` where ``use_target`` or the default device name no GPU."""
    first = target.in_force(target.named())[0]
    return "cuda" if first.startswith("sm_") else "rocm" if first.startswith("gfx") else "cpu"
