"""Writes the operator x backend table of README.md from the registry of stages: ``python tools/make_readme_table.py``.

``--check`` writes nothing and exits with 1 where the table is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxnorm  # noqa: E402
from jaxnorm import _stage  # noqa: E402

BEGIN, END = "<!-- operators: tools/make_readme_table.py -->", "<!-- end of operators -->"
BACKENDS = ("xla", "triton", "hip")


def operators() -> dict[str, list[_stage.StageDef]]:
    """The public functions that take a backend, each with the stages of its family."""
    found = {}
    for name in jaxnorm.__all__:
        value = getattr(jaxnorm, name)
        if inspect.isfunction(value) and "backend" in inspect.signature(value).parameters:
            found[name] = [s for s in _stage.STAGES.values() if s.reference.__module__ == value.__module__]
    return found


def _serves(stage: _stage.StageDef, backend: str) -> bool:
    if backend == "xla":
        return True
    module = stage.plans.get(backend)
    return module is not None and callable(importlib.import_module(f"jaxnorm.kernels.configs.{module}").plan)


def _cell(stages: list[_stage.StageDef], backend: str) -> str:
    directions = {"forward": "_fwd", "backward": "_bwd"}
    have = [
        text for text, end in directions.items() if any(s.name.endswith(end) and _serves(s, backend) for s in stages)
    ]
    return ", ".join(have) or "-"


def table() -> str:
    rows = ["| operator | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for name, stages in sorted(operators().items()):
        rows.append(f"| `{name}` | " + " | ".join(_cell(stages, b) for b in BACKENDS) + " |")
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
