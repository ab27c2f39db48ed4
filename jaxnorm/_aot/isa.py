"""Reading AMD assembly: registers, scratch, widths of memory accesses, and the occupancy that follows. Text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter

WIDTHS = (16, 12, 8, 4, 2, 1)
_METADATA = {
    "vgpr": "vgpr_count",
    "agpr": "agpr_count",
    "sgpr": "sgpr_count",
    "scratch": "private_segment_fixed_size",
    "lds": "group_segment_fixed_size",
    "wave": "wavefront_size",
}
_WIDTH = {
    "dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4,
    "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "b16": 2,
    "ubyte": 1, "sbyte": 1, "byte": 1, "u8": 1, "i8": 1, "b8": 1,
}  # fmt: skip
_ACCESS = re.compile(
    r"^\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:short_)?(?:d16_(?:hi_)?)?([a-z]+\d*(?:x\d)?)", re.M
)
_LANES = re.compile(
    r"^.*(?:quad_perm:|row_(?:sh[lr]|ror|xmask|mirror|half_mirror|share|newbcast|bcast)|v_permlane)", re.M
)
_ENCODING = re.compile(r"_(?:e32|e64|sdwa|dpp|e64_dpp)$")


def stats(asm: str) -> dict[str, dict[str, int]]:
    """Per kernel: vgpr (on gfx90a and later with the AGPRs), agpr, sgpr, scratch (bytes), spills (registers), lds (static bytes),
    wave."""
    kernels: dict[str, dict[str, int]] = {}
    metadata = asm[asm.index(".amdgpu_metadata") :]
    # Entries of amdhsa.kernels are at two spaces of indentation, their arguments (which have names too) deeper.
    for entry in re.split(r"\n  - (?=\.)", metadata)[1:]:
        fields = dict(re.findall(r"(?:^|\n {4})\.(\w+): +(\S+)", entry))
        if "name" not in fields:
            continue
        found = {key: int(fields.get(field, 0)) for key, field in _METADATA.items()}
        found["spills"] = int(fields.get("vgpr_spill_count", 0)) + int(fields.get("sgpr_spill_count", 0))
        kernels[fields["name"]] = found
    return kernels


def counts(asm: str) -> dict[str, int]:
    """Static counts: ``load16`` ... ``store1`` (bytes a lane moves to or from global memory), ``atomics`` (float ones),
    ``scratch`` and ``barriers``."""
    result = {f"{kind}{width}": 0 for kind in ("load", "store") for width in WIDTHS}
    for kind, suffix in _ACCESS.findall(asm):
        result[f"{kind}{_WIDTH[suffix]}"] += 1
    result["atomics"] = len(re.findall(r"^\s*(?:global|buffer|flat)_atomic_(?:pk_)?\w*f(?:16|32|64)", asm, re.M))
    result["scratch"] = len(re.findall(r"^\s*scratch_", asm, re.M))
    result["barriers"] = len(re.findall(r"^\s*s_barrier(?:_signal)?\b", asm, re.M))
    return result


def instructions(asm: str) -> dict[str, int]:
    """Static counts of what costs time: ``valu``, ``packed`` (two float32 at once), ``dpp``, ``lds_ops``, ``waits``, ``loops``."""
    names = re.findall(r"^\s+([a-z]\w+)\b", asm.split(".amdgpu_metadata")[0], re.M)
    return {
        "valu": sum(n.startswith("v_") for n in names),
        "packed": sum(n.startswith("v_pk_") and n.endswith("f32") for n in names),
        "dpp": len(_LANES.findall(asm)),
        "lds_ops": sum(n.startswith("ds_") for n in names),
        "waits": sum(n.startswith("s_wait") for n in names),
        "loops": _loops(asm),
    }


def _loops(asm: str) -> int:
    """Branches to a label that stands before them."""
    seen: set[str] = set()
    back = 0
    for line in asm.splitlines():
        if match := re.match(r"^(\.?L?BB[\w.]+):", line):
            seen.add(match[1])
        elif (match := re.match(r"^\s+s_c?branch\w*\s+(\S+)", line)) and match[1] in seen:
            back += 1
    return back


def conversions(asm: str) -> dict[str, int]:
    """Conversion instructions by name."""
    return dict(sorted(Counter(_ENCODING.sub("", n) for n in re.findall(r"^\s+(v_cvt_\w+)", asm, re.M)).items()))


# Occupancy. Register file of a lane of a SIMD, granule of its allocation, most waves; SIMDs and LDS that workgroups share.
# Vendor documentation: CDNA2/3/4 and RDNA3 ISA guides; a gfx11 workgroup runs in a WGP of four SIMDs with 128 KiB.
_FILE = {"gfx90a": (512, 8, 8), "gfx942": (512, 8, 8), "gfx950": (512, 8, 8), "gfx1100": (1536, 24, 16)}
_LDS = {"gfx950": 160 << 10, "gfx1100": 128 << 10}
SIMDS = 4


def occupancy(target: str, vgpr: int, sgpr: int, lds: int, threads: int) -> int:
    """Waves a SIMD can hold at a time, by registers and LDS."""
    registers, granule, most = _FILE[target]
    waves = min(most, registers // (-(-max(vgpr, 1) // granule) * granule))
    if target.startswith("gfx9") and sgpr > 100:  # 800 scalar registers a SIMD
        waves = min(waves, 7)
    if lds:
        wave = 64 if target.startswith("gfx9") else 32
        groups = _LDS.get(target, 64 << 10) // lds
        waves = min(waves, max(1, groups * (-(-threads // wave)) // SIMDS))
    return waves
