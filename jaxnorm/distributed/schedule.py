"""Which way the rows go, from shapes and the target alone: every way gives the same bits (except ``reduce="native"``).

Figures are bytes. Those that were measured say so.
"""

from __future__ import annotations

from typing import Any

from .. import _context
from .._compile import target
from ._config import Config

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

# Partials that a rank receives, up to which one all_gather of them takes the place of an exchange and one or two gathers. H200s,
# N = 8192: 6 MB (four ranks, 128 rows) 57 us against 66, 2 MB (two) 37 against 61; 17 MB (two, 1024 rows) 138 against 120. The CPU
# has nothing to save but the copies.
FEW_BYTES = {"cuda": 8 << 20, "rocm": 512 << 10, "cpu": 0}


# Bytes of a rank's partial sums up to which the fused kernel sends them to everyone (one exchange) instead of to their owners
# (two). H200s (benchmarks/results/h200/distributed.json): the two are within 1 us of one another below, two shots ahead above; at
# 2 MB 34 us against 25 with four ranks. Eight ranks were not measured.
ONE_SHOT_BYTES = {2: 256 << 10, 4: 512 << 10, 8: 192 << 10}

# Numbers of ranks for which ``impl="auto"`` takes the fused kernel: those where it was measured to beat the composite. H200s,
# N = 8192, 1 to 8192 rows: two ranks 1.4 to 3.9 times as fast, four ranks 1.18 (8192 rows) to 3.6, loop overhead included.
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
    """Composite: gather the partials instead of exchanging row blocks. Fewer rows than ranks always are few."""
    if (few := forced()[1]) is not None:
        return few
    received = (config.ranks - 1) * config.rows * config.features * ITEMSIZE[config.dtype]
    return config.rows < config.ranks or received <= FEW_BYTES.get(platform(), 0)


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
