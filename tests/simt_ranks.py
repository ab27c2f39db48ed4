"""The fused distributed kernels on CPU threads: one operating-system thread a rank, each with fibers for the threads of a block.

Shows the logic: epochs, phases, indices, failures. It shows nothing about a GPU's memory order: x86 has a strict one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxnorm.kernels.configs import Launch, Problem, distributed_hip, wave_size
from simt_build import HERE, Guarded

from jaxnorm._compile import hip
from jaxnorm._paths import csrc_dir

BUFFERS = ("x", "residual", "weight", "values", "scale", "residual_out")
_HEAD = """
#define JN_SIMT 1
#define JN_WAVE {wave}
#include "simt.h"
#include <sys/wait.h>
#include <unistd.h>
#include "jaxnorm/distributed.h"
struct Args {{
  char* buffer[6];
  jaxnorm::Peers peers;
  unsigned* error;
  unsigned long long half_bytes, patience;
  unsigned rows, share, rank, signature, blocks, index, threads, bytes, delay_us, order;
}};
"""
_TAIL = """
typedef void (*Runner)(const Args&);
static const Runner runners[] = {{ {runners} }};
extern "C" int ranks_run(int ranks, int calls, const Args* all, unsigned limit_s) {{
  const pid_t child = fork();
  if (child == 0) {{
    alarm(limit_s);
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r)
      threads.emplace_back([=] {{
        simt::wave = JN_WAVE;
        for (int c = 0; c < calls; ++c) {{
          const Args& a = all[r * calls + c];
          if (a.blocks == 0) continue;  // this rank skips the call
          std::this_thread::sleep_for(std::chrono::microseconds(a.delay_us));
          simt::launch({{a.blocks, 1}}, int(a.threads), a.bytes, simt::Order(a.order), [&a] {{ runners[a.index](a); }});
        }}
      }});
    for (auto& t : threads) t.join();
    _exit(0);
  }}
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}}
"""
_CALL = """
static void run_{i}(const Args& a) {{
  instance_{i}(a.buffer[0], a.buffer[1], a.buffer[2], a.buffer[3], a.buffer[4], a.buffer[5], a.peers, a.error, a.half_bytes,
               a.patience, a.rows, a.share, a.rank, a.signature, a.blocks);
}}
"""


class Args(ctypes.Structure):
    _fields_ = [
        ("buffer", ctypes.c_void_p * 6), ("peers", ctypes.c_void_p * 8), ("error", ctypes.c_void_p),
        ("half_bytes", ctypes.c_uint64), ("patience", ctypes.c_uint64),
        *((n, ctypes.c_uint32) for n in ("rows", "share", "rank", "signature", "blocks", "index", "threads", "bytes", "delay_us",
                                         "order")),
    ]  # fmt: skip


def problem(target: str, rows: int, features: int, dtypes: dict[str, str], **options) -> Problem:
    """``dtypes``: of x and, where they are there, residual and weight."""
    known = {"gather": True, "replicated": False, "spec": None, "eps": 1e-6, "weight_offset": 0.0, "cast": "output"}
    if "residual" in dtypes:
        dtypes = {**dtypes, "residual_out": dtypes["residual"]}
    return Problem(
        distributed_hip.STAGE, rows, features, (), tuple(dtypes.items()), tuple((known | options).items()), target
    )


def _instances(target: str, launches: list[Launch]) -> str:
    """The kernels as instance_0, instance_1, ..."""
    text = _HEAD.format(wave=wave_size(target))
    for i, launch in enumerate(launches):
        defines = [m[2:].split("=", 1) for m in hip.macros(launch, target) if not m.startswith("-DJN_WAVE=")]
        text += "".join(f"#define {n} {v}\n" for n, v in defines)
        text += f'#define rank_norm_fwd instance_{i}\n#include "{distributed_hip.SOURCE}"\n#undef rank_norm_fwd\n'
        text += "".join(f"#undef {n}\n" for n, _ in defines)
    return text


def build(target: str, launches: list[Launch]) -> ctypes.CDLL:
    """All instances in one library; the index of a launch is its place in the list."""
    text = _instances(target, launches) + "".join(_CALL.format(i=i) for i in range(len(launches)))
    text += _TAIL.format(runners=", ".join(f"run_{i}" for i in range(len(launches))))
    return ctypes.CDLL(str(_compile("ranks", text)))


def fake_driver(target: str, launches: list[Launch]) -> Path:
    """A ``libcuda.so.1`` in a folder of its own, whose launches run these kernels (simt/fake_peer_driver.h)."""
    types = ["char*"] * 6 + ["jaxnorm::Peers", "unsigned*", *["unsigned long long"] * 2, *["unsigned"] * 5]
    call = ", ".join(f"*({t}*)p[{i}]" for i, t in enumerate(types))
    cases = "".join(f"  if (index == {i}) instance_{i}({call});\n" for i in range(len(launches)))
    text = _instances(target, launches) + f"static void run_kernel(int index, void** p) {{\n{cases}}}\n"
    library = _compile("driver", text + '#include "fake_peer_driver.h"\n')
    folder = library.with_suffix("")
    folder.mkdir(exist_ok=True)
    if not (folder / "libcuda.so.1").exists():
        (folder / "libcuda.so.1").symlink_to(library)
    return folder


def _compile(name: str, text: str) -> Path:
    sources = [*sorted((csrc_dir() / "include").rglob("*.h")), csrc_dir() / "kernels" / distributed_hip.SOURCE,
               *sorted(HERE.glob("*.h"))]  # fmt: skip
    digest = hashlib.sha256(text.encode() + b"".join(p.read_bytes() for p in sources)).hexdigest()[:20]
    folder = Path(os.environ.get("JAXNORM_TEST_BUILD_DIR", Path(tempfile.gettempdir()) / f"jaxnorm-simt-{os.getuid()}"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    out = folder / f"{name}-{digest}.so"
    if not out.exists():
        source, temporary = folder / f"{name}-{digest}.cc", folder / f"{name}-{digest}.{os.getpid()}.so"
        source.write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w", "-pthread",
                   f"-I{HERE}", f"-I{csrc_dir() / 'include'}", f"-I{csrc_dir() / 'kernels'}", str(source), "-o",
                   str(temporary)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"g++ failed:\n{done.stderr[:4000]}"
        os.replace(temporary, out)
    return out


@dataclass
class Step:
    """One call on every rank: what each rank passes, and how its launch looks there."""

    problem: Problem
    launch: Launch
    index: int
    operands: list[dict[str, np.ndarray]]
    signature: int = 7
    blocks: int | None = None
    delays_us: tuple[int, ...] = ()
    order: int = 0
    absent: tuple[int, ...] = ()
    signatures: dict[int, int] = field(default_factory=dict)


class Group:
    """Workspaces and error words of some ranks, kept from call to call."""

    def __init__(self, ranks: int, half_bytes: int) -> None:
        self.ranks, self.half_bytes = ranks, half_bytes
        header = -(-distributed_hip.HEADER_BYTES // 1024) * 1024
        self.spaces = [Guarded((header + 2 * half_bytes,), "uint8") for _ in range(ranks)]
        self.errors = [Guarded((1,), "int32", np.zeros(1, np.int32)) for _ in range(ranks)]
        for space in self.spaces:
            space.array[:header] = 0  # the halves stay 0xFF, which reads as NaN

    def header(self, rank: int) -> np.ndarray:
        """epoch, done, dead"""
        return self.spaces[rank].array[:12].view(np.uint32)

    def run(
        self,
        library: ctypes.CDLL,
        steps: list[Step],
        shapes,
        *,
        patience_s: float = 20.0,
        cleared: bool = False,
        limit_s: int = 60,
    ) -> list[list[dict[str, np.ndarray]]]:
        """Results by name of every step and rank; a rank goes on to its next call as soon as it can.

        ``shapes(step, rank)`` gives (shape, dtype) of every result by name. ``cleared``: results hold zeros before, not NaN.
        """
        args = (Args * (self.ranks * len(steps)))()
        kept, results = [], []
        for c, step in enumerate(steps):
            mine = []
            for r in range(self.ranks):
                a = args[r * len(steps) + c]
                held = {n: Guarded(v.shape, v.dtype.name, v) for n, v in step.operands[r].items()}
                held |= {n: Guarded(shape, kind) for n, (shape, kind) in shapes(step, r).items()}
                for n in shapes(step, r) if cleared else ():
                    held[n].array[...] = 0
                kept.append((held, step.operands[r]))
                for i, name in enumerate(BUFFERS):
                    a.buffer[i] = held[name].address if name in held else None
                for d in range(self.ranks):
                    a.peers[d] = self.spaces[(r + d) % self.ranks].address
                a.error, a.half_bytes, a.patience = self.errors[r].address, self.half_bytes, int(patience_s * 1e9)
                scalars = {n: v for n, _, v in step.launch.scalars}
                a.rows, a.share, a.rank = scalars["rows"], scalars["share"], r
                a.signature, a.index = step.signatures.get(r, step.signature), step.index
                a.blocks = 0 if r in step.absent else (step.blocks or step.launch.grid[0])
                a.threads, a.bytes, a.order = step.launch.threads, step.launch.shared, step.order
                a.delay_us = step.delays_us[r] if step.delays_us else 0
                mine.append({n: held[n].array for n in shapes(step, r)})
            results.append(mine)
        status = library.ranks_run(self.ranks, len(steps), args, limit_s)
        assert status == 0, f"the ranks ended with status {status} (-14: they hung)"
        for held, operands in kept:
            for name, buffer in held.items():
                buffer.check(name)
                if name in operands:
                    assert (buffer.array.view(np.uint8) == operands[name].view(np.uint8)).all(), (
                        f"{name}: an operand was written"
                    )
        for space in self.spaces:
            space.check("workspace")
        return results
