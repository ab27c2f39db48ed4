"""AITER's names and argument order, for porting a model: thin functions on top of jaxnorm's own.

    aiter.rmsnorm2d_fwd_with_add(out, x, residual_in, residual_out, weight, eps)      # AITER writes into buffers
    out, residual_out = jaxnorm.aiter.rmsnorm2d_fwd_with_add(x, residual_in, weight, eps)

Output buffers are no arguments; what AITER writes into them comes back, in the order in which its signature lists them. Caches stay
arguments and come back changed: donate them. What AITER reads off a buffer is a keyword, ``out_dtype`` (and ``scale_dtype``). Sizes
that AITER wants twice are checked against the shapes. docs/porting_aiter.md has the tables and where the numbers differ on purpose.
"""

from __future__ import annotations

from ._distributed import reduce_scatter_rmsnorm_quant_all_gather
from ._groupnorm import GroupNorm, _groupnorm_run
from ._layernorm import (
    layer_norm,
    layernorm2d_fwd,
    layernorm2d_fwd_with_add,
    layernorm2d_fwd_with_add_dynamicquant,
    layernorm2d_fwd_with_add_smoothquant,
    layernorm2d_fwd_with_dynamicquant,
    layernorm2d_fwd_with_smoothquant,
    layernorm2d_with_add_asm,
    layernorm2d_with_add_smoothquant_asm,
)
from ._qk import (
    fused_qk_norm_mrope_3d_cache_pts_quant_shuffle,
    fused_qk_norm_rope_2way,
    fused_qk_norm_rope_cache_pts_quant_shuffle,
    fused_qk_norm_rope_cache_quant_shuffle,
)
from ._rmsnorm import (
    add_rmsnorm,
    add_rmsnorm_quant,
    fused_add_rmsnorm_pad,
    rms_norm,
    rmsnorm,
    rmsnorm2d_fwd,
    rmsnorm2d_fwd_with_add,
    rmsnorm2d_fwd_with_add_dynamicquant,
    rmsnorm2d_fwd_with_add_smoothquant,
    rmsnorm2d_fwd_with_dynamicquant,
    rmsnorm2d_fwd_with_smoothquant,
    rmsnorm_quant,
)

__all__ = [
    "GroupNorm",
    "_groupnorm_run",
    "add_rmsnorm",
    "add_rmsnorm_quant",
    "fused_add_rmsnorm_pad",
    "fused_qk_norm_mrope_3d_cache_pts_quant_shuffle",
    "fused_qk_norm_rope_2way",
    "fused_qk_norm_rope_cache_pts_quant_shuffle",
    "fused_qk_norm_rope_cache_quant_shuffle",
    "layer_norm",
    "layernorm2d_fwd",
    "layernorm2d_fwd_with_add",
    "layernorm2d_fwd_with_add_dynamicquant",
    "layernorm2d_fwd_with_add_smoothquant",
    "layernorm2d_fwd_with_dynamicquant",
    "layernorm2d_fwd_with_smoothquant",
    "layernorm2d_with_add_asm",
    "layernorm2d_with_add_smoothquant_asm",
    "reduce_scatter_rmsnorm_quant_all_gather",
    "rms_norm",
    "rmsnorm",
    "rmsnorm2d_fwd",
    "rmsnorm2d_fwd_with_add",
    "rmsnorm2d_fwd_with_add_dynamicquant",
    "rmsnorm2d_fwd_with_add_smoothquant",
    "rmsnorm2d_fwd_with_dynamicquant",
    "rmsnorm2d_fwd_with_smoothquant",
    "rmsnorm_quant",
]
