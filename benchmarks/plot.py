"""Draws the result files: percent of the speed of a same-bytes copy, by shape, for jaxnorm, XLA and the best other library.

    python -m benchmarks.plot benchmarks/results/h200 --out docs/assets/rmsnorm_h200.svg

All measured cells of the operators are drawn, also those in which another is faster; there the bar of jaxnorm is hatched.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import textwrap
from typing import Any

from . import compare, store, table

COLORS = {"jaxnorm": "#1f6fb4", "XLA": "#c9c9c9", "best other library": "#e8a33d"}


def series(record: dict[str, Any]) -> dict[str, tuple[float, str] | None]:
    """Percent of the copy and the contestant's name, by kind of bar."""
    copy = record["copy_us"]
    others = [
        (t, n)
        for n in record["contestants"]
        if not n.startswith(("jaxnorm", "xla")) and (t := compare.time_of(record, n)) is not None
    ]
    best = min(others, default=None)
    values = {
        "jaxnorm": (compare.ours(record), "jaxnorm"),
        "XLA": (compare.best_xla(record), "XLA"),
        "best other library": best or (None, ""),
    }
    return {k: (100 * copy / t, n) if t and copy else None for k, (t, n) in values.items()}


def loses(record: dict[str, Any]) -> bool:
    """Whether XLA or a library is faster than jaxnorm by more than 5 %."""
    t, peer = compare.ours(record), compare.best_peer(record)
    return t is not None and peer is not None and t > peer[1] * compare.EQUAL


def draw(records: list[dict[str, Any]], ops: list[str]) -> Any:
    """The figure: one panel per operator."""
    import matplotlib
    import matplotlib.patches

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        op: sorted((r for r in records if r["op"] == op and r["copy_us"]), key=lambda r: (r["bytes"], r["rows"]))
        for op in ops
    }
    panels = {op: rows for op, rows in panels.items() if rows}
    if not panels:
        raise ValueError(f"no results for {', '.join(ops)}")
    widest = max(len(rows) for rows in panels.values())
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(7.0, 0.55 * widest + 2), 3.1 * len(panels) + 1.2), squeeze=False
    )
    for ax, (op, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(ax, op, rows)
    handles = [matplotlib.patches.Patch(color=c, label=kind) for kind, c in COLORS.items()]
    axes[0, 0].legend(handles=handles, ncols=4, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08))
    note = (
        "Hatched: XLA or another library is faster by more than 5 %. The small names say which library the bar is. "
        + table.caption([r for rows in panels.values() for r in rows])
    )
    figure.text(0.01, 0.005, "\n".join(textwrap.wrap(note, int(figure.get_figwidth() * 17))), fontsize=6, va="bottom")
    figure.tight_layout(
        rect=(0, 0.02 + 0.11 * len(textwrap.wrap(note, int(figure.get_figwidth() * 17))) / figure.get_figheight(), 1, 1)
    )
    return figure


def _panel(ax: Any, op: str, rows: list[dict[str, Any]]) -> None:
    width = 0.27
    for k, (kind, color) in enumerate(COLORS.items()):
        for i, r in enumerate(rows):
            bar = series(r)[kind]
            if bar is None:
                continue
            hatch = "///" if kind == "jaxnorm" and loses(r) else None
            ax.bar(
                i + (k - 1) * width,
                bar[0],
                width,
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.3,
            )
            if kind == "best other library":
                ax.text(i + (k - 1) * width, bar[0] + 1, bar[1], fontsize=5, rotation=90, ha="center", va="bottom")
    ax.axhline(100, color="black", linewidth=0.7)
    ax.axhline(95, color="black", linewidth=0.5, linestyle=":")
    ax.set_xticks(range(len(rows)), [r["shape"] for r in rows], rotation=45, ha="right", fontsize=7)
    ax.set_ylim(0, 130)
    ax.set_ylabel("% of a same-bytes copy", fontsize=8)
    ax.set_title(op, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("results", type=pathlib.Path)
    p.add_argument("--ops", default="rmsnorm,add_rmsnorm,rmsnorm_bwd")
    p.add_argument("--out", type=pathlib.Path, required=True, help=".svg or .png")
    args = p.parse_args()
    figure = draw(store.Store(args.results).records(), args.ops.split(","))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=160)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
