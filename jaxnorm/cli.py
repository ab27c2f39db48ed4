"""The command line: ``jaxnorm COMMAND`` or ``python -m jaxnorm COMMAND``.

Standard library only, as doctor is: a command's module is imported when it is called, so that doctor answers on the days on which
nothing else imports. A command is a line in :data:`COMMANDS` and a module that has either ``main(argv) -> int`` or ``app``, a
``typer.Typer``.

Exit codes: 0 done; 1 the command ran and what it found is bad, or it cannot run on this machine; 2 the arguments are wrong or a
package is missing; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from ._version import __version__


@dataclass(frozen=True)
class Command:
    """One command: where it is, what it does in a line, and the extra that installs what it needs."""

    module: str
    help: str
    extra: str = "cli"


COMMANDS = {
    "doctor": Command("doctor", "report on this installation: versions, devices, compilers, backends", extra=""),
    "bench": Command("_cli.bench", "time ops on this machine beside plain XLA and a copy of the same bytes"),
    "tune": Command("_cli.tune", "search this device's fastest kernel configurations that give the same bits"),
    "explain": Command("_cli.explain", "say which backend and kernel the jaxnorm ops of a program get, and why"),
    "cache": Command("_cli.cache", "show, clear or fill the folder of compiled kernels"),
    "aot": Command("_cli.aot", "compile for GPUs that are not here; write and verify bundles of kernel cases"),
}
HELP = """\
usage: jaxnorm [--version] [--help] COMMAND ...

Norm, quantisation and rotary-embedding kernels for JAX, from the command line.

commands:
{commands}

`jaxnorm COMMAND --help` says more. `python -m jaxnorm` is the same program.
"""


def usage() -> str:
    """The text of ``jaxnorm --help``."""
    return HELP.format(commands="\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name in ("--version", "-V"):
        print(__version__)
        return 0
    if name in ("--help", "-h"):
        print(usage(), end="")
        return 0
    if name not in COMMANDS:
        print(usage(), end="", file=sys.stderr)
        if name:
            print(f"\njaxnorm: command: got {name!r}, expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return _run(name, COMMANDS[name], argv[1:])


def _run(name: str, command: Command, argv: list[str]) -> int:
    if command.extra:
        for package in ("typer", "rich"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                text = f"jaxnorm {name}: needs {package} ({error}). Run: pip install 'jaxnorm[{command.extra}]'."
                print(text, file=sys.stderr)
                return 2
    module = importlib.import_module(f"{__package__}.{command.module}")
    if hasattr(module, "main"):
        return module.main(argv)
    from ._cli import _common

    return _common.run(module.app, f"jaxnorm {name}", argv)
