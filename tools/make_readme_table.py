"""Writes the operator x backend table of README.md from the registry of operators: ``python tools/make_readme_table.py``.

``--check`` writes nothing and exits with 1 where the table is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxnorm  # noqa: E402
from jaxnorm import _stage  # noqa: E402

BEGIN, END = "<!-- operators: tools/make_readme_table.py -->", "<!-- end of operators -->"
BACKENDS = ("xla", "triton", "hip")


def _cell(op: _stage.OpDef, backend: str) -> str:
    """The directions that the backend has, each with a module of launch plans that imports."""
    have = []
    for direction, stage in (("forward", op.forward), ("backward", op.backward)):
        if stage is None:
            continue
        module = stage.plans.get(backend)
        if module is not None and not callable(importlib.import_module(f"jaxnorm.kernels.configs.{module}").plan):
            raise TypeError(f"jaxnorm.kernels.configs.{module}.plan is not a function")
        if backend == "xla" or module is not None:
            have.append(direction)
    return ", ".join(have) or "-"


def table() -> str:
    """A row for all operators of the registry that have the same cells."""
    for name in jaxnorm.__all__:
        getattr(jaxnorm, name)  # importing a family registers its operators
    rows = ["| operator | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for op in _stage.OPS.values():
        groups.setdefault(tuple(_cell(op, b) for b in BACKENDS), []).append(f"`{op.name}`")
    rows += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the table is out of date"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if options.check:
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
