"""Kernel records of CUPTI: what ran on the device, from when to when. JAX and torch programs alike, CUDA graphs included.

Through ctypes, because the extension behind ``jax.experimental.mosaic.gpu.profiler`` tells durations only, and launches that
overlap (programmatic dependent launch) need the times themselves. No other user of CUPTI (nsys, ncu, torch.profiler) may be
attached.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import re
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

CONCURRENT_KERNEL = 10  # CUPTI_ACTIVITY_KIND_*: kernels with their times, without keeping them apart
KERNELS = (3, CONCURRENT_KERNEL)
FLUSH_FORCED = 1
BUFFER_BYTES = 1 << 20


class Kernel(NamedTuple):
    """One kernel that ran; times in microseconds, on a clock that begins with the first kernel of the session."""

    name: str
    us: float
    start: float


class _Record(ctypes.Structure):
    """The head of ``CUpti_ActivityKernel<N>``, the same since N = 4 (CUDA 9)."""

    _fields_ = (
        ("kind", c_uint32),
        ("before", c_uint32 * 3),
        ("start", c_uint64),
        ("end", c_uint64),
        ("between", c_uint64 * 9),
        ("name", c_char_p),
    )


_Requested = ctypes.CFUNCTYPE(None, POINTER(c_void_p), POINTER(c_size_t), POINTER(c_size_t))
_Completed = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_void_p, c_size_t, c_size_t)


def _libraries() -> Iterator[str]:
    """Where libcupti may be: in this process already, in NVIDIA's wheels, where the loader looks, in the toolkit."""
    try:
        with open("/proc/self/maps") as maps:
            yield from dict.fromkeys(re.findall(r"/\S*libcupti\.so\S*", maps.read()))
    except OSError:
        pass
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        yield from sorted(glob.glob(f"{folder}/*/lib/libcupti.so.*"), reverse=True)
    yield "libcupti.so"
    yield from sorted(glob.glob("/usr/local/cuda*/extras/CUPTI/lib64/libcupti.so"), reverse=True)


class Recorder:
    """Runs a function that waits for the device and returns the kernels it launched, in the order in which they began.

    Raises:
      RuntimeError: there is no libcupti, or it refuses (another user is attached).
    """

    def __init__(self) -> None:
        self._lib = self._load()
        self._buffers: dict[int, Any] = {}
        self._found: list[tuple[int, int, str]] = []
        self._callbacks = (
            _Requested(self._requested),
            _Completed(self._completed),
        )  # kept alive as long as CUPTI has them

    @staticmethod
    def _load() -> ctypes.CDLL:
        tried = []
        for path in _libraries():
            try:
                return ctypes.CDLL(path)
            except OSError as e:
                tried.append(f"{path}: {e}")
        raise RuntimeError(f"no libcupti could be loaded ({'; '.join(tried)}); the wheel nvidia-cuda-cupti has one")

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status:
            text = c_char_p()
            self._lib.cuptiGetResultString(c_int(status), byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'').decode()} ({status})")

    def _requested(self, buffer: Any, size: Any, most: Any) -> None:
        memory = (c_uint64 * (BUFFER_BYTES // 8))()
        address = ctypes.addressof(memory)
        self._buffers[address] = memory
        buffer[0], size[0], most[0] = address, BUFFER_BYTES, 0

    def _completed(self, context: Any, stream: int, buffer: int, size: int, valid: int) -> None:
        at = c_void_p()
        while valid and not self._lib.cuptiActivityGetNextRecord(c_void_p(buffer), c_size_t(valid), byref(at)):
            record = ctypes.cast(at, POINTER(_Record)).contents
            if record.kind in KERNELS:
                self._found.append((record.start, record.end, (record.name or b"").decode(errors="replace")))
        self._buffers.pop(buffer, None)

    def __call__(self, run: Callable[[], None]) -> list[Kernel]:
        self._found = []
        self._check("cuptiActivityRegisterCallbacks", *self._callbacks)
        self._check("cuptiActivityEnable", c_int(CONCURRENT_KERNEL))
        try:
            run()
        finally:
            self._check("cuptiActivityFlushAll", c_uint32(FLUSH_FORCED))
            self._check("cuptiActivityDisable", c_int(CONCURRENT_KERNEL))
        found = sorted(self._found)
        # nanoseconds since 1970 have more digits than a float
        return [Kernel(name, (end - start) * 1e-3, (start - found[0][0]) * 1e-3) for start, end, name in found]


def busy_us(kernels: list[Kernel]) -> float:
    """Time in which at least one of them ran: what overlaps counts once, what lies between two does not count."""
    total, until = 0.0, float("-inf")
    for k in sorted(kernels, key=lambda k: k.start):
        end = k.start + k.us
        total += max(0.0, end - max(k.start, until))
        until = max(until, end)
    return total
