"""Reads ``data/tuned/<device>/<stage>.json``: per dtype and feature count, the backend that was measured to be best.

A table chooses from the features, dtypes and target only, never from the number of rows: backends round differently in the last
bit, and a row must not change its bits with its neighbours. Made by ``benchmarks/table.py``.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

FORMAT = "jaxnorm-tuned/1"
FOLDER = Path(__file__).resolve().parent.parent / "data" / "tuned"


@dataclass(frozen=True)
class Entry:
    stage: str
    dtype: str
    features: int
    residual: bool
    backend: str
    device: str


@functools.cache
def entries(target: str) -> tuple[Entry, ...]:
    """All entries measured on devices of this target; damaged or foreign files are ignored."""
    found = []
    for path in sorted(FOLDER.glob("*/*.json")):
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT or data["target"] != target:
                continue
            for e in data["entries"]:
                found.append(
                    Entry(e["stage"], e["dtype"], int(e["features"]), bool(e["residual"]), e["backend"], data["device"])
                )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return tuple(found)


def lookup(target: str, stage: str, dtype: str, features: int, residual: bool) -> Entry | None:
    """The entry nearest in features (by ratio, at most a factor of two away), or None."""
    same = [e for e in entries(target) if (e.stage, e.dtype, e.residual) == (stage, dtype, residual)]
    if not same:
        return None
    best = min(same, key=lambda e: (abs(math.log2(e.features / features)), e.features))
    return best if abs(math.log2(best.features / features)) <= 1 else None
