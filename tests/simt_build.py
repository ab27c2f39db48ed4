"""Kernels of csrc/kernels compiled for the CPU by g++ (tests/simt/simt.h) and run on numpy arrays, launch by launch.

The very plans of ``kernels/configs`` are run: the same macros, grid, threads and shared memory. Every array lies against pages
that cannot be touched, its last element at the page's edge as far as 16-byte alignment allows, with guard bytes that read as NaN
between. A kernel runs in a forked child, so that a wild access fails one test and not the session.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from cases import dtype
from jaxnorm.kernels.configs import Launch, Problem, wave_size

from jaxnorm._compile import hip
from jaxnorm._paths import csrc_dir

HERE = Path(__file__).parent / "simt"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
_TYPES = {"i32": "unsigned", "i64": "unsigned long long", "fp32": "float"}
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_HEAD = """
#define JN_SIMT 1
#define JN_WAVE {wave}
#include "simt.h"
#include <sys/wait.h>
#include <unistd.h>
"""
_TAIL = """
typedef void (*Runner)(void**);
static const Runner runners[] = {{ {runners} }};
extern "C" int simt_run(int index, int x, int y, int threads, int bytes, int order, int cluster, int meeting, void** a) {{
  const pid_t child = fork();
  if (child == 0) {{
    simt::wave = JN_WAVE;
    const simt::Dim3 grid{{unsigned(x), unsigned(y)}};
    const auto kernel = [=] {{ runners[index](a); }};
    if (cluster)
      alarm(60), simt::launch_clusters(grid, threads, size_t(bytes), simt::Order(order), unsigned(cluster), kernel);
    else if (meeting > 0)
      alarm(60), simt::launch_together(grid, threads, size_t(bytes), simt::Order(order), kernel);
    else
      simt::launch(grid, threads, size_t(bytes), simt::Order(order), kernel);
    _exit(0);
  }}
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}}
"""


class Guarded:
    """An array between pages without access. ``check`` sees what was written into the gap before and after it."""

    def __init__(self, shape: tuple[int, ...], name: str, values: np.ndarray | None = None) -> None:
        kind = dtype(name)
        size = int(np.prod(shape)) * kind.itemsize
        room = -(-max(size, 1) // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, room + 2 * _PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for page in (base, base + _PAGE + room):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = (room - size) // 16 * 16
        self._bytes = np.frombuffer(self._map, np.uint8, room, _PAGE)
        self._bytes[:] = 0xFF
        self._inside = slice(start, start + size)
        self.address = base + _PAGE + start
        self.array = self._bytes[self._inside].view(kind).reshape(shape)
        if values is not None:
            self.array[...] = values

    def check(self, what: str) -> None:
        before, after = self._bytes[: self._inside.start], self._bytes[self._inside.stop :]
        assert (before == 0xFF).all(), f"{what}: bytes before the array were written"
        assert (after == 0xFF).all(), f"{what}: bytes after the array were written"


def _instance(launch: Launch, target: str) -> tuple[str, ...]:
    return (launch.kernel, *hip.macros(launch, target))


class Kernels:
    """Every instance that the given plans need, one shared object per wave size."""

    def __init__(self, plans: Iterable[tuple[str, tuple[Launch, ...]]]) -> None:
        self._index: dict[int, dict[tuple[str, ...], int]] = {32: {}, 64: {}}
        launches: dict[int, list[tuple[Launch, str]]] = {32: [], 64: []}
        for target, plan in plans:
            wave = wave_size(target)
            for launch in plan:
                key = _instance(launch, target)
                if key not in self._index[wave]:
                    self._index[wave][key] = len(launches[wave])
                    launches[wave].append((launch, target))
        building = {wave: self._start(wave, found) for wave, found in launches.items() if found}
        self._library = {wave: self._load(*b) for wave, b in building.items()}

    @staticmethod
    def _start(wave: int, launches: list[tuple[Launch, str]]) -> tuple[Path, subprocess.Popen | None]:
        text = _HEAD.format(wave=wave) + "".join(_piece(i, *entry) for i, entry in enumerate(launches))
        text += _TAIL.format(runners=", ".join(f"run_{i}" for i in range(len(launches))))
        sources = [
            *sorted((csrc_dir() / "include").rglob("*.h")),
            *sorted((csrc_dir() / "kernels").glob("*.hip")),
            HERE / "simt.h",
        ]
        digest = hashlib.sha256(text.encode() + b"".join(p.read_bytes() for p in sources)).hexdigest()[:20]
        folder = Path(
            os.environ.get("JAXNORM_TEST_BUILD_DIR", Path(tempfile.gettempdir()) / f"jaxnorm-simt-{os.getuid()}")
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        out = folder / f"{digest}.so"
        if out.exists():
            return out, None
        source = folder / f"{digest}.cc"
        source.write_text(text)
        temporary = folder / f"{digest}.{os.getpid()}.so"
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w", f"-I{HERE}",
                   f"-I{csrc_dir() / 'include'}", f"-I{csrc_dir() / 'kernels'}", str(source), "-o", str(temporary)]  # fmt: skip
        return out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    @staticmethod
    def _load(out: Path, process: subprocess.Popen | None) -> ctypes.CDLL:
        if process is not None:
            errors = process.communicate()[1]
            assert process.returncode == 0, f"g++ failed:\n{errors[:4000]}"
            os.replace(str(process.args[-1]), out)  # type: ignore[index]
        return ctypes.CDLL(str(out))

    def run(
        self,
        problem: Problem,
        plan: tuple[Launch, ...],
        operands: dict[str, np.ndarray],
        order: str = "forward",
        room: bool = True,
    ) -> dict[str, np.ndarray]:
        """The results of a plan by name. ``operands`` must hold every operand that the problem has. ``room``: for launches whose
        blocks meet; else those run that stand in for them."""
        buffers = {n: Guarded(v.shape, problem.dtype(n), v) for n, v in operands.items()}
        shared = {a for launch in plan for a, _ in launch.aliases}
        for launch in plan:
            if launch.meeting == 0 or (launch.meeting > 0) == room:
                self._launch(problem, launch, buffers, order)
        for name, buffer in buffers.items():
            buffer.check(name)
            if name in operands and name not in shared:
                same = np.atleast_1d(buffer.array).view(np.uint8) == np.atleast_1d(operands[name]).view(np.uint8)
                assert same.all(), f"{name}: an operand was written"
        return {n: b.array for n, b in buffers.items() if n not in operands}

    def _launch(self, problem: Problem, launch: Launch, buffers: dict[str, Guarded], order: str) -> None:
        temps = {name: (shape, kind) for name, shape, kind in launch.temps}
        aliases = {b: a for a, b in launch.aliases}
        for name in launch.outputs:
            if name in aliases and problem.has(name):
                buffers[name] = buffers[aliases[name]]
            elif name not in buffers and (name in temps or problem.has(name)):
                buffers[name] = Guarded(*(temps[name] if name in temps else (problem.shape(name), problem.dtype(name))))
        address = lambda n: ctypes.c_void_p(buffers[n].address if n in buffers else None)  # noqa: E731
        kinds = {"i32": ctypes.c_uint32, "i64": ctypes.c_uint64, "fp32": ctypes.c_float}
        values = [
            *map(address, launch.inputs),
            *(kinds[k](v) for _, k, v in launch.scalars),
            *map(address, launch.outputs),
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
        wave = wave_size(problem.target)
        index = self._index[wave][_instance(launch, problem.target)]
        cluster = dict(launch.constants).get("JN_CLUSTER", 0)
        assert not (cluster and launch.meeting > 0), "the blocks of a cluster meet as a cluster"
        status = self._library[wave].simt_run(
            index, *launch.grid[:2], launch.threads, launch.shared, ORDERS[order], cluster, launch.meeting, pointers
        )
        assert status == 0, f"{launch.kernel}: the kernel ended with status {status} (a negative one is a signal)"


def _piece(index: int, launch: Launch, target: str) -> str:
    """One instance of a kernel under a name of its own, and a function that calls it with an array of pointers to its arguments."""
    entry = launch.kernel.split(":")[1]
    defines = [m[2:].split("=", 1) for m in hip.macros(launch, target) if not m.startswith("-DJN_WAVE=")]
    types = ["void*"] * len(launch.inputs) + [_TYPES[k] for _, k, _ in launch.scalars] + ["void*"] * len(launch.outputs)
    arguments = ", ".join(f"*({t}*)a[{i}]" for i, t in enumerate(types))
    lines = [f"#define {n} {v}" for n, v in defines]
    lines += [f"#define {entry} instance_{index}", f'#include "{launch.kernel.split(":")[0]}"']
    lines += [f"#undef {entry}", *(f"#undef {n}" for n, _ in defines)]
    call = f"((void (*)({', '.join(types)}))instance_{index})({arguments})"
    return "\n".join(lines) + f"\nstatic void run_{index}(void** a) {{ {call}; }}\n"


def missing() -> str:
    """Why nothing can be built here; empty when it can."""
    return "" if shutil.which("g++") else "g++ was not found. Install a C++17 compiler"
