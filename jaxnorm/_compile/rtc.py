"""NVRTC and hipRTC through ctypes: source text in, machine code out, no toolkit and no GPU.

The two libraries have one interface under two prefixes. They are found in the order: already mapped by this process (the CUDA
plugin of jax maps the one it will use), the wheel of jax's CUDA major, the system's library path.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Newest first, unless jax's CUDA plugin says which major it is.
_WHEELS = {"13": "nvidia/cu13/lib/libnvrtc.so.13", "12": "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"}
_SONAMES = {
    "nvrtc": ("libnvrtc.so.13", "libnvrtc.so.12"),
    "hiprtc": ("libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so"),
}
_RESULT = {"nvrtc": ("GetCUBINSize", "GetCUBIN"), "hiprtc": ("GetCodeSize", "GetCode")}
_compiling = threading.Lock()


class RtcError(RuntimeError):
    """The library refused, with its own words and the compiler's log."""


@functools.cache
def find(api: str) -> str | None:
    """Real path of the library of ``nvrtc`` or ``hiprtc``, without loading it; None where there is none."""
    return next((os.path.realpath(p) for p in _paths(api) if os.path.exists(p)), None)


def _paths(api: str) -> list[str]:
    mapped = _mapped(f"lib{api}.so")
    wheels: list[str] = []
    if api == "nvrtc":
        for major in _cuda_majors():
            wheels += [os.path.join(folder or ".", _WHEELS[major]) for folder in sys.path]
    folders = [f for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    if api == "hiprtc":
        folders += [os.path.join(os.environ.get("ROCM_PATH", "/opt/rocm"), "lib")]
    else:
        folders += [os.path.join(root, "lib64") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    folders += ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
    return mapped + wheels + [os.path.join(f, name) for f in folders for name in _SONAMES[api]]


def _mapped(prefix: str) -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and prefix in line}
    return sorted(p for p in paths if os.path.basename(p).startswith(prefix))


def _cuda_majors() -> list[str]:
    """CUDA majors to look for, that of jax's plugin first."""
    for major in _WHEELS:
        for name in (f"jax-cuda{major}-plugin", f"jax-cuda{major}-pjrt"):
            try:
                importlib.metadata.version(name)
                return [major, *(m for m in _WHEELS if m != major)]
            except importlib.metadata.PackageNotFoundError:
                continue
    return list(_WHEELS)


def identity(path: str) -> str:
    """Text that changes whenever the library does: its real path, size and time of change. Asking hipRTC for a version would not
    do (the numbers are hard-coded there), and loading a compiler to look up a cache would be slow."""
    real = os.path.realpath(path)
    status = os.stat(real)
    return f"{real}:{status.st_size}:{status.st_mtime_ns}"


class Rtc:
    """One loaded library."""

    def __init__(self, api: str, path: str) -> None:
        self.api, self.path = api, path
        self._library = ctypes.CDLL(path)
        self._function("GetErrorString").restype = ctypes.c_char_p

    def _function(self, name: str) -> Any:
        return getattr(self._library, self.api + name)

    def _check(self, status: int, what: str) -> None:
        if status:
            text = self._function("GetErrorString")(status).decode(errors="replace")
            raise RtcError(f"{what}: {self.api}: {text} ({self.path})")

    def _read(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._function(size_of)(program, ctypes.byref(size)), size_of)
        buffer = ctypes.create_string_buffer(max(1, size.value))
        self._check(self._function(get)(program, buffer), get)
        return buffer.raw[: size.value]

    def version(self) -> str:
        """``13.0``, as the library says."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._function("Version")(ctypes.byref(major), ctypes.byref(minor)), "Version")
        return f"{major.value}.{minor.value}"

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """Machine code of ``source``, whose includes are found in ``headers`` only.

        Raises:
          RtcError: the compiler's log, with ``name`` in front.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*[t.encode() for t in headers.values()])
        names = (ctypes.c_char_p * len(headers))(*[n.encode() for n in headers])
        arguments = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        create = self._function("CreateProgram")
        status = create(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names)
        self._check(status, name)
        try:
            with _compiling:  # older comgr, behind hipRTC, is not thread-safe
                status = self._function("CompileProgram")(program, len(options), arguments)
            if status:
                log = self._read("GetProgramLogSize", "GetProgramLog", program).rstrip(b"\0").decode(errors="replace")
                text = self._function("GetErrorString")(status).decode(errors="replace")
                raise RtcError(f"{name}: {self.api}: {text} ({self.path})\noptions: {' '.join(options)}\n{log}")
            return self._read(*_RESULT[self.api], program)
        finally:
            self._function("DestroyProgram")(ctypes.byref(program))


@functools.cache
def load(api: str, path: str) -> Rtc:
    """The library at ``path``, loaded once."""
    return Rtc(api, path)
