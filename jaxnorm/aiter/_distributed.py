"""AITER's distributed composite, under ``shard_map`` or ``pmap`` instead of an Iris context."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import distributed
from .._api import _checks as check
from .._types import QuantSpec
from ..errors import value_error

_MODES = ("none", "fp8_per_token")


def reduce_scatter_rmsnorm_quant_all_gather(
    input_tensor: jax.Array,
    gamma: jax.Array,
    epsilon: float = 1e-6,
    ctx: Any = None,
    quant_mode: str = "none",
    do_allgather: bool = True,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None, jax.Array | None]:
    """``(norm_shard, quant_shard, gathered, scales)``: :func:`jaxnorm.distributed.reduce_scatter_rmsnorm_quant_all_gather`.

    Args:
      input_tensor: [M, N], this rank's partial sum.
      ctx:          the name of the mesh axis, where AITER has its Iris context.
      quant_mode:   "none" or "fp8_per_token", the target's native e4m3.

    Returns:
      norm_shard  [ceil(M / W), N] float32, or None with fp8_per_token.
      quant_shard [ceil(M / W), N] codes, or None with "none".
      gathered    [M, N] codes, or in input_tensor's dtype; None without do_allgather.
      scales      float32 [M, 1], those of the rows of this rank without do_allgather; None with "none".

    Differs from AITER on purpose: the scales come back (AITER drops them, so that its codes cannot be read), the sum is float32 and
    not rounded before the norm, the fp8 maximum comes from the dtype, M need not be a multiple of W. Under jit, results that nobody
    uses cost nothing; with a 16-bit input, using both norm_shard and gathered costs a second reduction.
    """
    op = "aiter.reduce_scatter_rmsnorm_quant_all_gather"
    if ctx is None:
        raise value_error(op, "ctx", None, "the name of a mesh axis", "Call it under jax.shard_map or jax.pmap.")
    check.choice(op, "quant_mode", quant_mode, _MODES)
    x = check.array(op, "input_tensor", input_tensor)

    def run(x: jax.Array, spec: QuantSpec | None, gather: bool) -> Any:
        return distributed.reduce_scatter_rmsnorm_quant_all_gather(
            x, gamma, spec, axis_name=ctx, eps=epsilon, gather=gather
        )

    if quant_mode == "none":
        gathered = run(x, None, True) if do_allgather else None
        if gathered is not None and x.dtype == jnp.float32:
            return _own_rows(gathered, ctx), None, gathered, None
        return run(x.astype(jnp.float32), None, False), None, gathered, None
    q = run(x, QuantSpec("fp8"), do_allgather)
    if not do_allgather:
        return None, q.values, None, q.scale
    return None, _own_rows(q.values, ctx), q.values, q.scale


def _own_rows(gathered: jax.Array, axis: Any) -> jax.Array:
    """The rows of this rank, zeros where the last ranks have none."""
    rows, ranks = gathered.shape[0], jax.lax.axis_size(axis)
    share = -(-rows // ranks)
    missing = jnp.zeros((share * ranks - rows, gathered.shape[1]), gathered.dtype)
    whole = jnp.concatenate([gathered, missing]) if missing.size else gathered
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * share, share)
