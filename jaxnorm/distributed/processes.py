"""Failures of fused calls, and groups whose ranks are processes of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _native
from ..errors import value_error

PROCESS = 4096  # group.h:kProcess
_TEXT = 2048
_HANDLE = 64
_connected: dict[tuple[int, ...], int] = {}
"""Device ids of a connected group -> bytes of a half of its workspaces."""


class FusedCallError(RuntimeError):
    """A fused call failed: a rank did not come in time, or ran another program. The text names it."""


def index() -> int:
    return jax.process_index()


def device_id(device: Any) -> int:
    """A device as the library names it: unique over the processes of a host."""
    local = device.local_hardware_id
    return PROCESS * device.process_index + int(device.id if local is None else local)


def unreachable(groups: Sequence[Sequence[int]], half_bytes: int) -> str:
    """Why a group of these cannot run fused calls; empty when all can."""
    mine = [g for g in groups if any(i // PROCESS == index() for i in g)]
    for group in mine:
        if all(i // PROCESS == index() for i in group):
            continue
        room = _connected.get(tuple(group))
        if room is None:
            return "the group spans processes that are not connected (jaxnorm.distributed.connect)"
        if room < half_bytes:
            return f"the group was connected with {room} bytes a half, and {half_bytes} are needed"
    return ""


def _call(name: str, *args: Any) -> str:
    library = _native.fused_library()
    if library is None:
        return ""
    text = ctypes.create_string_buffer(_TEXT)
    failed = getattr(library, name)(*args, text, ctypes.c_int(_TEXT))
    return text.value.decode(errors="replace") if failed else ""


def check() -> None:
    """Raises when a fused call of this process has failed since the last :func:`reset`.

    A failed call leaves NaN in its scales (or in y) and the next call of its group raises; this asks at once. Call it after
    ``block_until_ready``.

    Raises:
      FusedCallError: names the rank that waited and the one that did not come.
    """
    if failures := _call("JaxnormFusedFailures"):
        raise FusedCallError(
            f"jaxnorm.distributed: {failures}. Call jaxnorm.distributed.reset() once all devices are idle."
        )


def reset() -> None:
    """Forgets failures and makes the groups usable again. All devices must be idle, on every process of a group.

    Raises:
      FusedCallError: a device does not answer; a lost device needs a new process.
    """
    if problem := _call("JaxnormFusedReset"):
        raise FusedCallError(
            f"jaxnorm.distributed: reset failed: {problem}. Restart the process if the device is lost."
        )


def _allgather(mine: bytes) -> list[bytes]:
    from jax.experimental import multihost_utils

    every = np.asarray(multihost_utils.process_allgather(np.frombuffer(mine, np.uint8)))
    return [row.tobytes() for row in every.reshape(jax.process_count(), -1)]


def connect(
    devices: Sequence[Any], half_bytes: int, *, exchange: Callable[[bytes], Sequence[bytes]] | None = None
) -> None:
    """Lets one process a GPU, on one host, run fused calls over ``devices``: maps one another's workspaces.

    Every process calls it once, before it traces a call, with the devices in the order of their ranks along the mesh axis.

    Args:
      devices:    one of each process, as in ``mesh.devices``.
      half_bytes: room for the largest call: about ``M * N`` times the bytes of a partial sum and of a result; twice that is taken.
      exchange:   gives everyone's bytes in the order of the ranks for this process's; None = over ``jax.distributed``.

    Raises:
      ValueError: not one device of each process.
      FusedCallError: the memory cannot be made or mapped; the composite goes on working.
    """
    ids = [device_id(d) for d in devices]
    owners = [i // PROCESS for i in ids]
    if len(set(owners)) != len(owners) or index() not in owners:
        raise value_error(
            "connect", "devices", f"devices of processes {owners}", f"one of each, process {index()} among them"
        )
    library = _native.fused_library()
    if library is None:
        raise FusedCallError(f"jaxnorm.distributed: no launcher with fused calls: {_native.status().reason}")
    rank, half = owners.index(index()), -(-half_bytes // 16) * 16
    array = (ctypes.c_int64 * len(ids))(*ids)
    hip = ctypes.c_int("rocm" in devices[rank].client.platform_version.lower())
    group = (hip, array, ctypes.c_int(len(ids)), ctypes.c_int64(index()), ctypes.c_int(rank))
    handle = ctypes.create_string_buffer(_HANDLE)
    problem = _call("JaxnormFusedCreate", *group, ctypes.c_uint64(half), handle)
    status = (b"1" if problem else b"0") + handle.raw
    if exchange is None:
        every = _allgather(status)
        every = [every[o] for o in owners]
    else:
        every = list(exchange(status))
    if problem or any(s[:1] != b"0" for s in every):
        raise FusedCallError(f"jaxnorm.distributed: {problem or 'another process could not make its workspace'}.")
    handles = b"".join(s[1:] for s in every)
    if problem := _call("JaxnormFusedConnect", *group, handles):
        raise FusedCallError(f"jaxnorm.distributed: {problem}.")
    _connected[tuple(ids)] = half
