"""What the plans of the kernels on heads share: the tokens and heads of a problem, how a head is spread over lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import ITEMSIZE, Problem, Unsupported, next_power_of_2, wave_size

MAX_UNITS = (1 << 31) - 1  # tokens times heads are counted in 32 bits
FLOATS = ("float32", "bfloat16", "float16")
POSITIONS = ("int32", "int64")


@dataclass(frozen=True)
class Part:
    """One array of heads, ``[tokens, heads, D]``."""

    name: str
    heads: int
    tokens: int
    dtype: str
    rotary: int


def parts(problem: Problem) -> list[Part]:
    """The arrays that a launch works on, in the order of the kernel's parts.

    Raises:
      Unsupported: no heads, too many, or a dtype that the kernels do not read.
    """
    two = "two_stream" in problem.stage
    names = ["q0", "k0", "q1", "k1"] if two else sorted(
        (n for n, _ in problem.dtypes if n[0] == "x"), key=lambda n: int(n[1:]))  # fmt: skip
    found = []
    for name in names:
        shape = problem.shape(name)
        table = f"cos_sin{name[1]}" if two else "cos_sin"
        found.append(Part(name, shape[-2], math.prod(shape[:-2]), problem.dtype(name), problem.shape(table)[-1]))
    for part in found:
        if not isinstance(part.tokens, int):
            raise Unsupported(
                f"the number of tokens is symbolic ({part.tokens}), and a kernel is launched for a known number."
            )
        if part.heads < 1 or part.tokens < 1:
            raise Unsupported("there are no heads to launch a kernel for.")
        if part.heads * part.tokens > MAX_UNITS:
            raise Unsupported(f"{part.tokens} tokens of {part.heads} heads; the kernels count up to {MAX_UNITS} heads.")
    for name, dtype in problem.dtypes:
        if dtype not in (POSITIONS if name == "positions" else FLOATS):
            raise Unsupported(f"{name} is {dtype}; the kernels read and write {', '.join(FLOATS)}.")
    return found


def gptj(problem: Problem) -> bool:
    return problem.option("style") == "gptj"


def vector(problem: Problem, part: Part) -> int:
    """Elements of a chunk (heads.h): 16 bytes, less where the two chunks of an item would not hold the same pairs."""
    d, v = problem.features, 16 // ITEMSIZE[part.dtype]
    while d % (2 * v) or ((part.rotary % v) if gptj(problem) else (part.rotary // 2) % v):
        v //= 2
        if v == 1:
            break
    return v


def lanes(problem: Problem, part: Part) -> int:
    """Lanes of a head, by D, dtype and target alone: the order of its sum hangs on it."""
    items = problem.features // (2 * vector(problem, part))
    return min(wave_size(problem.target), next_power_of_2(items))


def lane_elements(problem: Problem, part: Part) -> int:
    """Elements of a head that a lane holds."""
    v = vector(problem, part)
    return -(-(problem.features // (2 * v)) // lanes(problem, part)) * 2 * v


def shared_positions(problem: Problem) -> bool:
    """Whether the positions of one sequence serve all."""
    return (
        problem.has("x0")
        and len(problem.shape("x0")) == 4
        and len(problem.shape("positions")) == (2 if problem.option("sections") else 1)
    )


def unroll(heads: int, most: int) -> int:
    """Heads of a token that a group takes at once: at most ``most``, with less than a sixth of them past the last head."""
    return next(u for u in range(min(most, heads), 0, -1) if -(-heads // u) * u * 6 < heads * 7)


ONE, TWO = "qk_norm_rope", "qk_norm_rope_two_stream"


def qk_parts(problem: Problem) -> list[Part]:
    """The parts of a q/k norm stage: q and k, of one stream or two."""
    if problem.stage.removesuffix("_fwd").removesuffix("_bwd") not in (ONE, TWO):
        raise Unsupported(f"{problem.stage} is no stage of the q/k norm kernels.")
    found = parts(problem)
    if len(found) > 2 and not two_stream(problem):
        raise Unsupported(f"{len(found)} arrays; the kernels norm q and k.")
    return found


def two_stream(problem: Problem) -> bool:
    return TWO in problem.stage


def weights(problem: Problem, found: list[Part]) -> list[str]:
    """Names of the parts' weights."""
    return [f"{p.name[0]}_weight{p.name[1]}" if two_stream(problem) else f"w{p.name[1:]}" for p in found]


def shares(found: list[Part], most: list[int], total: int) -> list[int]:
    """Blocks of a persistent grid for each part: ``total`` of them dealt out by the parts' heads, at least one and at most ``most``
    each."""
    work = [p.tokens * p.heads for p in found]
    each = [max(1, min(m, total * w // sum(work))) for m, w in zip(most, work, strict=True)]
    left = total - sum(each)
    big = max(range(len(found)), key=lambda i: work[i])
    each[big] = max(1, min(most[big], each[big] + left))
    return each
