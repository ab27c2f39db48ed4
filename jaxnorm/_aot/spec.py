"""The calls to compile for: a JSON or TOML file, or the norms of a named model.

    [[calls]]
    op = "add_rmsnorm_quant"
    args = { x = "bfloat16[..., 4096]", residual = "bfloat16[..., 4096]", weight = "bfloat16[4096]" }
    options = { spec = { dtype = "fp8", group_size = 128 }, eps = 1e-5 }
    grad = false

``args`` are arrays, ``dtype[dims]`` (a list of them is a tuple; ``{KVCache = {...}}`` what ``KVCache.create`` gives for these
arguments; one that is left out is None), ``options`` everything else by the names of the public function. ``...`` stands for
leading dims. Their sizes never matter: code objects are made for every number of rows, unless ``rows`` names the only ones.
``grad`` adds the backward and what the forward saves for it, ``backend`` names one. The calls of ``jaxnorm.distributed`` need
``ranks``, the size of their mesh axis: of them the fused kernel is made, and the kernels between XLA's collectives.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._stage import OPS, STAGES, OpDef, StageDef
from .._types import QuantSpec
from ..errors import value_error
from ..kernels.configs import distributed_hip

TRACED_ROWS = 8
GATHER = "kv_cache_gather"
"""The stage of a method, which is no public function of its own."""
SCATTERED = "reduce_scatter_rmsnorm_quant_all_gather"
"""The distributed call whose residual stream is sharded."""
_ARRAY = re.compile(r"(\w+)\[\s*(.*?)\s*\]")
_KEYS = ("op", "args", "options", "grad", "backend", "rows", "ranks")
_AXIS = "ranks"


@dataclass(frozen=True)
class Call:
    """One call of a public function, without data."""

    op: str
    args: dict[str, Any] = field(hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    grad: bool = False
    backend: str | None = None
    rows: tuple[int, ...] = ()
    """The only numbers of rows to compile for; empty = all."""
    ranks: int = 0
    """Of a distributed call."""

    @property
    def counts(self) -> tuple[int, ...]:
        """``rows``, and those of a rank's share."""
        return tuple(sorted({*self.rows, *(-(-r // self.ranks) for r in self.rows)})) if self.ranks else self.rows

    @property
    def x64(self) -> bool:
        """Whether it has arrays of 64-bit numbers, which jax takes for others unless it is told."""
        return re.search(r"\b(?:u?int|float)64\[", json.dumps(self.args)) is not None

    def to_json(self) -> dict[str, Any]:
        """What :func:`parse` reads."""
        out: dict[str, Any] = {"op": self.op, "args": self.args}
        out |= {"options": self.options} if self.options else {}
        out |= {"grad": True} if self.grad else {}
        out |= {"backend": self.backend} if self.backend else {}
        out |= {"ranks": self.ranks} if self.ranks else {}
        return out | ({"rows": list(self.rows)} if self.rows else {})

    def functions(self) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """(function, abstract arguments) pairs to trace: the call, and with ``grad`` its gradients, with all cotangents and with
        that of the first result alone (the last block of a model has no other)."""
        public, arrays = operators()[self.op].function, {k: _argument(self.op, k, v) for k, v in self.args.items()}
        if self.ranks:
            return [(self._of_a_rank(public), (arrays,))]
        parameters = inspect.signature(public).parameters.values()
        absent = [p.name for p in parameters if p.default is p.empty and p.name not in (*arrays, *self.options)]
        arrays |= dict.fromkeys(absent)  # TOML has no null
        options = {k: _option(self.op, k, v) for k, v in self.options.items()}
        if self.backend:
            options["backend"] = self.backend

        def call(given: dict[str, Any]) -> Any:
            return public(**given, **options)

        if not self.grad:
            return [(call, (arrays,))]
        real = {k: a for k, a in arrays.items() if isinstance(a, jax.ShapeDtypeStruct | tuple) and _floating(a)}
        rest = {k: a for k, a in arrays.items() if k not in real}

        def pull(first_only: bool) -> Callable[..., Any]:
            def gradient(given: dict[str, Any], others: dict[str, Any]) -> Any:
                pick = (lambda out: jax.tree.leaves(out)[:1]) if first_only else jax.tree.leaves
                out, back = jax.vjp(lambda a: pick(call(a | others)), given)
                return back(out)

            return gradient

        return [(call, (arrays,)), (pull(False), (real, rest)), (pull(True), (real, rest))]

    def _of_a_rank(self, public: Callable[..., Any]) -> Callable[..., Any]:
        """What every rank of a mesh runs; with the whole operands, since sizes of leading dims do not matter."""
        mesh = jax.sharding.AbstractMesh((self.ranks,), (_AXIS,))
        options = {k: _option(self.op, k, v) for k, v in self.options.items()}
        options |= {
            "axis_name": _AXIS,
            "impl": "composite",
        }  # the kernels between the collectives; the fused one is known
        absent = {"weight": None} if "weight" not in self.args else {}

        def call(given: dict[str, Any]) -> Any:
            x, residual = given["x"], given.get("residual")
            if residual is not None and self.op == SCATTERED:
                given = given | {"residual": residual[: -(-x.shape[0] // self.ranks)]}
            return jax.tree.leaves(public(**given, **absent, **options))

        nothing = jax.sharding.PartitionSpec()
        return jax.shard_map(call, mesh=mesh, in_specs=nothing, out_specs=nothing, check_vma=False)


def operators() -> dict[str, OpDef]:
    """Every public operator by name; a family registers its own when it is first used."""
    import jaxnorm
    from jaxnorm import distributed

    for name in jaxnorm.__all__:
        getattr(jaxnorm, name)
    gather = OpDef(
        "KVCache.gather", lambda cache, slots, backend=None: cache.gather(slots, backend=backend), STAGES[GATHER]
    )
    ranks = StageDef(distributed_hip.STAGE, "", lambda *_: {}, {"hip": "distributed_hip"})
    fused = (OpDef(f.__name__, f, ranks) for f in (distributed.allreduce_add_rmsnorm, getattr(distributed, SCATTERED)))
    return OPS | {op.name: op for op in (gather, *fused)}


def load(path: Path) -> list[Call]:
    """The calls of a JSON or TOML file.

    Raises:
      ValueError: it is neither, or a call names what does not exist.
    """
    text = path.read_text()
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as e:
        raise value_error("aot", "--spec", f"{path}, which does not parse ({e})", "a JSON or TOML file") from None
    return parse(data)


def parse(data: Any) -> list[Call]:
    """``{"calls": [...]}`` or the list alone."""
    entries = data.get("calls") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise value_error("aot", "spec", type(entries).__name__, "a list of calls under 'calls'")
    return [_call(i, e) for i, e in enumerate(entries)]


def _call(index: int, entry: Any) -> Call:
    where = f"calls[{index}]"
    if not isinstance(entry, dict):
        raise value_error("aot", where, type(entry).__name__, f"a table with {', '.join(_KEYS)}")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise value_error("aot", where, unknown[0], f"one of {', '.join(_KEYS)}")
    if entry.get("op") not in operators():
        raise value_error("aot", f"{where}.op", repr(entry.get("op")), f"one of {', '.join(sorted(operators()))}")
    if entry.get("backend") not in (None, "hip", "triton"):
        raise value_error("aot", f"{where}.backend", repr(entry["backend"]), "'hip' or 'triton'")
    rows = entry.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(r, int) and r > 0 for r in rows):
        raise value_error("aot", f"{where}.rows", repr(rows), "a list of positive integers")
    ranks, fused = entry.get("ranks", 0), operators()[entry["op"]].forward.name == distributed_hip.STAGE
    if fused != (type(ranks) is int and ranks > 1):
        expected = "a number of ranks from 2 up" if fused else f"nothing: {entry['op']} is no distributed call"
        raise value_error("aot", f"{where}.ranks", repr(ranks), expected)
    call = Call(entry["op"], dict(entry.get("args", {})), dict(entry.get("options", {})), bool(entry.get("grad", False)),
                entry.get("backend"), tuple(rows), ranks)  # fmt: skip
    call.functions()  # the arguments parse
    return call


def _argument(op: str, name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(_argument(op, f"{name}[{i}]", v) for i, v in enumerate(value))
    if isinstance(value, dict) and list(value) == ["KVCache"]:
        return _cache(value["KVCache"])
    match = _ARRAY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise value_error("aot", f"{op}.args.{name}", repr(value), "an array such as 'bfloat16[..., 4096]'")
    shape: list[int] = []
    for dim in filter(None, (d.strip() for d in match[2].split(","))):
        if dim != "..." and not dim.isdigit():
            raise value_error("aot", f"{op}.args.{name}", repr(value), "dims that are numbers or ...")
        shape.append(TRACED_ROWS if dim == "..." else int(dim))
    try:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(match[1]))
    except TypeError:
        raise value_error("aot", f"{op}.args.{name}", match[1], "a dtype") from None


def _floating(a: Any) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(a))


def _cache(arguments: dict[str, Any]) -> Any:
    import jaxnorm

    return jax.eval_shape(lambda: jaxnorm.KVCache.create(**arguments))


def _option(op: str, name: str, value: Any) -> Any:
    if name == "spec":
        if not isinstance(value, dict):
            raise value_error("aot", f"{op}.options.spec", repr(value), "a table with the fields of QuantSpec")
        return QuantSpec(**value)
    if name.endswith("dtype") and isinstance(value, str):
        return np.dtype(jnp.dtype(value))
    return tuple(value) if isinstance(value, list) else value
