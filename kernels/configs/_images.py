"""GroupNorm's problem as its planners see it, whatever the kernel language."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Self

from . import Problem


@dataclass(frozen=True)
class Images:
    """``batch`` images of ``space`` positions and ``channels`` channels, ``group`` channels to a group."""

    problem: Problem
    last: bool
    """Channels last, ``[batch, space, channels]``, else first."""
    batch: int
    space: int
    channels: int
    group: int

    @classmethod
    def of(cls, problem: Problem) -> Self:
        shape, last, group = problem.shape("x"), bool(problem.option("last")), problem.option("group_channels")
        space, channels = (prod(shape[1:-1]), shape[-1]) if last else (prod(shape[2:]), shape[1])
        assert isinstance(group, int)
        return cls(problem, last, problem.rows, space, channels, group)

    @property
    def groups(self) -> int:
        """Groups of an image."""
        return self.channels // self.group
