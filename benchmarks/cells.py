"""What is measured: operators, shapes, the least traffic of each, and the order in which a short run takes them."""

from __future__ import annotations

import dataclasses

MIB = 1 << 20
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
EPS = 1e-6

FORWARD_OPS = ("rmsnorm", "add_rmsnorm")
BACKWARD_OPS = ("rmsnorm_bwd", "add_rmsnorm_bwd")
TRAIN_OPS = ("rmsnorm_fwdbwd", "rmsnorm_valgrad")
OPS = FORWARD_OPS + BACKWARD_OPS + TRAIN_OPS

# Passes over an [M, N] array: each input read once, each output written once. value_and_grad of sum(y * y) / 2 can be done with
# two reads of x and one write.
PASSES = {
    "rmsnorm": 2, "add_rmsnorm": 4, "rmsnorm_bwd": 3, "add_rmsnorm_bwd": 4, "rmsnorm_fwdbwd": 4, "rmsnorm_valgrad": 3,
}  # fmt: skip
# [M, N] inputs by name; every op also reads the weight.
INPUTS = {
    "rmsnorm": ("x",),
    "add_rmsnorm": ("x", "residual"),
    "rmsnorm_bwd": ("x", "dy"),
    "add_rmsnorm_bwd": ("x", "residual", "dy", "dresidual_out"),
    "rmsnorm_fwdbwd": ("x", "dy"),
    "rmsnorm_valgrad": ("x",),
}
OUTPUTS = {
    "rmsnorm": ("y",),
    "add_rmsnorm": ("y", "residual_out"),
    "rmsnorm_bwd": ("dx", "dweight"),
    "add_rmsnorm_bwd": ("dx", "dweight"),
    "rmsnorm_fwdbwd": ("y", "dx", "dweight"),
    "rmsnorm_valgrad": ("loss", "dx", "dweight"),
}

_FORWARD = [(m, n) for m in (1, 16, 128, 1024, 8192, 32768) for n in (4096, 8192, 16384)]
_FORWARD += [(8192, 2048), (131072, 1024), (4096, 65536)]
_BACKWARD = [(1024, 4096), (1024, 8192), (8192, 4096), (8192, 8192), (8192, 16384), (32768, 4096), (32768, 8192)]
_BACKWARD += [(131072, 1024), (4096, 65536)]
SHAPES = {op: _FORWARD if op in FORWARD_OPS else _BACKWARD for op in OPS}
# The cells that say most, first; a run that is cut short has these.
_QUICK = [(8192, 8192), (1, 4096), (16, 8192), (1024, 8192), (8192, 4096), (131072, 1024), (8192, 16384)]


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    op: str
    rows: int
    features: int
    dtype: str = "bfloat16"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.features}"

    @property
    def key(self) -> str:
        return self.shape if self.dtype == "bfloat16" else f"{self.shape}/{self.dtype}"

    @property
    def bytes(self) -> int:
        """Least traffic: the passes over [M, N], the weight once."""
        size = ITEMSIZE[self.dtype]
        return (PASSES[self.op] * self.rows + 1) * self.features * size

    @property
    def input_bytes(self) -> int:
        return len(INPUTS[self.op]) * self.rows * self.features * ITEMSIZE[self.dtype]

    @property
    def is_decode(self) -> bool:
        return self.rows <= 16

    @property
    def is_large(self) -> bool:
        """The sizes at which an operator must reach the speed of a copy."""
        return self.bytes > 64 * MIB

    @property
    def is_forward(self) -> bool:
        return self.op in FORWARD_OPS


def parse_shape(text: str) -> tuple[int, int]:
    """``8192x4096`` -> (8192, 4096)."""
    rows, _, features = text.partition("x")
    if not (rows.isdigit() and features.isdigit()):
        raise ValueError(f"cells: got {text!r}, expected ROWSxFEATURES or one of {', '.join(GROUPS)}")
    return int(rows), int(features)


def _table(op: str) -> list[tuple[int, int]]:
    quick = [s for s in _QUICK if s in SHAPES[op]]
    rest = [s for s in SHAPES[op] if s not in quick]
    return quick + sorted(rest, key=lambda s: (s[0] * s[1] >= 1 << 28, s[0] > 16, s[0] * s[1]))


GROUPS = {
    "table": _table,
    "quick": lambda op: [s for s in _QUICK if s in SHAPES[op]],
    "decode": lambda op: [s for s in _table(op) if s[0] <= 16],
    "large": lambda op: [s for s in _table(op) if Cell(op, *s).is_large],
}


def select(ops: str | list[str], group: str, dtype: str = "bfloat16") -> list[Cell]:
    """Cells of the ops in the order of measuring: the first cells of every op before the last of any.

    Args:
      ops: comma list, or a list.
      group: a name of GROUPS, or a comma list of ROWSxFEATURES.
    """
    names = ops.split(",") if isinstance(ops, str) else list(ops)
    unknown = [n for n in names if n not in OPS]
    if unknown:
        raise ValueError(f"ops: got {', '.join(unknown)}, expected some of {', '.join(OPS)}")
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(ITEMSIZE)}")
    ranked = []
    for op in names:
        shapes = GROUPS[group](op) if group in GROUPS else [parse_shape(s) for s in group.split(",")]
        quick = sum(s in _QUICK for s in shapes)
        ranked += [((i >= quick, i), Cell(op, *s, dtype)) for i, s in enumerate(shapes)]
    return [cell for _, cell in sorted(ranked, key=lambda e: (e[0][0], e[0][1], names.index(e[1].op)))]
