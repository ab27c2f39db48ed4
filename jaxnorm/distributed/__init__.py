"""Norms on tensor-parallel partial sums: the reduction, the norm, the quantisation and the gather in one call.

Both functions run where a mesh axis is manual: under ``jax.shard_map`` (``check_vma`` on or off) and ``jax.pmap``.
"""

from __future__ import annotations

from ._api import allreduce_add_rmsnorm, reduce_scatter_rmsnorm_quant_all_gather
from .processes import FusedCallError, check, connect, reset

__all__ = [
    "FusedCallError",
    "allreduce_add_rmsnorm",
    "check",
    "connect",
    "reduce_scatter_rmsnorm_quant_all_gather",
    "reset",
]
