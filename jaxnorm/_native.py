"""The launcher from Python: loads ``jaxnorm/_launcher.*.so`` (built from csrc/launcher.cc), registers it, and calls it.

The library has no Python in it; it is loaded with ctypes. Loading and registering touch no GPU, and both vendors' platforms are
registered whatever the machine has, so that lowering and export work anywhere.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from jaxnorm._compile.code_object import CodeObject

TARGET = "jaxnorm_launch"
"""Name of the FFI target in the program; ``export_checks`` needs it."""
PLATFORMS = ("CUDA", "ROCM")
_INTERFACE = 4  # kInterface of csrc/launcher.cc
_REBUILD = (
    "Install a C++17 compiler (g++ or clang++) and reinstall: `pip install --force-reinstall --no-deps --no-cache-dir jaxnorm`, "
    "or `pip install -e .` in a checkout."
)

FUSED_TARGET = "jaxnorm_fused"
"""FFI target of the fused distributed kernels (csrc/distributed/fused_call.cc), in the same library."""

_lock = threading.Lock()
_status: Status | None = None
_library: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Status:
    """Whether the launcher can be used, and if not, why and what to do."""

    ok: bool
    reason: str
    remedy: str
    path: str | None
    """The library, when there is one."""


def status() -> Status:
    """Loads and registers the launcher at the first call; the same answer ever after. Never raises."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def fused_library() -> ctypes.CDLL | None:
    """The loaded library when it has the fused distributed calls."""
    return _library if status().ok and _library is not None and hasattr(_library, "JaxnormFusedExecute") else None


def require() -> Status:
    """:func:`status`, or RuntimeError where ``JAXNORM_REQUIRE`` names the launcher and it is not usable."""
    found = status()
    names = [name.strip() for name in os.environ.get("JAXNORM_REQUIRE", "").split(",")]
    if not found.ok and "launcher" in names:
        raise RuntimeError(f"jaxnorm: JAXNORM_REQUIRE asks for the launcher. {found.reason}. {found.remedy}")
    return found


@dataclass(frozen=True)
class Kernel:
    """One launch of a code object's kernel; ``threads`` and ``shared`` of the code are the block and the dynamic shared memory."""

    code: CodeObject
    grid: tuple[int, int, int]
    """Blocks; a 0 means no launch."""
    layout: str
    """One letter per kernel parameter: ``p`` the next buffer, ``n`` a null pointer, ``i`` the next scalar in 4 bytes, ``l`` in 8
    bytes, ``f`` the next scalar being the bits of a float32. Two more null pointers follow the last (Triton's scratch)."""
    scalars: tuple[int, ...] = ()
    buffers: tuple[int, ...] | None = None
    """Of each ``p``: which of the operands and results, counted through; None = one after another."""
    overlaps: bool = False
    """It may begin before the kernel before it has ended, which it waits for itself (NVIDIA, ``griddepcontrol.wait``)."""
    meeting: int = 0
    """n: its n blocks run at the same time and wait for one another; left out where the device has no room for that. -n: stands in
    for the kernel of n that it follows, and is left out where that one is there."""


def launch(
    kernels: Sequence[Kernel],
    args: Sequence[jax.Array],
    out_types: Sequence[jax.ShapeDtypeStruct],
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Launches of kernels one after another: one custom call in the program that is being traced.

    Args:
      kernels:   what to launch, for one target.
      args:      operands.
      out_types: shape and dtype of each result, scratch between the kernels included. What no kernel writes is undefined.
      aliases:   operand -> result that uses its buffer.

    Raises:
      RuntimeError: no launcher. What does not fit together is an error when the program is compiled or run, with the
        kernel's name in it.
    """
    import jax
    import numpy as np

    found = require()
    if not found.ok:
        raise RuntimeError(f"jaxnorm: {found.reason}. {found.remedy}")
    codes = [k.code for k in kernels]

    buffers = [range(k.layout.count("p")) if k.buffers is None else k.buffers for k in kernels]

    def integers(values: Iterable[int]) -> np.ndarray:
        return np.array(list(values), np.int64)

    call = jax.ffi.ffi_call(TARGET, tuple(out_types), input_output_aliases=dict(aliases or {}))
    results = call(
        *args,
        image=b"".join(c.image for c in codes),
        image_sizes=integers(len(c.image) for c in codes),
        name=" ".join(c.name for c in codes),
        target=codes[0].target,
        grid=integers(n for k in kernels for n in k.grid),
        threads=integers(c.threads for c in codes),
        shared=integers(c.shared for c in codes),
        layout=" ".join(k.layout for k in kernels),
        scalars=integers(n for k in kernels for n in k.scalars),
        buffers=integers(n for each in buffers for n in each),
        key=integers(digest(c) for c in codes),
        overlaps=integers(k.overlaps for k in kernels),
        meeting=integers(k.meeting for k in kernels),
    )
    return list(results)


def digest(code: CodeObject) -> int:
    """Digest that stands for the function in the launcher's table, so that a launch need not read the image."""
    digest = hashlib.sha256()
    for part in (code.target.encode(), code.name.encode(), code.image):
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _load() -> Status:
    # In this package's own folder only: another, editable, jaxnorm on the same path would answer importlib.util.find_spec.
    spec = importlib.machinery.PathFinder.find_spec("jaxnorm._launcher", [str(Path(__file__).resolve().parent)])
    if spec is None or spec.origin is None:
        return Status(False, "launcher not built: there is no jaxnorm/_launcher.*.so", _REBUILD, None)
    return _load_from(spec.origin)


def _load_from(path: str) -> Status:
    try:
        library = ctypes.CDLL(path)
        interface = library.JaxnormLaunchInterface()
    except (OSError, AttributeError) as e:
        return Status(False, f"launcher not loaded: {e}", _REBUILD, path)
    if interface != _INTERFACE:
        reason = f"launcher not loaded: {path} has interface {interface}, expected {_INTERFACE}"
        return Status(False, f"{reason}; it was built from other sources", _REBUILD, path)
    built, here = library.JaxnormLaunchFfiMinor(), _ffi_minor()
    if here is not None and built > here:  # XLA takes handlers of its own and of older minors.
        reason = f"launcher not loaded: {path} was built for XLA FFI 0.{built}, this jaxlib has 0.{here}"
        return Status(False, reason, _REBUILD, path)
    try:
        for platform in PLATFORMS:
            register(library, platform)
    except Exception as e:  # JAX raises different types for what it cannot register, in different versions.
        import jax

        reason = f"launcher not registered with jax {jax.__version__}: {type(e).__name__}: {e}"
        return Status(False, reason, "Use a jax that this jaxnorm supports (0.10.2 or later), and report this.", path)
    global _library
    _library = library
    return Status(True, f"launcher {path}", "", path)


def _ffi_minor() -> int | None:
    """FFI minor of the installed jaxlib, from its own header; None where it cannot be told."""
    import jax

    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    found = re.search(r"^#define XLA_FFI_API_MINOR (\d+)", header, re.MULTILINE)
    return int(found[1]) if found else None


def register(library: ctypes.CDLL, platform: str) -> None:
    """Makes the library's handlers the FFI target :data:`TARGET` of an XLA platform; once per platform and process."""
    import jax

    stages = {
        "instantiate": jax.ffi.pycapsule(library.JaxnormLaunchInstantiate),
        "initialize": jax.ffi.pycapsule(library.JaxnormLaunchInitialize),
        "execute": jax.ffi.pycapsule(library.JaxnormLaunchExecute),
    }
    jax.ffi.register_ffi_target(TARGET, stages, platform=platform)
    if hasattr(library, "JaxnormFusedExecute"):
        fused = {
            "instantiate": jax.ffi.pycapsule(library.JaxnormFusedInstantiate),
            "initialize": jax.ffi.pycapsule(library.JaxnormFusedInitialize),
            "execute": jax.ffi.pycapsule(library.JaxnormFusedExecute),
        }
        jax.ffi.register_ffi_target(FUSED_TARGET, fused, platform=platform)
