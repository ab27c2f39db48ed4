"""What a stage is: one kernel-sized step of an operator, described once for gradients, batching, sharding and kernels alike.

The dims of each operand and result are written as in einsum: ``"... n"`` is rows of features, ``"n"`` a vector over the features,
``"..."`` one value a row, ``"... h d"`` rows of heads. ``...`` stands for the leading dims, which are folded to rows M inside the
shard and nowhere else; the first operand has them. What may be sharded, and what that costs, follows from the dims:

    ...            any sharding: the rows are independent
    parallel_dims  independent, too (heads, channels in whole groups): the kernel runs on the shard
    feature_dims   the reference runs on the shard and sums its statistics over the axes
    all others     gathered
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class StageDef:
    """The code behind a stage. ``reference(call, operands, axes)`` is rank-polymorphic jnp; ``axes`` shard the features."""

    name: str
    op: str
    reference: Callable[[StageCall, Arrays, tuple[str, ...]], Arrays]
    plans: dict[str, str] = field(default_factory=dict)
    """Kernel backend -> module in ``jaxnorm.kernels.configs`` whose ``plan(problem)`` gives the launches."""


@dataclass(frozen=True)
class OpDef:
    """A public operator: what tests, benchmarks, doctor and the table in the README read."""

    name: str
    function: Callable[..., Any]
    forward: StageDef
    backward: StageDef | None = None


STAGES: dict[str, StageDef] = {}
OPS: dict[str, OpDef] = {}


def register_stage(stage: StageDef) -> StageDef:
    STAGES[stage.name] = stage
    return stage


def register_op(op: OpDef) -> OpDef:
    OPS[op.name] = op
    return op


@dataclass(frozen=True)
class StageCall:
    """One call of a stage with everything static; hashable, the parameter of the primitive."""

    stage: str
    op: str
    """The public operator, for messages and profiles."""
    operands: tuple[tuple[str, str], ...]
    """(name, dims) of the operands present, in order."""
    results: tuple[tuple[str, str, str], ...]
    """(name, dims, dtype) of the results wanted, in order."""
    sizes: tuple[tuple[str, int], ...]
    """Size of each named dim, that of the features first: global, but for the parallel dims of a shard."""
    options: tuple[tuple[str, Any], ...] = ()
    backend: str | None = None
    """Named by the caller, the context or the environment; None = choose."""
    backend_source: str = ""
    """Who named it."""
    targets: tuple[tuple[str, str], ...] = ()
    sums: tuple[tuple[str, str], ...] = ()
    """(result, dims): sums over these dims (``...`` = the rows), added up in float32 over the mesh axes that shard them."""
    feature_dims: tuple[str, ...] = ("n",)
    """Named dims that may be sharded at the price of a sum of statistics. One that no operand has (groups) follows the first."""
    group: int = 1
    """Features (of the first feature dim) that must stay on one shard together."""
    parallel_dims: tuple[tuple[str, int], ...] = ()
    """(named dim, how many of it must stay on one shard together) over which the computation is independent."""
    refused_dims: tuple[tuple[str, str], ...] = ()
    """(named dim, what to do instead): to gather it would be right, and never what its caller wants."""
    row_block: int = 1
    """Neighbouring rows that must stay on one shard together; 0 = all of them."""

    @property
    def definition(self) -> StageDef:
        return STAGES[self.stage]

    @property
    def features(self) -> int:
        return self.sizes[0][1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.operands)

    def size(self, dim: str) -> int:
        return dict(self.sizes)[dim]

    def option(self, name: str) -> Any:
        return dict(self.options)[name]

    def dtype(self, result: str) -> str:
        return next(dtype for name, _, dtype in self.results if name == result)

    def dims(self, name: str) -> tuple[str, ...]:
        for entry in (*self.operands, *self.results):
            if entry[0] == name:
                return tuple(entry[1].split())
        raise KeyError(name)

    def lead(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leading dims in the shape of the first operand."""
        dims = self.dims(self.names[0])
        at = dims.index("...")
        return shape[at : at + len(shape) - len(dims) + 1]

    def position(self, name: str, dim: str, ndim: int) -> int:
        """Where a named dim of an operand or result with ``ndim`` dims stands."""
        dims = self.dims(name)
        i = dims.index(dim)
        return i if "..." not in dims[:i] else ndim - len(dims) + i

    def on_shard(self, operands: Sequence[Any]) -> StageCall:
        """The same call with the sizes that the parallel dims have in these operands."""
        sizes = dict(self.sizes)
        for name, a in zip(self.names, operands, strict=True):
            for dim, _ in self.parallel_dims:
                if dim in self.dims(name):
                    sizes[dim] = a.shape[self.position(name, dim, len(a.shape))]
        return self if tuple(sizes.items()) == self.sizes else replace(self, sizes=tuple(sizes.items()))

    def result_shape(self, name: str, lead: tuple[int, ...]) -> tuple[int, ...]:
        shape: tuple[int, ...] = ()
        for d in self.dims(name):
            shape += lead if d == "..." else (self.size(d),)
        return shape

    def compute(self, operands: tuple[jax.Array, ...], axes: tuple[str, ...] = ()) -> tuple[jax.Array, ...]:
        """The reference, on operands with any leading dims."""
        with jax.numpy_rank_promotion("allow"):  # vectors broadcast over rows; a program may forbid that for itself
            out = self.definition.reference(self, dict(zip(self.names, operands, strict=True)), axes)
        return tuple(out[name] for name, _, _ in self.results)
