"""A kernel of ``csrc/kernels/`` to machine code for a named target, by whichever compiler this machine has.

For sm_* NVRTC, which comes with jax's CUDA wheels. For gfx* the first of: a clang named by ``JAXNORM_HIP_CLANG`` (any clang with
the AMDGPU target; the kernels use no header of ROCm), hipRTC of the installed ROCm, ``hipcc`` in ``$ROCM_PATH/bin`` or ``PATH``.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._paths import csrc_dir
from ..errors import CompileError
from ..kernels.configs import Launch, Problem, wave_size
from . import rtc
from .cache import get_or_compile, shipped
from .code_object import CodeObject

CLANG_VARIABLE = "JAXNORM_HIP_CLANG"
# Contraction is spelled out in the kernels. Never fast-math: the contract fixes NaN, denormals and division.
_NVRTC_OPTIONS = ("--std=c++17", "--fmad=false")
_CLANG_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off")
# No headers and no device library: the kernels use the compiler's built-ins alone. No symbol named by a hash of all paths: the
# same kernel gives the same bytes, which tables of tuned plans ask for.
_BARE_OPTIONS = (
    "-x", "hip", "--cuda-device-only", "-nogpuinc", "-nogpulib", "--no-gpu-bundle-output", "-fuse-cuid=none",
    "-Wno-unused-command-line-argument",
)  # fmt: skip


@dataclass(frozen=True)
class Compiler:
    """What turns the source into machine code here."""

    kind: str
    """``nvrtc``, ``hiprtc``, ``hipcc`` or ``clang``"""
    path: str


def available(target: str) -> tuple[bool, str, str]:
    """(whether HIP kernels can be compiled for ``target`` here, reason, remedy); loads nothing."""
    if find(target) is not None:
        return True, "", ""
    if target.startswith("sm_"):
        return False, "libnvrtc was not found.", "Install jax[cuda13], or pip install nvidia-cuda-nvrtc."
    if target.startswith("gfx"):
        return (False, f"neither libhiprtc nor hipcc was found, and {CLANG_VARIABLE} names no clang.",
                f"Install ROCm and set ROCM_PATH if it is not /opt/rocm, or set {CLANG_VARIABLE}.")  # fmt: skip
    return False, f"{target} is neither sm_* nor gfx*.", "Leave backend=None."


def version(target: str = "sm_90") -> str:
    """Name and path of the compiler for ``target``; empty when there is none."""
    compiler = find(target)
    return f"{compiler.kind} {compiler.path}" if compiler else ""


def find(target: str) -> Compiler | None:
    """The compiler that :func:`compile` uses for ``target``."""
    if target.startswith("sm_"):
        path = rtc.find("nvrtc")
        return Compiler("nvrtc", path) if path else None
    if not target.startswith("gfx"):
        return None
    if named := os.environ.get(CLANG_VARIABLE):
        path = shutil.which(named)
        return Compiler("clang", path) if path else None
    if path := rtc.find("hiprtc"):
        return Compiler("hiprtc", path)
    rocm = os.path.join(os.environ.get("ROCM_PATH", "/opt/rocm"), "bin", "hipcc")
    path = shutil.which(rocm) or shutil.which("hipcc")
    return Compiler("hipcc", path) if path else None


def compile(launch: Launch, problem: Problem) -> CodeObject:
    """Machine code of one launch for ``problem.target``, from the cache or compiled now.

    Raises:
      CompileError: no compiler is there, or it refused; the text has the kernel, the options and the compiler's log.
    """
    compiler, portable = find(problem.target), portable_key(launch, problem)
    if compiler is None:
        if (code := shipped(portable)) is not None:
            return code
        _, reason, remedy = available(problem.target)
        raise CompileError(f"{launch.kernel}: {reason} {remedy}")
    entry, options = launch.kernel.split(":")[1], macros(launch, problem.target)
    key = [compiler.kind, rtc.identity(compiler.path), *_target_options(compiler, problem.target), *portable]
    return get_or_compile(key, lambda: _build(compiler, launch, problem.target, entry, options), portable)


def portable_key(launch: Launch, problem: Problem) -> list[str]:
    """All that decides the machine code but the compiler: what a shipped code object is found by."""
    file = launch.kernel.split(":")[0]
    return ["hip", problem.target, launch.kernel, *macros(launch, problem.target), str(launch.threads), str(launch.shared),
            *_sources(file)]  # fmt: skip


@functools.cache
def describe(compiler: Compiler) -> str:
    """Name and version without paths: ``NVRTC 13.0``, ``clang version 22.1.8``."""
    if compiler.kind == "nvrtc":
        return f"NVRTC {rtc.load('nvrtc', compiler.path).version()}"
    if compiler.kind == "hiprtc":  # its version call gives fixed numbers; the file's name has those of ROCm
        return f"hipRTC {os.path.basename(compiler.path)}"
    done = subprocess.run([compiler.path, "--version"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "version" in line.lower()] or [compiler.kind]
    return f"{compiler.kind}: {re.sub(r' [(]?https?://.*', '', lines[-1]).strip()}"


def macros(launch: Launch, target: str) -> list[str]:
    """The ``-D`` options that make the one instance of a launch; floats to the last bit."""
    entry = launch.kernel.split(":")[1]
    fixed = [f"-DJN_ENTRY_{entry}=1", f"-DJN_WAVE={wave_size(target)}"]
    return fixed + [f"-D{name}={_literal(value)}" for name, value in launch.constants]


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        single = struct.unpack("<f", struct.pack("<f", value))[0]
        return f"({single.hex()}f)"  # a hexadecimal literal, with brackets for the sign
    return str(value)


@functools.cache
def _text(path: str, size: int, time: int) -> str:
    del size, time  # part of the key: an edited source is read again
    return Path(path).read_text()


def _read(path: Path) -> str:
    status = path.stat()
    return _text(str(path), status.st_size, status.st_mtime_ns)


def headers() -> dict[str, str]:
    """Text of every header a kernel may include, by the name it includes it by."""
    root = csrc_dir() / "include"
    return {path.relative_to(root).as_posix(): _read(path) for path in sorted(root.glob("jaxnorm/*.h"))}


def _sources(file: str) -> list[str]:
    return [_read(csrc_dir() / "kernels" / file), *(part for item in headers().items() for part in item)]


def _target_options(compiler: Compiler, target: str) -> Sequence[str]:
    if compiler.kind == "nvrtc":
        return (f"--gpu-architecture={target}", *_NVRTC_OPTIONS)
    if compiler.kind == "hiprtc":
        return (f"--offload-arch={target}", *_CLANG_OPTIONS)
    return (f"--offload-arch={target}", *_CLANG_OPTIONS, *_BARE_OPTIONS)


def _build(compiler: Compiler, launch: Launch, target: str, entry: str, options: list[str]) -> CodeObject:
    file = launch.kernel.split(":")[0]
    arguments = [*_target_options(compiler, target), *options]
    if compiler.kind in ("nvrtc", "hiprtc"):
        try:
            library = rtc.load(compiler.kind, compiler.path)
            image = library.compile(launch.kernel, _read(csrc_dir() / "kernels" / file), headers(), arguments)
        except (rtc.RtcError, OSError) as e:
            raise CompileError(str(e)) from None
    else:
        image = _run_clang(compiler.path, launch.kernel, file, arguments, lambda out: ["-o", out])
    if image[:4] != b"\x7fELF":
        raise CompileError(
            f"{launch.kernel}: {compiler.kind} gave {len(image)} bytes that are no ELF file for {target}."
        )
    return CodeObject(image, entry, target, launch.threads, launch.shared, "", compiler=describe(compiler))


def _run_clang(
    path: str, kernel: str, file: str, arguments: Sequence[str], output: Callable[[str], list[str]]
) -> bytes:
    source, include = csrc_dir() / "kernels" / file, csrc_dir() / "include"
    with tempfile.TemporaryDirectory(prefix="jaxnorm-") as folder:
        out = os.path.join(folder, "out")
        command = [path, *arguments, f"-I{include}", *output(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not os.path.exists(out):
            raise CompileError(
                f"{kernel}: {os.path.basename(path)} failed ({done.returncode}): {' '.join(command)}\n{done.stderr}"
            )
        return Path(out).read_bytes()


def assembly(launch: Launch, problem: Problem, clang: str | None = None) -> str:
    """Assembly text of one launch for a gfx target, by ``clang`` or the compiler found; for inspection and tests.

    Raises:
      CompileError: the compiler refused, or it is one that cannot give assembly (a run-time compiler).
    """
    compiler = Compiler("clang", clang) if clang else find(problem.target)
    if compiler is None or compiler.kind not in ("clang", "hipcc"):
        raise CompileError(f"{launch.kernel}: assembly needs a clang or hipcc: set {CLANG_VARIABLE}.")
    file = launch.kernel.split(":")[0]
    arguments = [*_target_options(compiler, problem.target), *macros(launch, problem.target), "-S"]
    text = _run_clang(compiler.path, launch.kernel, file, arguments, lambda out: ["-o", out]).decode()
    # A path of this machine in the text would make equal code look different.
    return re.sub(r"^\s*\.(file|ident)\s.*\n", "", text, flags=re.M)
