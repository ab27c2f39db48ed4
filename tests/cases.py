"""Named workloads and data, one list for tests, benchmarks and tuning. Pure Python and numpy: importing it loads no jax.

Model figures are recalled from the public configurations of the models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

BF16, F16, F32 = "bfloat16", "float16", "float32"
FLOATS = (BF16, F16, F32)


def dtype(name: str) -> np.dtype:
    """numpy dtype of a name, bfloat16 and float8 included."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


@dataclass(frozen=True)
class Workload:
    """One norm as a model calls it."""

    name: str
    features: int
    """N"""
    rows: int = 128
    """M; benchmarks sweep :data:`BENCH_ROWS` instead."""
    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: str = "output"
    pad_to_multiple: int | None = None
    x_dtype: str = BF16
    weight_dtype: str | None = BF16
    """None: no weight."""
    residual_dtype: str | None = None
    """None: the op without a residual; else ``add_rmsnorm`` with a residual of this dtype."""
    residual_rounding: str = "float32"
    out_dtype: str | None = None
    lead: tuple[int, ...] | None = None
    """Leading dims; None: ``(rows,)``."""

    @property
    def op(self) -> str:
        return "rmsnorm" if self.residual_dtype is None else "add_rmsnorm"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*((self.rows,) if self.lead is None else self.lead), self.features)

    @property
    def padded(self) -> int:
        p = self.pad_to_multiple or 1
        return -(-self.features // p) * p

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of the public function, dtypes by name."""
        named: dict[str, object] = {"eps": self.eps, "weight_offset": self.weight_offset, "cast": self.cast}
        if self.residual_dtype is not None:
            named["residual_rounding"] = self.residual_rounding
        if self.out_dtype is not None:
            named["out_dtype"] = self.out_dtype
        if self.pad_to_multiple is not None:
            named["pad_to_multiple"] = self.pad_to_multiple
        return named

    @property
    def id(self) -> str:
        short = {BF16: "bf16", F16: "f16", F32: "f32", None: "none"}
        parts = [self.op, self.name, "x".join(map(str, self.shape)), short[self.x_dtype], short[self.weight_dtype]]
        parts += [f"res-{short[self.residual_dtype]}"] if self.residual_dtype else []
        parts += [f"off{self.weight_offset:g}"] if self.weight_offset else []
        parts += ["t5"] if self.cast == "before_weight" else []
        parts += ["input"] if self.residual_dtype and self.residual_rounding == "input" else []
        parts += [f"out-{short[self.out_dtype]}"] if self.out_dtype else []
        parts += [f"pad{self.pad_to_multiple}"] if self.pad_to_multiple else []
        return "-".join(parts)

    def with_residual(self, residual_dtype: str | None = None) -> Workload:
        """The same as ``add_rmsnorm``; the residual in x's dtype unless said otherwise."""
        return replace(self, residual_dtype=residual_dtype or self.x_dtype)


# --- after models
MODELS: tuple[Workload, ...] = (
    Workload("llama3-8b", 4096, eps=1e-5),
    Workload("llama3-70b", 8192, eps=1e-5),
    Workload("qwen3-0.6b", 1024),
    Workload("qwen3-8b", 4096),
    Workload("qwen3-32b", 5120),
    Workload("deepseek-v3", 7168),
    Workload("deepseek-v3-q-lora", 1536),
    Workload("deepseek-v3-kv-lora", 512),
    Workload("gpt-oss", 2880, eps=1e-5, pad_to_multiple=256),
    Workload("gemma3-1b", 1152, weight_offset=1.0, weight_dtype=F32),
    Workload("gemma3-4b", 2560, weight_offset=1.0, weight_dtype=F32),
    Workload("gemma3-12b", 3840, weight_offset=1.0, weight_dtype=F32),
    Workload("gemma3-27b", 5376, weight_offset=1.0, weight_dtype=F32),
    Workload("t5-small", 512, cast="before_weight"),
    Workload("t5-base", 768, cast="before_weight"),
    Workload("t5-xxl", 4096, cast="before_weight"),
    Workload("head-norm", 128, rows=8192 * 32),
)


def model(name: str) -> Workload:
    return next(w for w in MODELS if w.name == name)


# --- edges
ODD_FEATURES = (1, 2, 3, 7, 10, 31, 97, 127, 409, 769, 1245, 3571, 5125, 31744, 65536, 89999, 131072)
BACKWARD_FEATURES_MAX = 65536
ROWS = (0, 1, 2, 3, 7, 16, 33, 128, 173, 256, 1000, 4096, 8192, 32768)
LEADING = ((), (3,), (2, 3, 5), (0, 4), (0,))
DTYPE_PAIRS = tuple((x, w) for x in FLOATS for w in FLOATS)

# --- benchmarks
BENCH_ROWS = (1, 16, 128, 1024, 8192, 32768)
BENCH_FEATURES = (1024, 2880, 4096, 5120, 7168, 8192, 16384)

# --- GPU only: more than 2^31 and 2^32 elements, and more than 2^24 rows
HUGE = ((262145, 8192), (524289, 8192), (16777217, 128))


def huge_rows(rows: int, features: int) -> tuple[int, ...]:
    """Rows to compare in a huge array: first, last, and both sides of element 2^31 and 2^32."""
    picked = {0, rows - 1}
    for limit in (1 << 31, 1 << 32):
        row = limit // features
        picked |= {r for r in (row - 1, row, row + 1) if 0 <= r < rows}
    return tuple(sorted(picked))


def bench_workloads(op: str = "rmsnorm") -> Iterator[Workload]:
    """The benchmark grid, bf16, rows x features."""
    for features in BENCH_FEATURES:
        for rows in BENCH_ROWS:
            work = Workload("bench", features, rows=rows)
            yield work if op == "rmsnorm" else work.with_residual()


def dtype_workloads() -> Iterator[Workload]:
    """All nine pairs of x and weight; the residual in x's dtype and in float32."""
    for x, w in DTYPE_PAIRS:
        base = Workload("dtypes", 83, rows=7, x_dtype=x, weight_dtype=w, weight_offset=1.0)
        yield base
        for r in dict.fromkeys((x, F32, BF16)):
            yield base.with_residual(r)


def option_workloads() -> Iterator[Workload]:
    """Casts, roundings, result dtypes, padding and a missing weight, in every x dtype."""
    for x in FLOATS:
        base = Workload("options", 100, rows=7, x_dtype=x, weight_dtype=BF16, weight_offset=0.5)
        add = base.with_residual()
        yield replace(base, cast="before_weight")
        yield replace(base, pad_to_multiple=64)
        yield replace(base, pad_to_multiple=100)
        yield replace(base, weight_dtype=None, weight_offset=0.0)
        yield replace(add, weight_dtype=None, weight_offset=0.0, residual_dtype=F32)
        yield replace(add, residual_rounding="input")
        yield replace(add, residual_rounding="input", cast="before_weight")
        yield replace(add, cast="before_weight", residual_dtype=F32)
        yield replace(add, residual_rounding="input", residual_dtype=F16, pad_to_multiple=128)
        for out in FLOATS:
            if out != x:
                yield replace(base, out_dtype=out)
                yield replace(add, out_dtype=out, pad_to_multiple=16, cast="before_weight")


def shape_workloads(max_features: int = 131072) -> Iterator[Workload]:
    """Odd and prime N, few rows; leading dims of every rank."""
    for features in ODD_FEATURES:
        if features <= max_features:
            rows = 5 if features < 10000 else 3
            x = FLOATS[features % 3]
            base = Workload("odd", features, rows=rows, x_dtype=x, weight_dtype=F32, weight_offset=1.0)
            yield base
            if features < 10000:
                yield base.with_residual()
    for lead in LEADING:
        base = Workload("lead", 33, lead=lead, weight_dtype=F32)
        yield base
        yield base.with_residual()
        yield replace(base, pad_to_multiple=32)


def gpu_workloads() -> Iterator[Workload]:
    """What runs with compiled kernels: every dtype pair on an aligned and on an odd N, the options, models, and edges."""
    for i, (x, w) in enumerate(DTYPE_PAIRS):
        base = Workload("dtypes", 1024, rows=33, x_dtype=x, weight_dtype=w, weight_offset=1.0)
        yield base if i % 2 else base.with_residual(FLOATS[i % 3])
        odd = Workload("odd-dtypes", 769, rows=7, x_dtype=x, weight_dtype=w)
        yield odd.with_residual(F32) if i % 2 else odd
    for x in (BF16, F16):
        base = Workload("options", 1000, rows=16, x_dtype=x, weight_dtype=BF16, weight_offset=0.5)
        add = base.with_residual()
        yield replace(base, cast="before_weight")
        yield replace(base, pad_to_multiple=256, out_dtype=F32)
        yield replace(add, weight_dtype=None, weight_offset=0.0, pad_to_multiple=7)
        yield replace(add, residual_rounding="input", cast="before_weight", residual_dtype=F32 if x == BF16 else BF16)
    for name in ("llama3-70b", "qwen3-8b", "gpt-oss", "gemma3-1b", "gemma3-27b", "t5-small"):
        yield replace(model(name), rows=173)
    for name in ("llama3-8b", "deepseek-v3", "gemma3-4b"):
        yield replace(model(name), rows=128).with_residual()
    for features in (1, 2, 3, 7, 31, 97, 409, 3571, 5125, 31744):
        base = Workload("odd", features, rows=9, x_dtype=FLOATS[features % 3], weight_dtype=F32, weight_offset=1.0)
        yield base.with_residual(BF16) if features % 2 else base
    for lead in ((), (2, 3, 5), (0, 4), (1,)):
        yield Workload("lead", 128, lead=lead, weight_dtype=F32).with_residual()
    yield Workload("head-norm", 128, rows=100003)
    yield Workload("tall", 512, rows=66000, x_dtype=F32, weight_dtype=F32).with_residual()


# --- data
def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([20260, seed])


def normal(
    generator: np.random.Generator, shape: tuple[int, ...], dtype_name: str, *, std: float = 1.0, mean: float = 0.0
) -> np.ndarray:
    return (generator.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)).astype(
        dtype(dtype_name)
    )


def weight(generator: np.random.Generator, features: int, dtype_name: str | None) -> np.ndarray | None:
    """Random and non-unit, of both signs."""
    if dtype_name is None:
        return None
    values = generator.uniform(0.5, 1.5, features) * np.where(generator.random(features) < 0.25, -1.0, 1.0)
    return values.astype(dtype(dtype_name))


def arrays(work: Workload, seed: int = 0) -> tuple[np.ndarray | None, ...]:
    """``(x, weight)`` or ``(x, residual, weight)`` of a workload."""
    g = rng(seed)
    x = normal(g, work.shape, work.x_dtype, std=1.7)
    w = weight(g, work.features, work.weight_dtype)
    if work.residual_dtype is None:
        return x, w
    return x, normal(g, work.shape, work.residual_dtype, std=2.5), w


SPECIAL_ROWS = ("normal", "zeros", "tiny", "nan", "inf", "outlier", "constant", "huge", "normal2")


def special_rows(features: int, dtype_name: str, seed: int = 0) -> np.ndarray:
    """One row for each name of :data:`SPECIAL_ROWS`.

    ``tiny`` is 1e-40 (zero in float16), ``outlier`` has one element of 1e4, and the squares of ``huge`` sum to about a quarter
    of the largest float32 (float16: every element near its own maximum).
    """
    g = rng(seed)
    x = g.standard_normal((len(SPECIAL_ROWS), features))
    row = SPECIAL_ROWS.index
    x[row("zeros")] = 0.0
    x[row("tiny")] = 1e-40
    x[row("nan"), features // 2] = np.nan
    x[row("inf"), features // 3] = np.inf
    x[row("outlier"), features - 1] = 1e4
    x[row("constant")] = 3.25
    largest = 6e4 if dtype_name == F16 else 0.5 * float(np.sqrt(3.4e38 / features))
    x[row("huge")] = np.sign(x[row("huge")]) * largest
    return x.astype(dtype(dtype_name))
