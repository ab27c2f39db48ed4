"""Holds results against the targets, cell by cell.

    python -m benchmarks.compare benchmarks/results/h200

A target is set against what was measured in the same run: the copy of the same bytes and the best peer, XLA among them. Peers
whose outputs were wrong do not count. Within 5 % two times count as equal.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from . import cells, store

EQUAL = 1.05
COPY_SHARE = 0.95


def time_of(record: dict[str, Any], name: str) -> float | None:
    """Median of a contestant in microseconds; None where it was not measured or was wrong."""
    entry = record["contestants"].get(name, {})
    return entry.get("median_us") if entry.get("right") else None


def best_peer(record: dict[str, Any]) -> tuple[str, float] | None:
    times = [
        (t, n) for n in record["contestants"] if not n.startswith("jaxnorm") and (t := time_of(record, n)) is not None
    ]
    return (min(times)[1], min(times)[0]) if times else None


def best_xla(record: dict[str, Any]) -> float | None:
    times = [t for n in ("xla", "xla-saved") if (t := time_of(record, n)) is not None]
    return min(times, default=None)


def ours(record: dict[str, Any], name: str = "jaxnorm") -> float | None:
    return time_of(record, name)


def verdict(record: dict[str, Any], name: str = "jaxnorm") -> dict[str, str]:
    """Target -> ``pass``, ``equal`` (slower by at most 5 %), ``FAIL`` or ``-`` (not measured). Targets of the cell:

    ``copy``: at least 95 % of the speed of a copy (forward above 64 MiB). ``peer``: at most the best peer's time, XLA among them.
    """
    cell = cells.Cell(record["op"], record["rows"], record["features"], record["dtype"])
    t, peer, copy = time_of(record, name), best_peer(record), record.get("copy_us")
    out = {}
    if cell.is_forward and cell.is_large:
        out["copy"] = "-" if t is None or not copy else ("pass" if t * COPY_SHARE <= copy else "FAIL")
    if t is None or peer is None:
        out["peer"] = "-"
    else:
        out["peer"] = "pass" if t <= peer[1] else "equal" if t <= peer[1] * EQUAL else "FAIL"
    return out


def _ratio(t: float | None, copy: float | None) -> str:
    return f"{t / copy:.2f}" if t and copy else "-"


COLUMNS = ("cell", "copy us", "jaxnorm", "hip", "triton", "xla", "best peer", "target")
WIDTHS = (29, 8, 8, 6, 7, 6, 22, 20)


def row(record: dict[str, Any]) -> list[str]:
    """Times as ratios to the copy."""
    copy = record.get("copy_us")
    peer = best_peer(record)
    ratios = [_ratio(time_of(record, n), copy) for n in ("jaxnorm", "jaxnorm-hip", "jaxnorm-triton")]
    named = f"{peer[0]} {_ratio(peer[1], copy)}" if peer else "-"
    targets = " ".join(f"{k}:{v}" for k, v in verdict(record).items())
    key = cells.Cell(record["op"], record["rows"], record["features"], record["dtype"]).key
    return [
        f"{record['op']} {key}",
        f"{copy:.1f}" if copy else "-",
        *ratios,
        _ratio(best_xla(record), copy),
        named,
        targets,
    ]


def _format(values: tuple[str, ...] | list[str]) -> str:
    return " ".join(
        v.ljust(w) if i == 0 or i > 5 else v.rjust(w) for i, (v, w) in enumerate(zip(values, WIDTHS, strict=True))
    ).rstrip()


def line(record: dict[str, Any]) -> str:
    return _format(row(record))


def problems(records: list[dict[str, Any]]) -> list[str]:
    """Errors and wrong results, each text once with the cells it came from."""
    where: dict[str, list[str]] = {}
    for r in records:
        for name, entry in r["contestants"].items():
            if "error" in entry:
                where.setdefault(f"{name}: {entry['error'][:160]}", []).append(f"{r['op']} {r['shape']}")
            elif entry.get("right") is False:
                where.setdefault(f"{name}: wrong result {entry['errors']}", []).append(f"{r['op']} {r['shape']}")
    return [
        f"{text}  [{len(found)} cells: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}]"
        for text, found in where.items()
    ]


def report(records: list[dict[str, Any]]) -> str:
    """The table of all cells, the errors before it, the count of each verdict after it."""
    lines = problems(records)
    lines += ["times as ratios to the copy of the same bytes:", _format(COLUMNS)]
    counts: dict[str, dict[str, int]] = {}
    for r in records:
        lines.append(line(r))
        for target, v in verdict(r).items():
            counts.setdefault(f"{r['op']} {target}", {}).setdefault(v, 0)
            counts[f"{r['op']} {target}"][v] += 1
    for target, found in sorted(counts.items()):
        lines.append(f"{target}: " + ", ".join(f"{n} {v}" for v, n in sorted(found.items())))
    return "\n".join(lines)


def failed(records: list[dict[str, Any]]) -> list[str]:
    """The cells in which a target is missed, with what missed it."""
    out = []
    for r in records:
        bad = [k for k, v in verdict(r).items() if v == "FAIL"]
        if bad:
            peer = best_peer(r)
            out.append(
                f"{r['op']} {r['shape']}: {', '.join(bad)}; jaxnorm {ours(r)} us, copy {r['copy_us']} us, best peer {peer}"
            )
    return out


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("results", type=pathlib.Path, nargs="+")
    p.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    args = p.parse_args()
    records = store.Store(args.results[-1], args.results[:-1]).records()
    if not records:
        print(f"no results in {', '.join(map(str, args.results))}")
        return 2
    print(report(records))
    bad = failed(records)
    print(f"\ntargets missed in {len(bad)} of {len(records)} cells")
    print("\n".join(bad))
    return 1 if bad and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
