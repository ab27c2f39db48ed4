"""The message of jaxlib's own Triton call, for machines without our launcher.

jaxlib registers ``triton_kernel_call_ffi`` on CUDA and ROCm. It takes a zlib-compressed protobuf message, private to jaxlib,
that is written here by hand; a test compares the bytes with those of jaxlib's own encoder. The machine code travels inside the
message, which jaxlib understands from 0.11.2 on.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

from ..kernels.configs import Launch, Problem, wave_size
from .code_object import CodeObject

TARGET = "triton_kernel_call_ffi"
OLDEST_JAXLIB = (0, 11, 2)
POINTER_ALIGNMENT = 16
_INTEGERS = {"i32": 3, "u32": 4, "i64": 5, "u64": 6}
_JAXLIB_LANES = {"cuda": 32, "rocm": 64}  # lanes a warp of the message stands for, whatever the chip


def ffi_arguments(code: CodeObject, launch: Launch, problem: Problem, platform: str) -> dict[str, bytes]:
    """Attributes for ``jax.ffi.ffi_call(TARGET, out_types)(*operands, **attributes)``.

    Operands and results are the launch's inputs and outputs, each of them: absent ones need a stand-in, for the message has no
    null pointer.
    """
    lanes = _JAXLIB_LANES[platform]
    if code.threads % lanes:
        raise ValueError(
            f"{launch.kernel}: {code.threads} threads on {code.target}; jaxlib launches multiples of {lanes}."
        )
    params = [array_param(divisibility=POINTER_ALIGNMENT) for _ in launch.inputs]
    params += [scalar_param(kind, value) for _, kind, value in launch.scalars]
    params += [array_param(divisibility=POINTER_ALIGNMENT) for _ in launch.outputs]
    # The text field is only a key of jaxlib's cache of loaded kernels here, and is hashed at every launch: a digest is enough.
    key = hashlib.sha256(code.image).hexdigest()
    capability = int(code.target[3:]) if platform == "cuda" else 0
    message = kernel(code.name, code.threads // lanes, 1, code.shared, key, "", capability, code.image)
    return {"opaque": zlib.compress(any_call(kernel_call(message, launch.grid, params), problem.stage), 6)}


def fewest_warps(target: str) -> int:
    """Waves a program must have so that jaxlib can launch it: it counts 64 lanes a warp on ROCm, also on wave32 chips."""
    return 2 if target.startswith("gfx") and wave_size(target) == 32 else 1


def _varint(n: int) -> bytes:
    out = bytearray()
    n &= (1 << 64) - 1
    while True:
        low, n = n & 127, n >> 7
        out.append(low | (128 if n else 0))
        if not n:
            return bytes(out)


def _int(field: int, n: int, always: bool = False) -> bytes:
    return _varint(field << 3) + _varint(n) if n or always else b""


def _bytes(field: int, s: str | bytes, always: bool = False) -> bytes:
    data = s.encode() if isinstance(s, str) else s
    return _varint(field << 3 | 2) + _varint(len(data)) + data if data or always else b""


def array_param(zeroed_bytes: int = 0, divisibility: int = POINTER_ALIGNMENT) -> bytes:
    """A pointer; jaxlib fills ``zeroed_bytes`` with zeros before the launch and checks the divisibility."""
    return _bytes(1, _int(1, zeroed_bytes) + _int(2, divisibility), True)


def scalar_param(kind: str, value: int | float | bool) -> bytes:
    """A scalar by Triton's name of its type."""
    if kind in _INTEGERS:
        return _int(_INTEGERS[kind], int(value), True)
    if kind in ("B", "i1"):
        return _int(2, int(bool(value)), True)
    if kind == "fp32":
        return _varint(7 << 3 | 5) + struct.pack("<f", value)
    if kind == "fp64":
        return _varint(8 << 3 | 1) + struct.pack("<d", value)
    raise ValueError(f"scalar type: got {kind!r}, expected one of {', '.join(_INTEGERS)}, B, i1, fp32, fp64.")


def kernel(
    name: str, warps: int, clusters: int, shared: int, ptx: str, ttir: str, capability: int, image: bytes | None = None
) -> bytes:
    """A kernel; with an image, ``ptx`` and ``ttir`` are not read but as a key."""
    message = (
        _bytes(1, name) + _int(2, warps) + _int(3, shared) + _bytes(4, ptx) + _bytes(5, ttir) + _int(6, capability)
    )
    message += _int(10, clusters, True)
    if image is not None:
        message += _bytes(11, _bytes(1, image) + _bytes(2, name) + _int(3, shared), True)
    return message


def kernel_call(message: bytes, grid: tuple[int, ...], params: list[bytes]) -> bytes:
    """A kernel with its grid and parameters."""
    x, y, z = (*grid, *(1,) * (3 - len(grid)))
    return (
        _bytes(1, message, True) + _int(2, x) + _int(3, y) + _int(4, z) + b"".join(_bytes(5, p, True) for p in params)
    )


def any_call(call: bytes, name: str = "", metadata: bytes = b"") -> bytes:
    """The outermost message: one call, no autotuning."""
    return _bytes(1, call, True) + _bytes(3, metadata) + _bytes(4, name)
