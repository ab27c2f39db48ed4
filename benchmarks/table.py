"""Makes the documentation's table and the tuned backend tables from the result files.

    python -m benchmarks.table markdown benchmarks/results/h200 > table.md
    python -m benchmarks.table tuned benchmarks/results/h200 --out jaxnorm/data/tuned/nvidia_h200

A tuned entry names a backend for a stage, dtype, residual or not, and N: never for a number of rows, since backends round
differently and a row's bits must not depend on its neighbours. The rule: of the backends that ran right in every measured cell
of that N, those that are nowhere slower than XLA beyond 5 %; of these the one with the least geometric mean of its times. In
cells below 5 us the margin is 10 %: two series of the same kernel differ by as much there (16x8192: 2.11, 2.14 and 2.18 us
beside XLA's 1.97 to 2.04). When none is left, the one with the least worst ratio to XLA (xla itself, ratio 1, is a candidate).
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from typing import Any

from . import compare, store

FORMAT = "jaxnorm-tuned/1"
SHORT_US, SHORT_EQUAL = 5.0, 1.10
STAGES = {
    "rmsnorm": ("rmsnorm_fwd", False), "add_rmsnorm": ("rmsnorm_fwd", True),
    "rmsnorm_bwd": ("rmsnorm_bwd", False), "add_rmsnorm_bwd": ("rmsnorm_bwd", True),
}  # fmt: skip
BACKENDS = ("hip", "triton")


def markdown(records: list[dict[str, Any]]) -> str:
    """One table per operator: copy time, ratios to the copy, the best peer; then where and how it was measured."""
    parts = []
    for op in dict.fromkeys(r["op"] for r in records):
        rows = sorted((r for r in records if r["op"] == op), key=lambda r: (r["rows"], r["features"]))
        parts += [
            f"### `{op}`",
            "",
            "| shape | MiB | copy us | jaxnorm us | jaxnorm | hip | triton | XLA | best peer | target |",
            "|---|" + "---:|" * 7 + "---|---|",
        ]
        for r in rows:
            copy, t, peer = r["copy_us"], compare.ours(r), compare.best_peer(r)
            ratios = [compare._ratio(compare.time_of(r, n), copy) for n in ("jaxnorm", "jaxnorm-hip", "jaxnorm-triton")]
            best = f"{peer[0]} {compare._ratio(peer[1], copy)}" if peer else ""
            target = ", ".join(f"{k}: {v}" for k, v in compare.verdict(r).items())
            cells = [
                r["shape"],
                f"{r['bytes'] / (1 << 20):.3g}",
                f"{copy:.1f}" if copy else "-",
                f"{t:.1f}" if t else "-",
                *ratios,
            ]
            parts.append("| " + " | ".join([*cells, compare._ratio(compare.best_xla(r), copy), best, target]) + " |")
        parts.append("")
    parts.append(
        "Columns after the times are ratios to the copy of the same bytes (1.00 = copy speed, smaller is better)."
    )
    return "\n".join([*parts, caption(records)])


def caption(records: list[dict[str, Any]]) -> str:
    """Device, versions, dates, method: what a number means nothing without."""
    first = records[0]
    shown = ("jax", "jaxlib", "triton", "torch", "quack-kernels", "liger-kernel", "tokamax")
    versions = sorted({f"{k} {r['versions'][k]}" for r in records for k in shown if k in r.get("versions", {})})
    dates = sorted({r["date"][:10] for r in records if r.get("date")})
    parts = [
        ", ".join(sorted({r.get("device", "?") for r in records})),
        f"driver {first['driver']}" if first.get("driver") else "",
    ]
    sources = ", ".join(sorted({r["commit"] or r["source"] for r in records if r.get("commit") or r.get("source")}))
    parts += [
        ", ".join(versions),
        "dtype " + ", ".join(sorted({r["dtype"] for r in records})),
        " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
    ]
    return f"{'; '.join(p for p in parts if p)}. Source {sources}. Method: {'; '.join(sorted({r['method'] for r in records}))}."


def choose(group: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The backend for the cells of one N, with its worst ratio to XLA and the cells it rests on; None without XLA's times."""
    cells = [r for r in group if compare.best_xla(r) is not None]
    if not cells:
        return None
    ratios: dict[str, list[float]] = {"xla": [1.0] * len(cells)}
    for backend in BACKENDS:
        times = [compare.time_of(r, f"jaxnorm-{backend}") for r in cells]
        if all(t is not None for t in times):
            ratios[backend] = [t / compare.best_xla(r) for t, r in zip(times, cells, strict=True)]  # type: ignore[operator]
    limits = [SHORT_EQUAL if (compare.best_xla(r) or 0.0) < SHORT_US else compare.EQUAL for r in cells]
    never_slower = [b for b, q in ratios.items() if all(v <= limit for v, limit in zip(q, limits, strict=True))]
    mean = {b: math.exp(sum(map(math.log, q)) / len(q)) for b, q in ratios.items()}
    best = min(never_slower, key=lambda b: (mean[b], b)) if never_slower else min(ratios, key=lambda b: max(ratios[b]))
    evidence = {
        r["shape"]: {"xla_us": compare.best_xla(r), **{f"{b}_us": compare.time_of(r, f"jaxnorm-{b}") for b in BACKENDS}}
        for r in sorted(cells, key=lambda r: r["rows"])
    }
    return {
        "backend": best,
        "worst_ratio_to_xla": round(max(ratios[best]), 3),
        "mean_ratio_to_xla": round(mean[best], 3),
        "evidence": evidence,
    }


def tuned(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stage -> content of its file. Only cells timed by CUPTI count."""
    groups: dict[tuple[str, bool, str, int], list[dict[str, Any]]] = {}
    for r in records:
        if r["op"] in STAGES and r["timer"] == "cupti":
            stage, residual = STAGES[r["op"]]
            groups.setdefault((stage, residual, r["dtype"], r["features"]), []).append(r)
    files: dict[str, dict[str, Any]] = {}
    for (stage, residual, dtype, features), group in sorted(groups.items()):
        chosen = choose(group)
        if chosen is None:
            continue
        newest = max(group, key=lambda r: r.get("time", 0))
        head = {
            "format": FORMAT, "device": newest["device"], "target": target_of(newest), "versions": newest["versions"],
            "driver": newest.get("driver", ""), "date": newest["date"],
            "commit": newest["commit"] or newest["source"], "entries": [],
        }  # fmt: skip
        key = {"stage": stage, "op": group[0]["op"], "dtype": dtype, "features": features, "residual": residual}
        files.setdefault(stage, head)["entries"].append({**key, **chosen})
    return files


def target_of(record: dict[str, Any]) -> str:
    capability = str(record.get("capability", "")).split(":")[0]
    return capability if capability.startswith("gfx") else f"sm_{capability.replace('.', '')}"


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("markdown", "tuned"))
    p.add_argument("results", type=pathlib.Path)
    p.add_argument("--out", type=pathlib.Path, help="tuned: directory of the tables")
    args = p.parse_args()
    records = store.Store(args.results).records()
    if not records:
        print(f"no results in {args.results}", file=sys.stderr)
        return 2
    if args.what == "markdown":
        print(markdown(records))
        return 0
    files = tuned(records)
    for stage, content in files.items():
        if args.out:
            store.write_json(args.out / f"{stage}.json", content)
        for e in content["entries"]:
            kind = "residual" if e["residual"] else "plain"
            worst = f"worst {e['worst_ratio_to_xla']} of XLA's time, {len(e['evidence'])} cells"
            print(f"{stage} {kind} {e['dtype']} N={e['features']}: {e['backend']} ({worst})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
