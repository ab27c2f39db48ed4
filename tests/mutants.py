"""Deliberate defects: each is applied to a copy of the library and must be found by the named tests.

A mutant that survives is a missing test. Run by test_mutants.py (slow).
"""

# ruff: noqa: E501 -- the code of a mutant stands on one line

from __future__ import annotations

from dataclasses import dataclass

REF = "jaxnorm/_ref/rmsnorm.py"
COMMON = "jaxnorm/_ref/_common.py"
API = "jaxnorm/_api/rmsnorm.py"
SHARDING = "jaxnorm/_sharding.py"
COMPAT = "jaxnorm/_compat.py"
OP = "jaxnorm/_op.py"
LAUNCH = "jaxnorm/_launch.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    """Must be in the file exactly once."""
    new: str
    killed_by: str
    """Arguments of pytest: the smallest selection that must fail."""


NUMERICS = "tests/test_rmsnorm.py -k "
MUTANTS: tuple[Mutant, ...] = (
    Mutant("mean over the padded N", REF, "row_sum(n * n, axes) / features + eps", "row_sum(n * n, axes) / width + eps", NUMERICS + "pad64"),
    Mutant("eps outside the root", REF, "jax.lax.rsqrt(row_sum(n * n, axes) / features + eps)",
           "1 / (jax.lax.sqrt(row_sum(n * n, axes) / features) + eps)", NUMERICS + "eps_is_inside"),
    Mutant("offset forgotten in the backward", REF, "gw = g if weight is None else g * (f32(weight) + weight_offset)",
           "gw = g if weight is None else g * f32(weight)", NUMERICS + "test_dtypes"),
    Mutant("weight twice in dx", REF, "ds = r * (gw - xh", "ds = r * (gw * (1 if weight is None else f32(weight)) - xh", NUMERICS + "test_dtypes"),
    Mutant("residual cotangent dropped", REF, "if dresidual_out is not None:", "if False:", NUMERICS + "test_dtypes"),
    Mutant("residual read rounded", REF, 'if residual_rounding == "input":', "if True:", NUMERICS + "unrounded_sum"),
    Mutant("residual never read rounded", REF, 'if residual_rounding == "input":', "if False:", NUMERICS + "unrounded_sum"),
    Mutant("inner rounding dropped", REF, 'if cast == "before_weight":', "if False:", NUMERICS + "inner_rounding"),
    Mutant("weight read as bf16", REF, "        y = y * (f32(weight) + weight_offset)",
           "        y = y * (f32(weight.astype(jnp.bfloat16)) + weight_offset)", NUMERICS + "test_dtypes"),
    Mutant("result rounded twice", REF, 'pad_last(y.astype(out_dtype), width)', 'pad_last(y.astype(x.dtype).astype(out_dtype), width)',
           NUMERICS + "out-f32"),
    Mutant("sum of a row by jnp.sum", REF, "row_sum(n * n, axes) / features + eps", "jnp.sum(n * n, -1, keepdims=True) / features + eps",
           "tests/test_batch_invariance.py"),
    Mutant("psum of dw forgotten", SHARDING, "for axes in dict.fromkeys(filter(None, summed.values())):", "for axes in ():", "tests/test_sharding.py -k rows_sharded"),
    Mutant("psum of dw doubled", SHARDING, "return [jax.lax.psum(arrays[0], axes)]", "return [jax.lax.psum(arrays[0], axes) * 2]", "tests/test_sharding.py -k rows_sharded"),
    Mutant("leading dims folded outside", OP, "    return tuple(_partitioned(call, len(call.lead(operands[0].shape)), _compat.context_mesh())(*operands))",
           "    return _folded(call, operands)\n\n\ndef _folded(call, operands):\n    lead = operands[0].shape[:-1]\n"
           "    flat = [a.reshape(-1, *a.shape[len(lead) :]) if '...' in call.dims(n) else a for n, a in zip(call.names, operands)]\n"
           "    out = _partitioned(call, 1, _compat.context_mesh())(*flat)\n"
           "    return tuple(o.reshape(call.result_shape(r[0], lead)) for r, o in zip(call.results, out))",
           "tests/test_sharding.py -k rows_sharded"),
    Mutant("features gathered", SHARDING, "named[dim] = entry if split else None", "named[dim] = None", "tests/test_sharding.py -k features_sharded"),
    Mutant("result type without the varying axes", COMPAT, "    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=replicated)",
           "    return jax.core.ShapedArray(shape, dtype)", "tests/test_transforms.py -k 'wrong_out_specs or shard_map_vma'"),
    Mutant("vmap rule ignores batched weights", OP, "shared = all(rows or not b for rows, b in zip(has_rows, batched, strict=True))", "shared = True",
           "tests/test_transforms.py -k vmap_weights"),
    Mutant("no named scope", API, "jax.named_scope(config.op)", 'jax.named_scope("norm")', "tests/test_transforms.py -k named_scope"),
    Mutant("another backend in silence", "jaxnorm/_dispatch.py", 'if named in (None, "xla"):', "if True:", "tests/test_errors.py -k kernel_backends"),
    Mutant("dweight in float32 for every weight", API, '("dweight", "n", weight.dtype.name)', '("dweight", "n", "float32")', NUMERICS + "test_dtypes"),
    Mutant("tail cotangent counted", REF, "f32(dy[..., : n.shape[-1]])", "f32(dy[..., : n.shape[-1]]) + 0 * f32(dy[..., -1:])", NUMERICS + "pad64"),
    Mutant("ranks summed in another order", "jaxnorm/_ref/_common.py", "for p in range(1, parts.shape[0]):",
           "for p in reversed(range(1, parts.shape[0])):", "tests/test_distributed.py -k 'values and residual'"),
    Mutant("rows that no rank has are left", "jaxnorm/distributed/composite.py", "mask(residual_out, 0) if config.scatter", "residual_out if config.scatter",
           "tests/test_distributed.py -k 'values and ragged'"),
    Mutant("one buffer for a walking row's sums", "csrc/include/jaxnorm/rows_ahead.h", "Norm::ONCE ? 2 : 1", "Norm::BUFFERS > 1 ? 1 : 2",
           "tests/test_layernorm_simt.py -k ahead"),
    Mutant("another call not noticed", "csrc/include/jaxnorm/peers.h", "if (ahead == 0 && u32(seen >> 32) != signature)", "if (false)",
           "tests/test_distributed_simt.py -k another_call"),
    Mutant("epochs compared without a sign", "csrc/include/jaxnorm/peers.h", "const int ahead = int(u32(seen) - epoch);",
           "const int ahead = u32(seen) < epoch ? -1 : u32(seen) == epoch ? 0 : 1;", "tests/test_distributed_simt.py -k wrap"),
    Mutant("a failed call leaves what was there", "csrc/kernels/distributed.hip", "if (!good)", "if (false)", "tests/test_distributed_simt.py -k missing"),
    Mutant("exponents that do not fit are packed", "csrc/include/jaxnorm/packed.h", "if (max_of_32(bad) != 0)", "if (false)",
           "tests/test_distributed_simt.py -k same_bits"),
)  # fmt: skip

ROPE, QK = "jaxnorm/_ref/rope.py", "jaxnorm/_ref/qk.py"
ON_CPU, SIMT, INTERPRETED = "tests/test_rope.py -k ", "tests/test_hip_rope_simt.py -k ", "tests/test_triton_rope.py -k "
MUTANTS += (
    Mutant("cos and sin swapped in gptj", ROPE, "out = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)",
           "out = jnp.stack([first * sin - second * cos, second * sin + first * cos], -1)", ON_CPU + "gptj"),
    Mutant("positions beyond the table take its last row", ROPE, "inside = ((positions >= 0) & (positions < rows))[..., None]",
           "inside = jnp.full(positions.shape, True)[..., None]", ON_CPU + "beyond_the_table"),
    Mutant("interleaved sections without their limit", ROPE, "j % 3 if j < 3 * sections[j % 3] and j % 3 else 0", "j % 3", ON_CPU + "components"),
    Mutant("norm over what is rotated", QK, "n = n * jax.lax.rsqrt(row_sum(n * n) / x.shape[-1] + eps)",
           "n = n * jax.lax.rsqrt(row_sum(n[..., : 2 * cos.shape[-1]] ** 2) / (2 * cos.shape[-1]) + eps)", "tests/test_qk.py -k 256:64"),
    Mutant("no rounding before the rotation", QK, "ref.rotate(rounded(n, x.dtype), cos", "ref.rotate(n, cos", "tests/test_qk.py -k against_the_oracle"),
    Mutant("offset of heads forgotten in the backward", QK, "gw = g if weight is None else g * (f32(weight) + weight_offset)",
           "gw = g if weight is None else g * f32(weight)", "tests/test_qk.py -k against_the_oracle"),
    Mutant("cotangent turned the wrong way", QK, "ref.rotate(f32(dy), cos, sin, style, inverse=True)", "ref.rotate(f32(dy), cos, sin, style)",
           "tests/test_qk.py -k against_the_oracle"),
    Mutant("sums of k over the heads of q", "jaxnorm/_api/qk.py", 'f"{config.tokens} h{i}") for i, _ in weights', 'f"{config.tokens} h0") for i, _ in weights',
           "tests/test_rope_sharding.py -k kv-heads-whole"),
    Mutant("past the last head is written", "csrc/include/jaxnorm/rope.h", "lane, active && Deal::has(unit, u), out);", "lane, active, out);", SIMT + "every_deal"),
    Mutant("rest not kept", "csrc/include/jaxnorm/rope.h", "if constexpr (S::R < S::D) {", "if constexpr (false) {", SIMT + "special_values"),
    Mutant("a table of 32-bit rows", "csrc/include/jaxnorm/rope.h", "return row >= 0 && row < (long long)rows;", "return u32(row) <= rows;", SIMT + "special_values"),
    Mutant("other heads in the sum", "kernels/qk.py", "s_first += tl.where(live, g_first * first, 0.0)", "s_first += tl.where(live, g_first, 0.0)", INTERPRETED + "backward"),
    Mutant("cos and sin swapped in a kernel", "kernels/_heads.py", "b = second * cos + first * sin", "b = second * sin + first * cos", INTERPRETED + "forward"),
)  # fmt: skip

CACHE_H, CACHE_REF, CACHE_PY = "csrc/include/jaxnorm/cache.h", "jaxnorm/_ref/cache.py", "kernels/qk_cache.py"
WRITTEN, CACHE_SIMT, CACHE_TRITON = (
    "tests/test_qk_cache.py -k ",
    "tests/test_hip_qk_cache.py -k ",
    "tests/test_triton_qk_cache.py -k ",
)
MUTANTS += (
    Mutant("slot -1 is the last one", CACHE_REF, "inside = (slots >= 0) & (slots < g.slots)\n    return",
           "inside = slots < g.slots\n    return", WRITTEN + "nobody_writes"),
    Mutant("v in the order of k", CACHE_REF, 'array.at[page, :, offset // g.x, :, offset % g.x]',
           'array.at[page, :, offset % (g.page_size // g.x), :, offset // (g.page_size // g.x)]', WRITTEN + "'against_the_oracle and shuffled'"),
    Mutant("a scale a token for all heads", CACHE_REF, "stored, scales = quantize(exact, spec)",
           "stored, scales = quantize(exact, spec)\n    scales = jnp.broadcast_to(scales.max(-2, keepdims=True), scales.shape)", WRITTEN + "'against_the_oracle and per_token'"),
    Mutant("the head's maximum of one lane", CACHE_H, "Scale<Q>::of_max(lanes_max<S::LANES>(a), 0.f)", "Scale<Q>::of_max(a, 0.f)", CACHE_SIMT + "per_token"),
    Mutant("any X tokens are a group of slots", CACHE_H, "whole = whole && places[rows + t] == slot0 + t;", ";", CACHE_SIMT + "tiles"),
    Mutant("a group that starts anywhere", CACHE_H, "bool whole = slot0 % GROUP == 0;", "bool whole = true;", CACHE_SIMT + "tiles"),
    Mutant("slots are not looked at", CACHE_H, "if (!active || !slot.inside(to.slots)) return;", "if (!active) return;", CACHE_SIMT + "oracle"),
    Mutant("32-bit slots in an int64 call", CACHE_H, "return s >= 0 && u64(s) < slots;", "return int(s) >= 0 && u32(s) < slots;",
           "tests/test_hip_qk_cache.py -k far_slots"),
    Mutant("places of a page by the wrong stride", CACHE_PY, "place // X * (D * X)", "place // X * (PAGE * X)", CACHE_TRITON + "oracle"),
    Mutant("tokens without a slot are written", CACHE_PY, "inside = (slot >= 0) & (slot < all_slots)\n    return",
           "inside = slot < all_slots\n    return", CACHE_TRITON + "oracle"),
    Mutant("the cache is copied", "kernels/configs/qk_cache_triton.py", "aliases=aliases(problem),", "aliases=(),",
           "tests/test_qk_cache_transforms.py -k lowered"),
)  # fmt: skip
