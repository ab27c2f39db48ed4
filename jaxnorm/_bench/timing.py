"""Device time of one call: the time in which its kernels run, cold L2, JAX and torch programs alike.

On CUDA the times are those of CUPTI's kernel records (``cupti``), over rotating inputs inside one session; host time, launch gaps,
memcpy and memset are not in them. Where kernels of a call overlap, the overlap counts once. Elsewhere (ROCm, CPU) the time is the
wall clock of a queue of calls divided by their number: good for calls well above the launch cost only, and not tried on an AMD GPU.

No other CUPTI user (nsys, ncu, torch.profiler) may be attached.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .cupti import Kernel, Recorder, busy_us

MIB = 1 << 20
COLD_BYTES = 256 * MIB
"""Inputs rotate over at least this much, four times the L2 of an H200. An Infinity Cache of 256 MB needs more."""
MAX_SETS = 32
CALLS, CALLS_LARGE, LARGE = 20, 10, 400 * 10**6
PER_SESSION = 5
METHOD = (
    "time in which kernels of one call ran (union of the intervals of CUPTI kernel records, so that overlapping launches count "
    "once; no memcpy, memset, host time or gaps); "
    "median of 20 calls, 10 above 400 MB, in rounds of 5 with the contestants taking turns; "
    "cold L2: inputs rotate over >= 256 MB; where 32 sets do not reach that, a 256 MB read-write kernel before each call, "
    "left out of the sum; copy = the fastest elementwise kernel (XLA's, torch's) moving the same bytes, measured beside "
    "the contestants in the same way"
)
WALL_METHOD = "wall clock of a queue of 5 calls / 5 (host enqueue included where it is longer); not a kernel time"

FATAL = (
    "illegal_address",
    "illegal memory",
    "illegal instruction",
    "misaligned",
    "launch_failed",
    "launch failure",
    "device-side assert",
)

Records = list[Kernel]


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process after such an error."""
    text = str(error).lower()
    return any(f in text for f in FATAL)


@dataclasses.dataclass
class Program:
    """One contestant, ready to run: ``calls[i]()`` runs it on input set i and returns its outputs without waiting."""

    name: str
    calls: Sequence[Callable[[], Any]]
    wait: Callable[[Any], Any]
    framework: str = "jax"


@dataclasses.dataclass
class Sample:
    us: float
    kernels: Records


class KernelRecorder(Protocol):
    def __call__(self, run: Callable[[], None]) -> Records:
        """Runs ``run`` (which waits for the device) and returns the kernels it launched, in the order in which they began."""
        ...


def split_records(records: Records, calls: int, ignore: dict[str, int] | None = None) -> list[Records]:
    """The kernel list of a session as one list per call.

    Args:
      ignore: kernels of the flush, name -> how many per call; they are taken out first.

    Raises:
      ValueError: nothing recorded, the flush is not complete, or calls that differ in the number or names of their kernels.
    """
    if ignore:
        seen = collections.Counter(k.name for k in records if k.name in ignore)
        expected = {name: n * calls for name, n in ignore.items()}
        if dict(seen) != expected:
            raise ValueError(f"flush kernels: got {dict(seen)}, expected {expected}")
        records = [k for k in records if k.name not in ignore]
    if not records or len(records) % calls:
        raise ValueError(f"kernel records: got {len(records)}, expected a multiple of {calls} calls above 0")
    size = len(records) // calls
    chunks = [records[i : i + size] for i in range(0, len(records), size)]
    names = sorted(k.name for k in chunks[0])
    for i, chunk in enumerate(chunks):
        if sorted(k.name for k in chunk) != names:
            raise ValueError(f"kernel records: call {i} ran {[k.name for k in chunk]}, call 0 ran {names}")
    return chunks


class Flush:
    """A kernel that reads and writes a buffer larger than any L2; it has a name that no norm's kernel has."""

    def __init__(self, nbytes: int = COLD_BYTES) -> None:
        import jax
        import jax.numpy as jnp

        self._step = jax.jit(lambda a: jnp.bitwise_xor(a, jnp.uint32(0x5A5A5A5A)), donate_argnums=0)
        self._buffer = jnp.arange(nbytes // 4, dtype=jnp.uint32)
        self.kernels: dict[str, int] = {}
        self()

    def __call__(self) -> None:
        self._buffer = self._step(self._buffer)
        self._buffer.block_until_ready()

    def learn(self, recorder: KernelRecorder, calls: int = 3) -> None:
        """Finds out which kernels one flush launches."""

        def run() -> None:
            for _ in range(calls):
                self()

        chunk = split_records(recorder(run), calls)[0]
        self.kernels = dict(collections.Counter(k.name for k in chunk))

    def busy(self, seconds: float) -> None:
        """Keeps the device at work so that its clock is up before something is timed."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self()


class CuptiTimer:
    """Samples of device time from CUPTI."""

    name = "cupti"
    method = METHOD

    def __init__(self, recorder: KernelRecorder | None = None, flush: Flush | None = None) -> None:
        self.record = recorder or Recorder()
        self.flush = flush or Flush()
        try:
            self.flush.learn(self.record)
        except ValueError:  # the session in which CUPTI attaches may come back empty
            self.flush.learn(self.record)

    def session(self, program: Program, first: int, calls: int, flush_each: bool) -> list[Sample]:
        self.flush()  # what the contestant before left in the L2 is gone

        def run() -> None:
            for i in range(first, first + calls):
                if flush_each:
                    self.flush()
                program.wait(program.calls[i % len(program.calls)]())

        chunks = split_records(self.record(run), calls, self.flush.kernels if flush_each else None)
        return [Sample(busy_us(chunk), chunk) for chunk in chunks]


class WallTimer:
    """Where there is no CUPTI: wall clock of a queue of calls. The samples of one session are equal."""

    name = "wall"
    method = WALL_METHOD

    def __init__(self) -> None:
        self.flush = None

    def session(self, program: Program, first: int, calls: int, flush_each: bool) -> list[Sample]:
        del flush_each
        start = time.perf_counter()
        out = [program.calls[i % len(program.calls)]() for i in range(first, first + calls)]
        for o in out:
            program.wait(o)
        us = (time.perf_counter() - start) * 1e6 / calls
        return [Sample(us, [])] * calls


Timer = CuptiTimer | WallTimer


def make_timer(kind: str = "auto") -> Timer:
    """``cupti``, ``wall``, or ``auto``: CUPTI on a CUDA device, the wall clock elsewhere."""
    import jax

    if kind == "wall" or (kind == "auto" and jax.default_backend() != "gpu"):
        return WallTimer()
    if kind == "auto" and "rocm" in jax.devices()[0].client.platform_version.lower():
        return WallTimer()
    return CuptiTimer()


def rotation(input_bytes: int) -> tuple[int, bool]:
    """(number of input sets, whether every call needs a flush before it) for a cold L2."""
    if input_bytes * MAX_SETS < COLD_BYTES:
        return 4, True
    return max(2, -(-COLD_BYTES // input_bytes)), False


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median, min, max in microseconds; kernels with their median durations, by order of their first appearance in a call."""
    times = [s.us for s in samples]
    kernels = []
    if samples[0].kernels:
        by_name: dict[str, list[float]] = {}
        counts = collections.Counter(k.name for k in samples[0].kernels)
        for s in samples:
            for k in s.kernels:
                by_name.setdefault(k.name, []).append(k.us)
        kernels = [[name[:100], counts[name], round(statistics.median(by_name[name]), 3)] for name in counts]
    return {
        "median_us": round(statistics.median(times), 3), "min_us": round(min(times), 3), "max_us": round(max(times), 3),
        "n": len(times), "kernels": kernels,
    }  # fmt: skip


def measure(
    timer: Timer, programs: Sequence[Program], nbytes: int, input_bytes: int, on_error: Callable[[str, Exception], None]
) -> dict[str, dict[str, Any]]:
    """Times the programs in turns and returns a summary by name; a program that fails is reported and left out.

    Args:
      nbytes: least traffic of a call, decides on the number of calls.
      input_bytes: bytes of one input set, decides on rotation or flush.
    """
    calls = CALLS_LARGE if nbytes > LARGE else CALLS
    _, flush_each = rotation(input_bytes)
    if timer.flush is not None:
        timer.flush.busy(0.1)
    samples: dict[str, list[Sample]] = {p.name: [] for p in programs}
    alive = list(programs)
    for r in range(calls // PER_SESSION):
        turn = r % max(len(alive), 1)
        for program in alive[turn:] + alive[:turn]:
            try:
                samples[program.name] += timer.session(program, r * PER_SESSION, PER_SESSION, flush_each)
            except Exception as e:
                on_error(program.name, e)
                alive = [p for p in alive if p is not program]
                samples.pop(program.name)
    out = {}
    for program in alive:
        try:
            out[program.name] = summarize(samples[program.name])
        except Exception as e:
            on_error(program.name, e)
    return out
