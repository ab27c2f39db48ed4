"""Which device an ELF file is for, from its header alone."""

from __future__ import annotations

import struct

AMD, CUDA = 224, 190  # EM_AMDGPU, EM_CUDA
# EF_AMDGPU_MACH, the low byte of e_flags (LLVM's AMDGPU usage document)
MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950", 0x41: "gfx1100"}


def target(image: bytes) -> str:
    """``gfx942`` or ``sm_90``.

    Raises:
      ValueError: no 64-bit little-endian ELF file for a device known here.
    """
    if len(image) < 64 or image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit ELF file")
    machine, flags = struct.unpack_from("<H", image, 18)[0], struct.unpack_from("<I", image, 48)[0]
    if machine == AMD:
        if (name := MACHINES.get(flags & 0xFF)) is None:
            raise ValueError(f"an AMD code object for machine 0x{flags & 0xFF:02x}")
        return name
    if machine == CUDA:  # the architecture moved by a byte with version 8 of the ABI (CUDA 13)
        return f"sm_{(flags >> 8 if image[8] >= 8 else flags) & 0xFF}"
    raise ValueError(f"an ELF file for machine {machine}")
