"""The roofline of memory-bound ops: bytes a call must move against the speed they are moved at, under the roof of a copy."""

from __future__ import annotations

import pathlib
import textwrap
from typing import Any

from .measure import PLAIN

COLORS = {"hip": "#1f6fb4", "triton": "#2a9d5c", "xla": "#7a5195", "auto": "#1f6fb4", PLAIN: "#c2762b"}
NAMES = {
    "hip": "jaxnorm hip",
    "triton": "jaxnorm triton",
    "xla": "jaxnorm xla",
    "auto": "jaxnorm",
    PLAIN: "plain jax.numpy (XLA)",
}
MARKERS = {"hip": "o", "triton": "^", "xla": "s", "auto": "o", PLAIN: "x"}


def gigabytes_per_second(record: dict[str, Any], name: str) -> float | None:
    """Speed of a contestant in a record; None where it has no time or was wrong. 1 byte a microsecond is 1e-3 GB/s."""
    entry = record["contestants"].get(name, {})
    if "median_us" not in entry or not entry.get("right", True):
        return None
    return record["bytes"] / entry["median_us"] / 1e3


def draw(results: dict[str, Any]) -> Any:
    """The figure: a panel for each op, dtype and format of codes.

    Raises:
      ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[dict[str, Any]]] = {}
    for r in results["cases"].values():
        if r["copy_us"]:
            panels.setdefault(" ".join(filter(None, (r["op"], r["dtype"], r["spec"]))), []).append(r)
    if not panels:
        raise ValueError("the results hold no measured case")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns + 0.6, 3.5 * rows + 1.3), squeeze=False)
    for ax, (title, records) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, title, sorted(records, key=lambda r: r["bytes"]))
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= {label: h for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=len(handles), fontsize=8, frameon=False)
    note = textwrap.wrap(caption(results), int(figure.get_figwidth() * 17))
    height = figure.get_figheight()
    figure.text(0.01, 0.01, "\n".join(note), fontsize=6, va="bottom")
    figure.tight_layout(rect=(0, (0.1 + 0.11 * len(note)) / height, 1, 1 - 0.3 / height))
    return figure


def _panel(ax: Any, title: str, records: list[dict[str, Any]]) -> None:
    from matplotlib import ticker

    sizes = [r["bytes"] / 1e6 for r in records]
    roof = [r["bytes"] / r["copy_us"] / 1e3 for r in records]
    ax.plot(sizes, roof, color="black", linewidth=1.2, marker=".", label="roof: a copy of the same bytes")
    ax.fill_between(sizes, roof, alpha=0.06, color="black", linewidth=0)
    names = [n for n in COLORS if any(n in r["contestants"] for r in records)]
    for name in names:
        points = [
            (s, v) for s, r in zip(sizes, records, strict=True) if (v := gigabytes_per_second(r, name)) is not None
        ]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLORS[name], marker=MARKERS[name], markersize=5, linewidth=0.8,
                    linestyle=":", label=NAMES[name])  # fmt: skip
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    low = min(v for r in records for n in names if (v := gigabytes_per_second(r, n)) is not None or (v := r["bytes"]))
    ax.set_ylim(bottom=min([low, *roof]) * 0.6, top=max(roof) * 2.6)
    for s, top, r in zip(sizes, roof, records, strict=True):
        shape = "x".join(map(str, r["shape"]))
        ax.annotate(shape, (s, top), xytext=(0, 5), textcoords="offset points", fontsize=6, rotation=35, ha="left")
    ax.set_xlabel("bytes a call must move, MB", fontsize=8)
    ax.set_ylabel("GB/s", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.margins(x=0.18)
    ax.set_title(title, fontsize=9, loc="left")
    ax.grid(True, which="major", linewidth=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def caption(results: dict[str, Any]) -> str:
    """Device, versions, date, method: what a number means nothing without."""
    e = results["environment"]
    shown = ("jax", "jaxlib", "triton")
    versions = ", ".join(f"{k} {e['versions'][k]}" for k in shown if k in e["versions"])
    methods = sorted({r["method"] for r in results["cases"].values()})
    parts = [e["device"], f"driver {e['driver']}" if e.get("driver") else "", versions, e["date"][:10]]
    source = f"source {e.get('commit') or e.get('source')}"
    return f"{'; '.join(p for p in [*parts, source] if p)}. Method: {'; '.join(methods)}."


def save(results: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the figure; the kind of file follows from the name."""
    figure = draw(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
