"""Reads the text of an HLO or StableHLO program: where jaxnorm's ops are in it, and what became of each."""

from __future__ import annotations

import re
from dataclasses import dataclass

LAUNCHERS = {
    "jaxnorm_launch": "jaxnorm's launcher",
    "triton_kernel_call_ffi": "jaxlib's Triton call",
    "triton_kernel_call": "jax-triton",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_CALL = re.compile(r'custom_call_target="([a-z_]+)"|custom_call @([a-z_]+)\(')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOCATION = re.compile(r'^(#loc\d+) = loc\("([^"]*)"', re.MULTILINE)
_USED = re.compile(r"loc\((#loc\d+)\)\s*$")
_COLLECTIVE = re.compile(
    rf"\b(?:stablehlo\.)?({'|'.join(c.replace('-', '[-_]') for c in COLLECTIVES)})(?:-start)?[\"(]"
)


@dataclass(frozen=True)
class Found:
    """One op of jaxnorm in a program: launched as a kernel, or compiled by XLA from the reference."""

    op: str
    where: str
    """Scope of the op, e.g. ``jit(step)/layer/add_rmsnorm``; empty where the text names none."""
    kernel: str = ""
    target: str = ""
    config: str = ""
    road: str = ""


def is_program(text: str) -> bool:
    """Whether this is the text of an HLO or StableHLO module."""
    return bool(re.search(r"^\s*(HloModule|module|ENTRY|#loc)\b", text, re.MULTILINE))


def find(text: str, ops: list[str]) -> list[Found]:
    """The jaxnorm ops of a program in order. An op whose scope holds no launch was compiled by XLA."""
    places = dict(_LOCATION.findall(text))
    launched: list[Found] = []
    scopes: dict[str, str] = {}
    for line in text.splitlines():
        name = _scope_of(line, places)
        op, where = _op(name, ops)
        if op:
            scopes.setdefault(where, op)
        call = _CALL.search(line)
        target = (call[1] or call[2]) if call else ""
        if target in LAUNCHERS:
            kernel, config = _without_stand_ins(line)
            launched.append(Found(op, where, kernel or "kernel", _attribute(line, "target"), config, LAUNCHERS[target]))
    served = {f.where for f in launched}
    return launched + [Found(op, where) for where, op in scopes.items() if where not in served]


def collectives(text: str) -> dict[str, int]:
    """Collective operations of the whole program by name; those of other ops are counted, too."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            name = match[1].replace("_", "-")
            found[name] = found.get(name, 0) + 1
    return found


def _scope_of(line: str, places: dict[str, str]) -> str:
    if match := _OP_NAME.search(line):
        return match[1]
    used = _USED.search(line)
    return places.get(used[1], "") if used else ""


def _op(name: str, ops: list[str]) -> tuple[str, str]:
    """(op, scope up to it) of a name such as ``jit(f)/transpose(jvp(add_rmsnorm))/ffi_call``."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        inner = part.rsplit("(", 1)[-1].rstrip(")")
        if inner in ops:
            backward = " backward" if "transpose(" in part else ""
            return inner + backward, "/".join(parts[: i + 1])
    return "", ""


def _attribute(line: str, name: str) -> str:
    match = re.search(rf'[{{ ,]{name} = "([^"]*)"', line)
    return match[1] if match else ""


def _numbers(line: str, name: str) -> list[str]:
    match = re.search(rf"\b{name} = (?:dense<\[?([-\d, ]+)\]?>|array<i64: ([-\d, ]+)>)", line)
    return (match[1] or match[2]).split(", ") if match else []


def _without_stand_ins(line: str) -> tuple[str, str]:
    """(kernels, config) of a call, without launches that stand in for one before them."""
    kernels, grid = _attribute(line, "name").split(" "), _numbers(line, "grid")
    absent = {i for i, n in enumerate(_numbers(line, "meeting")) if n.startswith("-")}
    kernel = " ".join(k for i, k in enumerate(kernels) if i not in absent)
    return kernel, _config(line, [n for i, n in enumerate(grid) if i // 3 not in absent])


def _config(line: str, grid: list[str]) -> str:
    threads = re.search(r"threads = (\d+)", line)
    parts = [f"grid {'x'.join(grid)}"] if grid else []
    return ", ".join([*parts, f"{threads[1]} threads"] if threads else parts)
