"""Facts read from lowered and compiled programs: collectives with their bytes, custom calls, aliasing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
# `%name = <result type> all-reduce(`; the result of an asynchronous -start is a tuple of operands and results
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT\s+)?%?[\w.-]+ = (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(", re.M)
_ARRAY = re.compile(r"\b(pred|s4|u4|s8|u8|s16|u16|s32|u32|s64|u64|f16|bf16|f32|f64|c64|c128|f8\w+)\[([\d,]*)\]")
_SIZES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int
    """Of the result on one device."""
    dtypes: tuple[str, ...]


def collectives(compiled_text: str) -> list[Collective]:
    """Collectives of ``compiled.as_text()``, with and without ``-start``."""
    found = []
    for match in _COLLECTIVE.finditer(compiled_text):
        arrays = _ARRAY.findall(match["type"])
        if match["start"] and match["type"].startswith("(") and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # (operands, results)
        size = sum(_SIZES.get(t, 1) * _count(dims) for t, dims in arrays)
        found.append(Collective(match["kind"], size, tuple(t for t, _ in arrays)))
    return found


def _count(dims: str) -> int:
    total = 1
    for d in filter(None, dims.split(",")):
        total *= int(d)
    return total


def kinds(compiled_text: str) -> dict[str, int]:
    """``{"all-reduce": 1}``"""
    return dict(Counter(c.kind for c in collectives(compiled_text)))


def traffic(compiled_text: str) -> int:
    """Bytes of all collective results on one device."""
    return sum(c.bytes for c in collectives(compiled_text))


def custom_calls(text: str) -> dict[str, int]:
    """Targets of custom calls, in StableHLO (``stablehlo.custom_call @name``) or HLO (``custom_call_target="name"``)."""
    names = re.findall(r"stablehlo\.custom_call @([\w.$]+)", text) or re.findall(r'custom_call_target="([^"]+)"', text)
    return dict(Counter(names))


def launches(text: str) -> int:
    """Calls of jaxnorm's kernels, whichever road they take."""
    return sum(n for name, n in custom_calls(text).items() if name.startswith("jaxnorm") or "triton" in name)


def scopes(compiled_text: str) -> set[str]:
    """All parts of all ``op_name`` metadata."""
    return {part for name in re.findall(r'op_name="([^"]+)"', compiled_text) for part in re.split(r"[/()]", name)}


def output_aliases(compiled_text: str) -> int:
    """Donated inputs that became outputs."""
    header = compiled_text.split("\n", 1)[0]
    return len(re.findall(r"(?:may|must)-alias", header))
