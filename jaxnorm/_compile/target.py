"""Which machine code to make: from the device, or from ``use_target`` where no device is present."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax

from .. import _context
from ..errors import UnsupportedError, value_error

DEFAULT = {"cuda": "sm_90", "rocm": "gfx942"}
_PATTERN = {"cuda": r"sm_\d{2,3}", "rocm": r"gfx[0-9a-f]{3,4}"}


def use_target(targets: Mapping[str, str]) -> Any:
    """Context manager: lower for these targets, e.g. ``{"rocm": "gfx942", "cuda": "sm_90"}``, whatever devices are present.

    The values shown are what a platform without a device is lowered for by default. Part of the key of ``jax.jit``'s cache.

    Raises:
      ValueError: a platform other than ``cuda`` and ``rocm``, or a target that does not look like one of that platform.
    """
    for platform, target in dict(targets).items():
        if platform not in DEFAULT:
            raise value_error("use_target", "targets", f"platform {platform!r}", "'cuda' or 'rocm'")
        if not isinstance(target, str) or not re.fullmatch(_PATTERN[platform], target):
            raise value_error(
                "use_target", f"targets[{platform!r}]", repr(target), f"a target such as {DEFAULT[platform]!r}"
            )
    return _context.target(tuple(sorted(dict(targets).items())))


def named() -> tuple[tuple[str, str], ...]:
    """What ``use_target`` names in this context."""
    return _context.target.value or ()


def of_device(device: Any) -> str | None:
    """``sm_90`` or ``gfx942``; None for a device that is no GPU."""
    capability = getattr(device, "compute_capability", None)
    if not capability:
        return None
    text = str(capability).split(":")[0]
    return text if text.startswith("gfx") else "sm_" + text.replace(".", "")


def default_platform() -> str:
    """Platform of the default device; ``cuda`` or ``rocm`` where ``jax.default_backend()`` says ``gpu``, as it does for both."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return "rocm" if (of_device(jax.devices()[0]) or "").startswith("gfx") else "cuda"


@functools.cache
def _present(platform: str) -> tuple[str, ...]:
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        return ()
    return tuple(sorted({t for d in devices if (t := of_device(d))}))


@functools.cache
def kind(platform: str, target: str) -> str:
    """What the device of this target calls itself (``NVIDIA H200``); empty where none is present."""
    try:
        return next((d.device_kind for d in jax.devices(platform) if of_device(d) == target), "")
    except RuntimeError:
        return ""


def resolve(platform: str, targets: tuple[tuple[str, str], ...]) -> str:
    """The target to compile for: named by ``use_target``, else the devices', else the default of the platform."""
    if (target := dict(targets).get(platform)) is not None:
        return target
    present = _present(platform)
    if len(present) > 1:
        raise UnsupportedError(
            "jaxnorm",
            platform,
            f"the {platform} devices of this process differ ({', '.join(present)}).",
            f"Name one with jaxnorm.use_target({{{platform!r}: ...}}).",
        )
    return present[0] if present else DEFAULT[platform]


def in_force(targets: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The targets that what is traced now is for: those named by ``use_target``, else the default device's; ``cpu`` for a CPU."""
    if targets:
        return tuple(t for _, t in targets)
    platform = default_platform()
    return (resolve(platform, ()),) if platform in DEFAULT and is_present(platform) else ("cpu",)


def native_fp8(target: str) -> str:
    """The e4m3 format that ``"fp8"`` means: fnuz on gfx94x, fn elsewhere."""
    return "float8_e4m3fnuz" if target.startswith("gfx94") else "float8_e4m3fn"


def is_present(platform: str) -> bool:
    return bool(_present(platform))
