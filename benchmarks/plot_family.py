"""Draws what ``benchmarks.<family>`` measured as the roofline of ``jaxnorm bench``: speed under the roof of a copy, by bytes.

    python -m benchmarks.plot_family benchmarks/results/h200/layernorm.json --out docs/assets/layernorm.svg --only add_layernorm

A panel for each kind of case (the words of its key before the shape). Cases without a copy's time are left out.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from jaxnorm._bench import plot, store

NAMES = {"jaxnorm-hip": "hip", "jaxnorm-triton": "triton", "jaxnorm-xla": "xla", "jaxnorm": "auto", "xla": plot.PLAIN}


def convert(data: dict[str, Any], only: list[str]) -> dict[str, Any]:
    """The results of a family's benchmark in the form that ``jaxnorm._bench.plot`` draws."""
    cases = {}
    for key, record in data["cells"].items():
        *kind, shape = key.split()
        copy = record.get("times", {}).get("copy", {}).get("median_us")
        if copy is None or (only and kind[0] not in only):
            continue
        times = {NAMES[n]: t for n, t in record["times"].items() if n in NAMES}
        cases[key] = {
            "op": " ".join(kind), "dtype": "", "spec": "", "shape": [shape], "bytes": record["bytes"], "copy_us": copy,
            "contestants": times, "method": data.get("method", ""),
        }  # fmt: skip
    return {"environment": data["environment"], "cases": cases}


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_family",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("results", type=pathlib.Path)
    p.add_argument("--out", type=pathlib.Path, required=True, help=".svg or .png")
    p.add_argument("--only", default="", help="comma list of the first words of the keys to draw; default: all")
    args = p.parse_args()
    data = store.read_json(args.results)
    if not isinstance(data, dict) or "cells" not in data:
        print(f"{args.results}: no results of a family's benchmark", file=sys.stderr)
        return 2
    plot.save(convert(data, [n for n in args.only.split(",") if n]), args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
