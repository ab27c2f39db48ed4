"""The roofline of memory-bound ops: bytes a call must move against the speed they are moved at, under the roof of a copy."""

from __future__ import annotations

import pathlib
import textwrap
from typing import Any

from .measure import PLAIN

COLORS = {"hip": "#1f6fb4", "triton": "#2a9d5c", "xla": "#7a5195", "auto": "black", PLAIN: "#c2762b"}
NAMES = {"hip": "jaxnorm hip", "triton": "jaxnorm triton", "xla": "jaxnorm xla", PLAIN: "plain jax.numpy (XLA)",
         "auto": "jaxnorm's own choice"}  # fmt: skip
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
    figure = plt.figure(figsize=(4.6 * columns + 0.4, 5.0 * rows + 0.9))
    grid = figure.add_gridspec(rows, columns, hspace=0.22, wspace=0.28)
    axes = []
    for i, (title, records) in enumerate(panels.items()):
        inner = grid[divmod(i, columns)].subgridspec(2, 1, height_ratios=(3, 2), hspace=0.08)
        top = figure.add_subplot(inner[0])
        axes.append(top)
        records = sorted(records, key=lambda r: r["bytes"])
        _speeds(top, title, records)
        _shares(figure.add_subplot(inner[1], sharex=top), records)
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= {label: h for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper left", ncols=len(handles), fontsize=8, frameon=False)
    note = textwrap.wrap(caption(results), int(figure.get_figwidth() * 17))
    height = figure.get_figheight()
    figure.text(0.01, 0.01, "\n".join(note), fontsize=6, va="bottom")
    figure.subplots_adjust(
        left=0.7 / figure.get_figwidth(), right=0.99, top=1 - 0.6 / height, bottom=(0.65 + 0.11 * len(note)) / height
    )
    return figure


def _present(records: list[dict[str, Any]]) -> list[str]:
    return [n for n in COLORS if any(n in r["contestants"] for r in records)]


def _plot(ax: Any, name: str, points: list[tuple[float, float]]) -> None:
    ring = {"markerfacecolor": "none", "markersize": 9, "linestyle": ""} if name == "auto" else {"markersize": 5}
    style = {"linewidth": 0.8, "linestyle": ":", **ring}
    if points:
        ax.plot(*zip(*points, strict=True), color=COLORS[name], marker=MARKERS[name], label=NAMES[name], **style)


def _speeds(ax: Any, title: str, records: list[dict[str, Any]]) -> None:
    """The roofline: bytes against GB/s."""
    from matplotlib import ticker

    sizes = [r["bytes"] / 1e6 for r in records]
    roof = [r["bytes"] / r["copy_us"] / 1e3 for r in records]
    ax.plot(sizes, roof, color="black", linewidth=1.2, marker=".", label="roof: a copy of the same bytes")
    ax.fill_between(sizes, roof, alpha=0.06, color="black", linewidth=0)
    for name in _present(records):
        speeds = [(s, gigabytes_per_second(r, name)) for s, r in zip(sizes, records, strict=True)]
        _plot(ax, name, [(s, v) for s, v in speeds if v is not None])
    for axis, scale, values in ((ax.xaxis, ax.set_xscale, sizes), (ax.yaxis, ax.set_yscale, roof)):
        scale("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1,) if max(values) > 30 * min(values) else (1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    ax.set_ylabel("GB/s", fontsize=8)
    ax.tick_params(labelsize=7, labelbottom=False)
    ax.set_title(title, fontsize=9, loc="left")
    _bare(ax)


def _shares(ax: Any, records: list[dict[str, Any]]) -> None:
    """The same as percent of the copy, where a few percent can be seen, with the shapes."""
    sizes = [r["bytes"] / 1e6 for r in records]
    ax.axhline(100, color="black", linewidth=1.2)
    for name in _present(records):
        speeds = [(s, r, gigabytes_per_second(r, name)) for s, r in zip(sizes, records, strict=True)]
        _plot(ax, name, [(s, 1e5 * v * r["copy_us"] / r["bytes"]) for s, r, v in speeds if v is not None])
    ax.set_ylim(bottom=0, top=max(112, ax.get_ylim()[1]))
    for s, r in zip(sizes, records, strict=True):
        shape = "x".join(map(str, r["shape"]))
        ax.annotate(shape, (s, 2), fontsize=6, rotation=90, ha="center", va="bottom", color="#555555")
    ax.set_xlabel("bytes a call must move, MB", fontsize=8)
    ax.set_ylabel("% of copy", fontsize=8)
    ax.tick_params(labelsize=7)
    _bare(ax)


def _bare(ax: Any) -> None:
    ax.margins(x=0.12)
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
