"""Defects of the Flax modules and of AITER's names for test_mutants.py."""

# ruff: noqa: E501 -- the code of a mutant stands on one line

from __future__ import annotations

from mutants import Mutant

PLAIN, NNX, LINEN, SWAP = "jaxnorm/_modules.py", "jaxnorm/nnx.py", "jaxnorm/linen.py", "jaxnorm/_swap.py"
RMS, QK, COMMON = "jaxnorm/aiter/_rmsnorm.py", "jaxnorm/aiter/_qk.py", "jaxnorm/aiter/_common.py"
AXES = "tests/test_flax.py -k test_axes_and_masks"
AITER = "tests/test_aiter.py -k "
MUTANTS: tuple[Mutant, ...] = (
    Mutant("mask forgotten", PLAIN, "m = jnp.mean(a, axes, keepdims=True, where=mask)", "m = jnp.mean(a, axes, keepdims=True)", AXES),
    Mutant("offset forgotten in plain JAX", PLAIN, ".reshape(shape) + norm.weight_offset)", ".reshape(shape))", "tests/test_flax.py -k weight_offset"),
    Mutant("groups over the wrong axes", PLAIN, "axes = (*axes[:-1], x.ndim)", "axes = (*axes[1:], x.ndim)", AXES),
    Mutant("variance of the fast kind", PLAIN, "d = v - mean(v)\n", "d = v\n", "tests/test_flax.py -k far_from_zero"),
    Mutant("operator chosen for leading axes", PLAIN, "return tuple(axes) == tuple(range(ndim - len(axes), ndim))", "return True", AXES),
    Mutant("no operator chosen", PLAIN, "if norm.feature_axes == norm.reduction_axes or norm.kind", "if norm.kind", "tests/test_flax.py -k nnx_results"),
    Mutant("codes of the rounded y", PLAIN, "out_dtype = jnp.dtype(jnp.float32) if norm.quant", "out_dtype = jnp.dtype(jnp.bfloat16) if norm.quant", "tests/test_flax.py -k test_quant"),
    Mutant("result in the dtype of x", NNX, "arrays), target", "arrays), arrays[0].dtype", "tests/test_flax.py -k nnx_results"),
    Mutant("x_bias dropped by the module", NNX, "x_bias=x_bias,", "", "tests/test_flax.py -k add_layernorm"),
    Mutant("metadata dropped", NNX, "self.q_scale = flax_nnx.Param(scale_init(rngs.params(), shape, param_dtype)",
           "self.q_scale = flax_nnx.Param(jnp.ones(shape, param_dtype)", "tests/test_flax_models.py -k partitioning"),
    Mutant("linen result in the dtype of x", LINEN, "dtype = flax_dtypes.canonicalize_dtype(*(a for a in (x, scale, bias) if a is not None), dtype=module.dtype)",
           "dtype = module.dtype or x.dtype", "tests/test_flax.py -k linen_results"),
    Mutant("subclasses swapped, too", SWAP, "if type(module) is not base:", "if False:", "tests/test_flax_models.py -k leaves"),
    Mutant("residual_out and scale exchanged", RMS, "return (q.values, residual_out, q.scale, *y)", "return (q.values, q.scale, residual_out, *y)", AITER + "rmsnorm_quant_names"),
    Mutant("model-sensitive sum unrounded", COMMON, '({"residual_rounding": "input"} if residual else {})', "{}", AITER + "test_rmsnorm_names"),
    Mutant("column scales by row", COMMON, '("shuffled" if tiles else "column") if shuffle_scale else "row"', '"row"', AITER + "groups_and_their"),
    Mutant("interleaved taken for neox", QK, "style = _style(not is_interleaved)", "style = _style(is_interleaved)", AITER + "two_streams"),
    Mutant("v scale of k", QK, "zip(kv, kept, strict=False)", "zip(kv, (kept[0],) * 2, strict=False)", AITER + "per_tensor"),
    Mutant("rows of the first rank", "jaxnorm/aiter/_distributed.py", "jax.lax.axis_index(axis) * share", "0 * jax.lax.axis_index(axis)", AITER + "distributed"),
)  # fmt: skip
