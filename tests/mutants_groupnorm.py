"""Defects of groupnorm for test_mutants.py."""

# ruff: noqa: E501 -- the code of a mutant stands on one line

from __future__ import annotations

from mutants import Mutant

REF, API = "jaxnorm/_ref/groupnorm.py", "jaxnorm/_api/groupnorm.py"
MAPS, FORWARD, BACKWARD = (f"csrc/include/jaxnorm/groups{part}.h" for part in ("", "_fwd", "_bwd"))
CLUSTER, CLUSTERED = "csrc/include/jaxnorm/groups_cluster.h", "tests/test_groupnorm_cluster.py -k "
MAIL, HELD = "csrc/include/jaxnorm/groups_mail.h", "tests/test_groupnorm_held.py -k "
HELD_PAIRS, HELD_BACKWARD = "csrc/include/jaxnorm/groups_bwd_held.h", "tests/test_groupnorm_held_bwd.py -k "
CLUSTER_BACKWARD, CLUSTERED_BACKWARD = (
    "csrc/include/jaxnorm/groups_bwd_cluster.h",
    "tests/test_groupnorm_cluster_bwd.py -k ",
)
KERNELS = "kernels/groupnorm.py"
NUMERICS = "tests/test_groupnorm.py -k "
SIMT, TRITON = "tests/test_groupnorm_hip.py -k ", "tests/test_groupnorm_triton.py -k "
SHARDED = "tests/test_groupnorm_transforms.py -k "
MUTANTS = (
    Mutant("group norm by E[x^2] - mean^2", REF, "(center,) = layout.mean(a, axes=axes)", "center = jnp.zeros_like(layout.mean(a, axes=axes)[0])", NUMERICS + "mean10000"),
    Mutant("what the mean lost to rounding is dropped", REF, "    v = _affine((d - e) * rstd, weight, bias, layout)", "    v = _affine(d * rstd, weight, bias, layout)", NUMERICS + "mean10000"),
    Mutant("groups in stripes of channels", REF, "math.prod(a.shape[len(lead) : -1]), a.shape[-1] // self.group, self.group)",
           "math.prod(a.shape[len(lead) : -1]), self.group, a.shape[-1] // self.group).swapaxes(-1, -2)", NUMERICS + "linen"),
    Mutant("slope of silu without its second term", REF, "sg * (1.0 + v * (1.0 - sg))", "sg", NUMERICS + "silu"),
    Mutant("mean of the cotangent forgotten", REF, "(gw - plain) - xh", "gw - xh", NUMERICS + "test_against_the_oracle"),
    Mutant("silu before the bias", REF, "    v = _affine((d - e) * rstd, weight, bias, layout)\n    if silu:\n        v = v / (1.0 + jnp.exp(-v))",
           "    v = _affine((d - e) * rstd, weight, None, layout)\n    if silu:\n        v = v / (1.0 + jnp.exp(-v))\n    v = v if bias is None else v + layout.channels(bias)", NUMERICS + "silu"),
    Mutant("statistics of a shard alone", REF, "total = jax.lax.psum(total, axes)", "pass", SHARDED + "sharded_positions"),
    Mutant("groups that may be split", API, 'parallel_dims=(("c", self.group_channels),)', 'parallel_dims=(("c", 1),)', SHARDED + "split_groups"),
    Mutant("dbias in the dtype of x", API, 'results += [(n, "c", a.dtype.name)', 'results += [(n, "c", x.dtype.name)', NUMERICS + "test_against_the_oracle"),
    Mutant("parts counted as equals", FORWARD, "fused_multiply_add(M::part_count(p), (mean[i]", "fused_multiply_add(M::part_count(0), (mean[i]", SIMT + "test_forward"),
    Mutant("parts added without their distance", FORWARD, "spread += fused_multiply_add(M::part_count(p) * d, d, squares[i]);", "spread += squares[i];", SIMT + "test_forward"),
    Mutant("one affine for a chunk", FORWARD, "fused_multiply_add(d, a[M::LAST ? i : 0], c[M::LAST ? i : 0])", "fused_multiply_add(d, a[0], c[0])", SIMT + "test_forward"),
    Mutant("a barrier less", MAPS, "+ segment % GROUPS * EACH + i % EACH;\n      });\n      barrier();", "+ segment % GROUPS * EACH + i % EACH;\n      });", SIMT + "test_forward"),
    Mutant("the last part read to its full length", MAPS, "(PART % (Q * K) == 0 || row < u32(PART)) && (S % PART == 0 || part * PART + row < u32(S));", "(PART % (Q * K) == 0 || row < u32(PART));", SIMT + "test_forward"),
    Mutant("a neighbour's part of the cluster", CLUSTER, "cluster_put(at + 4 * (map.group(u) * M::PARTS + map.part)", "cluster_put(at + 4 * (map.group(u) * M::PARTS + (map.part ^ 1))", CLUSTERED + "values_and_bits"),
    Mutant("the first of the steps that are held, again and again", CLUSTER, "s < Held::AGAIN ? 0 : s - Held::AGAIN", "0", CLUSTERED + "values_and_bits"),
    Mutant("an example's shares go to the first one's blocks", CLUSTER_BACKWARD, "example * M::PARTS + map.thread, v[0][0]", "map.thread, v[0][0]", CLUSTERED_BACKWARD + "values_and_bits"),
    Mutant("a NaN reaches its neighbour", MAPS, "exp2_fast(lesser(w * -1.44269504f, 60.f))", "exp2_fast(w * -1.44269504f)", CLUSTERED + "silu_far_out"),
    Mutant("clusters with another order of sums for few groups", "kernels/configs/groupnorm_hip.py", "return (replace(h.cut, min_blocks=1),) * 2", "return (replace(_in_parts(s), min_blocks=1),) * 2", CLUSTERED + "plan"),
    Mutant("a word is left for the next launch", "csrc/include/jaxnorm/post.h", "if (mine[i]) post_word(p[i], 0, 0);", "", HELD + "values_and_bits"),
    Mutant("a mean for what it is off", MAIL, "told[2 * own + 1]);", "told[2 * own]);", HELD + "values_and_bits"),
    Mutant("teams with another order of sums", "kernels/configs/_groups_held.py", "replace(order, tile=max(tiles))", "replace(order, tile=max(tiles), k=order.k // 2)", HELD + "plan"),
    Mutant("registers take a neighbour's pair", HELD_PAIRS, "kept[r] = slot(r);", "kept[r] = slot(r + 1);", HELD_BACKWARD + "values_and_bits"),
    Mutant("dweight for dbias", HELD_PAIRS, "sums[c], sums[M::Q * M::TILE + c]", "sums[c], sums[c]", HELD_BACKWARD + "values_and_bits"),
    Mutant("weight twice in the shares", BACKWARD, "sums[n] * w;", "sums[n] * w * w;", SIMT + "test_backward"),
    Mutant("bias ignored in the slope", BACKWARD, "silu_slope(fused_multiply_add(xh, w, b))", "silu_slope(xh * w)", SIMT + "test_backward"),
    Mutant("Triton: count of the last part", KERNELS, "n = tl.where(mask, tl.minimum(S - p * PART, PART), 0).to(tl.float32)", "n = tl.where(mask, PART, 0).to(tl.float32)", TRITON + "test_forward"),
    Mutant("Triton: the other dim's stride", KERNELS, "return ch[:, None] * S + pos[None, :], (ch", "return ch[:, None] * C + pos[None, :], (ch", TRITON + "nchw"),
)  # fmt: skip
