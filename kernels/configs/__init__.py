"""How a stage of an operator becomes kernel launches: pure Python, no triton, no jax.

A family module here (``rmsnorm``, ...) has one function per kernel language, ``triton(problem)`` and ``hip(problem)``, which
returns the tuple of :class:`Launch` that computes the stage or raises :class:`Unsupported` with the reason.

Two rules hold for every function here. The order of sums inside a row may depend on the features, dtypes, options and target
only, never on the number of rows (batch invariance). And the result is a function of the problem alone, so that the same
program gives the same bytes in every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Compute units (SMs) a persistent grid is sized for. By target, not by device: an exported program must not depend on the
# machine that exported it. Vendor figures: H100/H200 132, A100 108, MI300X 304, MI355X 256, MI250X 104 per die, RX 7900 XTX 96.
COMPUTE_UNITS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96}
# Shared memory (LDS) one workgroup may use, in bytes. gfx950 has 160 KiB, but more than 64 of it as dynamic memory of a module
# function is something HIP documents no attribute call for and nobody here could try.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8}


class Unsupported(Exception):
    """No kernel of this language serves the problem; the text is the reason a user reads in ``explain``."""


def wave_size(target: str) -> int:
    """Lanes of a wave: 64 on gfx9, 32 on gfx11 and NVIDIA."""
    return 64 if target.startswith("gfx9") else 32


def compute_units(target: str) -> int:
    return COMPUTE_UNITS.get(target, 128)


def shared_memory(target: str) -> int:
    return SHARED_MEMORY.get(target, (64 << 10) if target.startswith("gfx") else (99 << 10))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Problem:
    """One call of a stage on one shard, leading dims already folded to rows."""

    stage: str
    """``rmsnorm_fwd``, ``rmsnorm_bwd``, ..."""
    rows: int
    """M"""
    features: int
    """N, the real one; padded results are wider."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Shape of every operand and result that is present, by name."""
    dtypes: tuple[tuple[str, str], ...]
    """Dtype name of the same buffers."""
    options: tuple[tuple[str, object], ...]
    """Static options of the stage (``eps``, ``weight_offset``, ``cast``, ...)."""
    target: str
    """``gfx942``, ``sm_90``, ..."""

    def has(self, buffer: str) -> bool:
        return any(n == buffer for n, _ in self.dtypes)

    def shape(self, buffer: str) -> tuple[int, ...]:
        return dict(self.shapes)[buffer]

    def dtype(self, buffer: str) -> str:
        return dict(self.dtypes)[buffer]

    def option(self, name: str):
        return dict(self.options)[name]


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Kernel parameters come in the order: inputs, scalars, outputs (constexprs last in Triton)."""

    kernel: str
    """Triton: ``module:function`` in kernels/. HIP: ``file.hip:entry`` in csrc/kernels/, entry being extern "C"."""
    inputs: tuple[str, ...]
    """Buffers read. A name that the problem does not have is an absent optional operand: the kernel gets a pointer it must
    not read (null through the launcher)."""
    outputs: tuple[str, ...]
    """Buffers written; results of the stage or ``temps``. An absent name is handled as for inputs."""
    grid: tuple[int, int, int]
    constants: tuple[tuple[str, object], ...] = ()
    """Triton constexprs, or HIP ``-D`` macros; bool, int, float (exact), str or None."""
    scalars: tuple[tuple[str, str, int | float], ...] = ()
    """(parameter, ``i32`` | ``i64`` | ``fp32``, value) passed at run time."""
    num_warps: int = 4
    """Triton: warps (waves) of a program."""
    threads: int = 0
    """HIP: threads of a workgroup."""
    shared: int = 0
    """HIP: dynamic shared memory in bytes."""
    num_stages: int = 1
    options: tuple[tuple[str, object], ...] = ()
    """Further compiler options by name (``waves_per_eu``, ``maxnreg``)."""
    overlaps: bool = False
    """HIP, through the launcher, on NVIDIA from sm_90 on: the launch may begin before the one before it in the plan has ended. Its
    kernel reads nothing that a launch of the plan writes, and writes nothing, before ``wait_for_launch_before`` (gpu.h)."""
    temps: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    """(name, shape, dtype) of outputs that are scratch between the launches of one stage."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(input, output) that are one buffer: in place where the input is donated, a copy made before the launch where it is not.
    The kernel writes only part of such an output."""
    meeting: int = 0
    """Through the launcher, on NVIDIA. n > 0: all n blocks of the launch run at the same time and may wait for one another; it is
    left out where the device has no room for them. -n: the launch stands in for the one of n that it follows, directly or behind
    others of -n, and is there only where that one was left out. Both compute the same bits."""

    def __post_init__(self) -> None:
        if self.meeting > 0 and self.meeting != math.prod(self.grid):
            raise ValueError(
                f"{self.kernel}: meeting: got {self.meeting}, expected the {math.prod(self.grid)} blocks of the grid."
            )
        if self.meeting > 0 and self.overlaps:
            raise ValueError(f"{self.kernel}: overlaps: got True, expected False for a launch whose blocks meet.")

    def aliased(self, inputs=None, outputs=None) -> dict[int, int]:
        """``aliases`` as positions in these lists of buffers; without them, in all inputs and outputs."""
        inputs, outputs = list(inputs or self.inputs), list(outputs or self.outputs)
        return {inputs.index(a): outputs.index(b) for a, b in self.aliases if a in inputs and b in outputs}
