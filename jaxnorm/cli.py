"""The command line: ``jaxnorm COMMAND`` or ``python -m jaxnorm COMMAND``. Standard library only, as doctor is."""

from __future__ import annotations

import argparse
import sys

from . import doctor
from ._version import __version__

COMMANDS = {"doctor": (doctor.main, "report on this installation: versions, devices, compilers, backends")}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="jaxnorm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try COMMAND --help")
    options = parser.parse_args(argv)
    run, _ = COMMANDS[options.command]
    return run(options.arguments)
