"""What the plans of the KV cache share: the parts of a call and what the kernels count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import ITEMSIZE, Problem, Unsupported
from ._heads import FLOATS, MAX_UNITS, POSITIONS, Part

WRITE, READ = "qk_norm_rope_cache_fwd", "kv_cache_gather"
MAX_SLOTS = (1 << 32) - 1
BUFFERS = ("k_cache", "v_cache", "k_scale", "v_scale")


@dataclass(frozen=True)
class Cache:
    """The cache of a shard: ``slots`` of ``heads`` kv heads; ``itemsize`` bytes an element, ``x`` of them 16 bytes."""

    layout: str
    quant: str | None
    dtype: str
    page: int
    slots: int
    heads: int

    @property
    def shuffled(self) -> bool:
        return self.layout == "shuffled"

    @property
    def itemsize(self) -> int:
        return 1 if self.quant else ITEMSIZE[self.dtype]

    @property
    def x(self) -> int:
        return 16 // self.itemsize


def cache(problem: Problem) -> Cache:
    """The cache of a problem.

    Raises:
      Unsupported: more slots than the kernels count.
    """
    g = problem.option("geometry")
    shape = problem.shape("k_cache")
    if g.slots > MAX_SLOTS:  # type: ignore[attr-defined]
        raise Unsupported(f"{g.slots} slots; the kernels count up to {MAX_SLOTS}.")  # type: ignore[attr-defined]
    heads = shape[2 if g.layout == "paged" else 1]  # type: ignore[attr-defined]
    return Cache(g.layout, g.quant, g.dtype, g.page_size, g.slots, heads)  # type: ignore[attr-defined]


def packed(problem: Problem) -> bool:
    return problem.has("qkv")


def parts(problem: Problem) -> list[Part]:
    """q, k and v; q has no heads where it is computed apart.

    Raises:
      Unsupported: no tokens, too many heads, or a dtype that the kernels do not read.
    """
    c, d = cache(problem), problem.features
    rotary = problem.shape("cos_sin")[-1]
    if packed(problem):
        dtypes = [problem.dtype("qkv")] * 3
        tokens, width = problem.shape("qkv")
        q_heads = width // d - 2 * c.heads
    else:
        there = problem.has("q")
        dtypes = [problem.dtype(n) for n in ("q" if there else "k", "k", "v")]
        tokens = math.prod(problem.shape("k")[:-2])
        q_heads = problem.shape("q")[-2] if there else 0
    if tokens < 1:
        raise Unsupported("there are no tokens to launch a kernel for.")
    found = [
        Part(name, heads, tokens, dtype, turned)
        for name, heads, dtype, turned in zip(
            "qkv", (q_heads, c.heads, c.heads), dtypes, (rotary, rotary, d), strict=True
        )
    ]
    if sum(p.heads for p in found) * tokens > MAX_UNITS:
        raise Unsupported(
            f"{tokens} tokens of {sum(p.heads for p in found)} heads; the kernels count up to {MAX_UNITS}."
        )
    for name in ("qkv", "q", "k", "v", "q_weight", "k_weight", "cos_sin"):
        if problem.has(name) and problem.dtype(name) not in FLOATS:
            raise Unsupported(f"{name} is {problem.dtype(name)}; the kernels read {', '.join(FLOATS)}.")
    for name in ("positions", "slots"):
        if problem.dtype(name) not in POSITIONS:
            raise Unsupported(f"{name} are {problem.dtype(name)}; the kernels read {', '.join(POSITIONS)}.")
    return found


def aliases(problem: Problem) -> tuple[tuple[str, str], ...]:
    """The cache's buffers, which the kernel writes in place."""
    return tuple((n, f"{n}_out") for n in BUFFERS if problem.has(f"{n}_out"))
