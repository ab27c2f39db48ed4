"""The host side of the fused distributed calls on ROCm, over the recording fake of HIP: arguments, cleanup, errors.

    LD_LIBRARY_PATH=<folder of the fake libamdhip64.so.7> python tests/distributed_rocm.py LIBRARY

A process of its own, because the handler opens the driver once. No kernel runs: what the fake launches does nothing.
"""

from __future__ import annotations

import ctypes
import sys

import distributed_host as host
import jax
from cases_distributed import mesh_of

from jaxnorm._compile import hip
from jaxnorm._compile.code_object import CodeObject
from jaxnorm.distributed import fused, schedule

RANKS, HALF, UNCACHED, PORTABLE_MAPPED = 4, 4096, 3, 3
image = b"\x7fELF"


def install(path: str) -> None:
    host.install(path)
    schedule.platform = lambda: "rocm"  # type: ignore[assignment]
    fused.target.in_force = lambda named: ("gfx942",)  # type: ignore[assignment]
    fused.target.resolve = lambda platform, named: "gfx942"  # type: ignore[assignment]
    hip.compile = lambda launch, p: CodeObject(image, "rank_norm_fwd", "gfx942", launch.threads, launch.shared, "")  # type: ignore[assignment]


class Fake:
    """What stays alive and what was asked, since this object was made."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libamdhip64.so.7")
        self.library.fake_notes.restype = ctypes.c_char_p
        self.before = self._alive()
        self.library.fake_forget()

    def _alive(self) -> list[int]:
        out = (ctypes.c_int * 4)()
        self.library.fake_peers_alive(out)
        return list(out)

    def alive(self) -> tuple[int, ...]:
        """Device buffers, host words, mappings, modules."""
        return tuple(a - b for a, b in zip(self._alive(), self.before, strict=True))

    def fail(self, call: str, status: int, after: int = 0) -> None:
        """The next call of a kind fails, or the one after so many."""
        self.library.fake_fail(call.encode(), status)
        self.library.fake_spare(after)

    def notes(self) -> list[tuple[str, ...]]:
        """(device, call, two arguments)"""
        return [tuple(line.split()) for line in self.library.fake_notes().decode().splitlines()]


def error(order: tuple[int, ...]) -> str:
    """Of a call on these devices; a group whose allocation failed is not used again, so each has its own."""
    _, _, f, placed = host.run("quant", mesh_of((RANKS,), ("tp",), order), timeout_s=2)
    return host._error(lambda: f(placed))


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def calls_from_jax() -> None:
    global image
    fake = Fake()
    image = b"nothing"
    expect(
        error((0, 1, 2, 3)),
        "loading the code object: hipErrorNoBinaryForGpu (209)",
        "reduce_scatter_rmsnorm_quant_all_gather",
    )
    image = b"\x7fELF 1"
    fake.fail("function", 2)
    expect(error((1, 0, 2, 3)), "finding the kernel: hipErrorOutOfMemory (2)")
    assert fake.alive()[:3] == (0, 0, 0)
    image = b"\x7fELF 2"
    fake.fail("device", 100)
    expect(error((2, 1, 0, 3)), "no current device: hipErrorNoDevice (100)")
    for order, call, words in (
        ((3, 1, 2, 0), "space", "allocating a workspace of"),
        ((0, 2, 1, 3), "clear", "allocating a workspace of"),
        ((0, 3, 2, 1), "word", "allocating a word of host memory"),
        ((0, 1, 3, 2), "mapword", "allocating a word of host memory"),
    ):
        fake = Fake()
        fake.fail(call, 2, after=2)
        expect(error(order), words, "hipErrorOutOfMemory (2)", "impl='composite'")
        # What the other ranks had got is given back; their words for failures stay, each with its group.
        assert fake.alive()[::2] == (0, 0) and fake.alive()[1] <= RANKS, (call, fake.alive())


def right_arguments() -> None:
    fake = Fake()
    order = (2, 0, 3, 1)
    call, arrays, f, placed = host.run("quant", mesh_of((RANKS,), ("tp",), order))
    for _ in range(2):
        jax.block_until_ready(f(placed))
    launch = fused.decide(host._config(call), tuple((n, a.dtype.name) for n, a in arrays.items()), "fused").launch
    assert launch is not None
    last = (ctypes.c_int * 8)()
    fake.library.fake_last(last)
    assert list(last) == [*launch.grid, launch.threads, 1, 1, launch.shared, 0]
    notes = fake.notes()
    asked = {(device, int(flags)) for device, name, _, flags in notes if name == "hipExtMallocWithFlags"}
    assert asked == {(str(d), UNCACHED) for d in range(RANKS)}, "uncached memory, once on each device"
    assert len([n for n in notes if n[1] == "hipExtMallocWithFlags"]) == RANKS
    sizes = {int(n[2]) for n in notes if n[1] == "hipExtMallocWithFlags"}
    cleared = [(int(n[2]), int(n[3])) for n in notes if n[1] == "hipMemset"]
    assert len(sizes) == 1 and cleared == [(0, next(iter(sizes)))] * RANKS, "all of it is zeros"
    assert [n[2:] for n in notes if n[1] == "hipHostMalloc"] == [("64", str(PORTABLE_MAPPED))] * RANKS
    peers = {(int(n[0]), int(n[2])) for n in notes if n[1] == "hipDeviceEnablePeerAccess"}
    assert peers == {(a, b) for a in range(RANKS) for b in range(RANKS) if a != b}
    assert fake.alive()[:3] == (RANKS, RANKS, 0)


def processes(path: str) -> None:
    """Two processes' worth of ranks: the workspace that is exported and the one that is mapped."""
    library, fake = ctypes.CDLL(path), Fake()
    text, handles = ctypes.create_string_buffer(500), ctypes.create_string_buffer(128)

    def create(first: int) -> str:
        devices = (ctypes.c_int64 * 2)(first, 4096 + first)
        handle = ctypes.create_string_buffer(64)
        library.JaxnormFusedCreate(1, devices, 2, ctypes.c_int64(0), 0, ctypes.c_uint64(HALF), handle, text, 500)
        handles[0:64] = handles[64:128] = handle.raw
        return text.value.decode()

    def connect(first: int) -> str:
        devices = (ctypes.c_int64 * 2)(first, 4096 + first)
        library.JaxnormFusedConnect(1, devices, 2, ctypes.c_int64(0), 0, handles, text, 500)
        return text.value.decode()

    steps = (
        ("space", "allocating a workspace of"),
        ("export", "exporting a workspace"),
        ("word", "a word of host memory"),
    )
    for call, words in steps:
        fake.fail(call, 2)
        expect(create(5 if call == "word" else 4), words, "hipErrorOutOfMemory (2)")
        assert fake.alive()[0] == 0, (call, fake.alive())
    assert create(4) == "" and fake.alive()[0] == 1
    fake.fail("import", 2)
    expect(connect(4), "mapping the workspace of rank 1 (device 4 of process 1)", "hipErrorOutOfMemory (2)")
    assert fake.alive()[2] == 0
    assert connect(4) == "" and fake.alive()[2] == 1
    assert [n[2] for n in fake.notes() if n[1] == "hipIpcOpenMemHandle"] == ["1", "1"], "hipIpcMemLazyEnablePeerAccess"
    expect(create(9), "making a device current: hipError (101)")


if __name__ == "__main__":
    install(sys.argv[1])
    calls_from_jax()
    right_arguments()
    processes(sys.argv[1])
    print("SCENARIO OK")
