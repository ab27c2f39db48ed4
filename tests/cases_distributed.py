"""Distributed calls as data: inputs, the call under shard_map or pmap, and the numpy oracle of its results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_quant
import tolerances
from cases import dtype
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import distributed


@dataclass(frozen=True)
class Call:
    """One call over ``ranks`` ranks. ``kind``: scatter (reduce_scatter_rmsnorm_quant_all_gather) or allreduce."""

    rows: int
    features: int = 64
    ranks: int = 4
    kind: str = "scatter"
    spec: jaxnorm.QuantSpec | None = None
    x: str = "bfloat16"
    weight: str | None = "float32"
    residual: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def share(self) -> int:
        return -(-self.rows // self.ranks)

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """x [W, M, N]; residual [W * Ms, N] or [M, N], garbage in the rows that nobody has."""
        rng = np.random.default_rng(seed)
        out = {"x": rng.normal(size=(self.ranks, self.rows, self.features)).astype(dtype(self.x))}
        if self.residual:
            rows = self.share * self.ranks if self.kind == "scatter" else self.rows
            out["residual"] = (3 * rng.normal(size=(rows, self.features))).astype(dtype(self.residual))
            out["residual"][self.rows :] = np.nan
        if self.weight:
            out["weight"] = (1 + 0.3 * rng.normal(size=self.features)).astype(dtype(self.weight))
        if self.options.get("norm") == "layernorm":
            out["bias"] = (0.5 * rng.normal(size=self.features)).astype(dtype(self.weight or "float32"))
        return out

    def unruly_inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Partial sums of many exponents in one row (they do not pack), zeros, subnormals, infinities and NaN among them."""
        out, rng = self.inputs(seed), np.random.default_rng(seed)
        x = out["x"]
        x[:, 1] *= 2.0 ** rng.integers(-60, 60, x[:, 1].shape)
        x[:, 2] *= rng.random(x[:, 2].shape) < 0.7
        x[:, 3], x[:, 4, 5], x[0, 5, 6], x[1, 7, :256] = 0, 1e-39, np.nan, -0.0
        x[0, 8, 9] = np.inf
        return out

    def local(self, axis: Any, **more: Any) -> Any:
        """The call of one rank: arrays by name -> (result, residual_out or None)."""
        options = self.options | more

        def f(a: dict[str, jax.Array]) -> Any:
            x, w, r = a["x"], a.get("weight"), a.get("residual")
            x = x.reshape(x.shape[-2:])
            if self.kind == "allreduce":
                return distributed.allreduce_add_rmsnorm(x, r, w, self.spec, axis_name=axis, **options)
            bias = {"bias": a["bias"]} if "bias" in a else {}
            out = distributed.reduce_scatter_rmsnorm_quant_all_gather(
                x, w, self.spec, axis_name=axis, residual=r, **bias, **options
            )
            return out if r is not None else (out, None)

        return f

    def specs(self, axis: Any) -> tuple[dict[str, P], Any]:
        """(in_specs, out_specs) with the results as they are typed."""
        rows = P(axis) if self.kind == "scatter" else P()
        whole = self.kind == "allreduce" or self.options.get("gather", True)
        return {"x": P(axis), "residual": rows, "weight": P(), "bias": P()}, (P() if whole else P(axis), rows)

    def sharded(self, mesh: Mesh, axis: Any, check_vma: bool = True, **more: Any) -> Any:
        """The jitted call over a mesh. Without ``gather`` scales in other layouts than row are not one global array."""
        ins, outs = self.specs(axis)
        names = self.inputs_names()
        return jax.jit(
            jax.shard_map(
                self.local(axis, **more),
                mesh=mesh,
                in_specs=({n: ins[n] for n in names},),
                out_specs=outs,
                check_vma=check_vma,
            )
        )

    def inputs_names(self) -> list[str]:
        return list(replace(self, rows=1).inputs())

    def place(self, arrays: dict[str, np.ndarray], mesh: Mesh, axis: Any) -> dict[str, jax.Array]:
        ins, _ = self.specs(axis)
        return {n: jax.device_put(a, NamedSharding(mesh, ins[n])) for n, a in arrays.items()}

    # the oracle

    def forward(self, arrays: dict[str, np.ndarray]) -> oracle.Forward:
        """The float32 sum in rank order, the residual, then the norm in float64."""
        s = arrays["x"][0].astype(np.float32)
        for part in arrays["x"][1:]:
            s = s + part.astype(np.float32)
        residual_out = None
        if self.residual:
            s = s + arrays["residual"][: self.rows].astype(np.float32)
            residual_out = oracle.round_to(oracle.f64(s), self.residual)
        if self.options.get("norm") == "layernorm":
            return self._layernorm(oracle.f64(s), arrays, residual_out)
        return oracle._norm(
            oracle.f64(s), self.x, arrays.get("weight"), eps=self.options.get("eps", 1e-6),
            weight_offset=self.options.get("weight_offset", 0.0), cast=self.options.get("cast", "output"),
            out_dtype=None, pad_to_multiple=None, residual_out=residual_out,
        )  # fmt: skip

    def _layernorm(self, n: np.ndarray, arrays: dict[str, np.ndarray], residual_out: Any) -> oracle.Forward:
        d = n - n.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + self.options.get("eps", 1e-6))
        y = d * rstd * oracle.f64(arrays["weight"]) + oracle.f64(arrays["bias"])
        return oracle.Forward(y, self.x, n.shape[-1], n, rstd, residual_out)

    def check(self, arrays: dict[str, np.ndarray], result: Any, residual_out: Any, what: str = "") -> None:
        """Gathered (or row-sharded, whole) results against the oracle."""
        want = self.forward(arrays)
        if self.residual:
            got = np.asarray(residual_out)
            tolerances.assert_same_bits(got[: self.rows], want.residual_out, f"{what} residual_out")
            assert not np.asarray(got[self.rows :], np.float32).any(), f"{what}: rows that no rank has"
        else:
            assert residual_out is None
        if self.spec is not None:
            codes = oracle_quant.quantize(want.y, self.spec, result.spec.dtype)
            oracle_quant.assert_quantized(jax.tree.map(np.asarray, result), codes, self.spec, what)
        elif self.options.get("norm") == "layernorm":
            error = np.abs(oracle.f64(result) - want.y)
            limit = tolerances.ulp(want.y, self.x) + 2.0**-20 * (
                2 + np.abs(want.y) + np.abs(oracle.f64(arrays["bias"]))
            )
            assert (error <= limit).all(), what
        else:
            tolerances.assert_y(np.asarray(result)[: self.rows], want, self.options.get("cast", "output"), what)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], order: Any = None) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))], dtype=object)
    return Mesh((devices if order is None else devices[list(order)]).reshape(shape), names)


def same_on_all(array: jax.Array) -> None:
    """Every device's copy of a replicated result has the same bits."""
    first, *rest = [np.asarray(s.data) for s in array.addressable_shards]
    for other in rest:
        tolerances.assert_same_bits(other, first, "ranks")


def stacked(call: Call, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arguments for pmap: everything with a leading device dim."""

    def spread(name: str, a: np.ndarray) -> jax.Array:
        if name == "x":
            return jnp.asarray(a)
        if name == "residual" and call.kind == "scatter":
            return jnp.asarray(a.reshape(call.ranks, call.share, -1))
        return jnp.broadcast_to(jnp.asarray(a), (call.ranks, *a.shape))

    return {n: spread(n, a) for n, a in arrays.items()}
