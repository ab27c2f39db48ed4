"""What a compiled kernel is to the rest of the library; nothing else crosses from compilation into lowering."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodeObject:
    """Machine code of one kernel for one target: an hsaco (AMD) or a cubin (NVIDIA)."""

    image: bytes
    name: str
    """Symbol of the kernel inside the image."""
    target: str
    """``gfx942``, ``sm_90``, ..."""
    threads: int
    """Threads of a workgroup (one-dimensional)."""
    shared: int
    """Dynamic shared memory (LDS) of a launch, in bytes."""
    source_key: str
    """Digest of everything that went into the compilation; the key of the disk cache."""
    asm: str = ""
    """Assembly text: PTX or AMD GCN. Kept for the jaxlib-ptx road and for tests; may be empty."""

    compiler: str = ""
    """Name and version of the compiler, without paths; for reports."""

    @property
    def is_hip(self) -> bool:
        return self.target.startswith("gfx")
