"""Reading machine code in tests: registers, scratch and the width of memory accesses, for AMD assembly, PTX and SASS."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

from jaxnorm._aot import isa as amd

WIDTHS = (16, 12, 8, 4, 2, 1)
stats_amd = amd.stats

_PTX_ACCESS = re.compile(
    r"\b(ld|st)\.(?:volatile\.|weak\.|relaxed\.\w+\.)?global((?:\.[\w:]+)*?)(?:\.v(\d))?\.[a-z](\d+)\b"
)
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\S+?)[,;]")
_SASS_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E((?:\.[A-Z0-9_]+)*)")
_SASS_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def counts(asm: str, target: str) -> dict[str, int]:
    """Static counts of instructions: ``load16`` ... ``load1``, ``store16`` ... ``store1`` (bytes a lane moves to or from global
    memory, copies that go straight to shared memory counted as loads), ``atomics`` (float ones), ``scratch`` and ``barriers``.
    """
    result = {f"{kind}{width}": 0 for kind in ("load", "store") for width in WIDTHS}
    if target.startswith("gfx"):
        return amd.counts(asm)
    return _counts_ptx(asm, result) if ".visible .entry" in asm else _counts_sass(asm, result)


def _counts_ptx(asm: str, result: dict[str, int]) -> dict[str, int]:
    for kind, _, vector, bits in _PTX_ACCESS.findall(asm):
        result[f"{'load' if kind == 'ld' else 'store'}{int(vector or 1) * int(bits) // 8}"] += 1
    for size in _PTX_ASYNC.findall(asm):
        result[f"load{int(size, 0)}"] += 1
    result["atomics"] = len(re.findall(r"\b(?:atom|red)\.\S*\.(?:f|bf)(?:16|32|64)", asm))
    result["scratch"] = len(re.findall(r"\b(?:ld|st)\.local", asm))
    result["barriers"] = len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", asm))
    return result


def _counts_sass(asm: str, result: dict[str, int]) -> dict[str, int]:
    for kind, modifiers in _SASS_ACCESS.findall(asm):
        width = next((_SASS_WIDTH[m] for m in modifiers.split(".") if m in _SASS_WIDTH), 4)
        result[f"{'store' if kind == 'STG' else 'load'}{width}"] += 1
    result["atomics"] = len(re.findall(r"\b(?:ATOMG?|RED)\.\S*F(?:16|32|64)", asm))
    result["scratch"] = len(re.findall(r"\b(?:LDL|STL)\b", asm))
    result["barriers"] = len(re.findall(r"\bBAR\.SYNC", asm))
    return result


def nvidia_tool(name: str) -> str | None:
    """Path of ``cuobjdump`` or ``nvdisasm`` of the triton wheel, which needs no CUDA toolkit."""
    path = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def sass(cubin: str | Path) -> str:
    """SASS text of a cubin file."""
    tool = nvidia_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump of the triton wheel was not found. Install triton")
    return subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: str | Path) -> dict[str, dict[str, int]]:
    """Per kernel of a cubin file: registers, stack (bytes), shared (static bytes), local (bytes)."""
    tool = nvidia_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump of the triton wheel was not found. Install triton")
    text = subprocess.run([tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text
    ):
        kernels[name] = {"registers": int(registers), "stack": int(stack), "shared": int(shared), "local": int(local)}
    return kernels
