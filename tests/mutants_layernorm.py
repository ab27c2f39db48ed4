"""Defects of the LayerNorm family for test_mutants.py."""

# ruff: noqa: E501 -- the code of a mutant stands on one line

from __future__ import annotations

from mutants import Mutant

REF, API = "jaxnorm/_ref/layernorm.py", "jaxnorm/_api/layernorm.py"
NORMS, ROWS, REDUCE, BACKWARD = (f"csrc/include/jaxnorm/{name}.h" for name in ("norms", "rows", "reduce", "rows_bwd"))
PLANS, TRITON_BACKWARD = "kernels/configs/_hip.py", "kernels/layernorm_bwd.py"
NUMERICS, QUANT = "tests/test_layernorm.py -k ", "tests/test_layernorm_quant.py -k "
SIMT, TRITON = "tests/test_layernorm_simt.py -k ", "tests/test_layernorm_triton.py -k "
MUTANTS = (
    Mutant("what the mean lost to rounding is dropped", REF, "y = (n - mean - shift) * rstd", "y = (n - mean) * rstd", NUMERICS + "mean_far"),
    Mutant("mean and what it lost in one float32", REF, "y = (n - mean - shift) * rstd", "y = (n - (mean + shift)) * rstd", NUMERICS + "mean_far"),
    Mutant("layer norm by E[x^2] - mean^2", REF, "    d = n - mean\n    shift", "    d = n\n    shift", NUMERICS + "mean_far"),
    Mutant("mean by a product with 1/N", REF, "jax.lax.div(total, jax.lax.optimization_barrier(jnp.full_like(total, features)))", "total / features", NUMERICS + "mean_far"),
    Mutant("x_bias behind the residual", REF, "    if x_bias is not None:\n        a = a + f32(x_bias)\n    return a if residual is None else a + f32(residual)",
           "    if residual is not None:\n        a = a + f32(residual)\n    return a if x_bias is None else a + f32(x_bias)", NUMERICS + "before_the_residual"),
    Mutant("mean of the cotangent forgotten in layer norm", REF, " - row_mean(gw, features, axes))", ")", NUMERICS + "test_models"),
    Mutant("dbias of the weighted cotangent", REF, '"dbias": g, ', '"dbias": gw, ', NUMERICS + "test_models"),
    Mutant("offset of layer norm forgotten in the backward", REF, 'g * (f32(arrays["weight"]) + weight_offset)', 'g * f32(arrays["weight"])', NUMERICS + "test_dtypes"),
    Mutant("x_bias counted twice in the backward", API, 'None if includes_x_bias else given.get("x_bias")', 'given.get("x_bias")', NUMERICS + "test_dtypes"),
    Mutant("sums of vectors in float32", API, '"n", given[name].dtype.name', '"n", "float32"', NUMERICS + "test_models"),
    Mutant("HIP: a gradient in the place of the one before it", BACKWARD, "put<B>(b, at, sum)", "put<A>(a, at, sum)", SIMT + "test_backward"),
    Mutant("sums of shards rounded before they are added up", "jaxnorm/_sharding.py", '"float32" if summed.get(name) else t', "t", "tests/test_layernorm_transforms.py -k narrow"),
    Mutant("bias in the padding", "jaxnorm/_api/quant.py", "ref.quantize(pad_last(z, width)", "ref.quantize(jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, width - z.shape[-1])], constant_values=1)", QUANT + "padding"),
    Mutant("HIP: what the mean lost is dropped", NORMS, "State{mean, found.shift, rstd, -(found.shift * rstd)}", "State{mean, found.shift, rstd, 0.f}", SIMT + "mean10000"),
    Mutant("HIP: sums about a value far from the mean are kept", NORMS, "return shift * shift > 4.f * var;", "return false;", SIMT + "far_off"),
    Mutant("HIP: absent chunks in the second sums", ROWS, "(FIRST && !PIVOT) || has ? sum[c] : 0.f", "sum[c]", SIMT + "test_forward"),
    Mutant("HIP: buffers of sums that overlap", PLANS, 'return 2 if _pivots(problem, chunks) else 3', "return 1", SIMT + "test_forward"),
    Mutant("HIP: empty sums over those of the other kind", REDUCE, " && first + k < per", "", SIMT + "65536"),
    Mutant("HIP: the two sums swapped", REDUCE, "total[0] = upper ? other : v;", "total[0] = upper ? v : other;", SIMT + "test_forward"),
    Mutant("HIP: dx_bias without the residual's cotangent", BACKWARD, "columns[Sums::FIRST_DXB][k][i] += ds[i];", "columns[Sums::FIRST_DXB][k][i] += norm.rstd * norm.inner(x[i], g[i]);", SIMT + "test_backward"),
    Mutant("HIP: dbias of the weighted cotangent", BACKWARD, "columns[Sums::FIRST_DB][k][i] += g[i];", "columns[Sums::FIRST_DB][k][i] += g[i] * x[i];", SIMT + "test_backward"),
    Mutant("Triton: deviations of columns that are not there", "kernels/_common.py", "        d = tl.where(live, d, 0.0)", "        d = d", TRITON + "test_forward"),
    Mutant("Triton: share of dbias in the place of dweight", TRITON_BACKWARD, "store_share(dbias_ptr + share, dbias", "store_share(dweight_ptr + share, dbias", TRITON + "test_backward"),
    Mutant("Triton: x_bias forgotten in the second reading", TRITON_BACKWARD, "_bias_at(x_bias_ptr, again, cols, live, HAS_X_BIAS, N < WIDTH), mean, shift, rstd, HAS_X_BIAS", "_bias_at(x_bias_ptr, again, cols, live, HAS_X_BIAS, N < WIDTH), mean, shift, rstd, False", TRITON + "reread"),
)  # fmt: skip
