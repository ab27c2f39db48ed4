"""The end of a transformer block with a quantised product: residual add, RMSNorm and quantisation in one kernel, then a matrix
product that reads the codes.

    python examples/quantized_matmul.py [--rows 128] [--features 1024] [--outputs 256]

    y = f32(rmsnorm(x + residual) @ W)  ~  (codes @ codes_W) * scale * scale_W

The scales factor out of the product where both operands have one for each row of the contraction (per token for the activation, per
output channel for the weight). With groups along the contraction the product is taken group by group and each part gets its own
pair of scales. Printed is the error of each format against the float32 product, relative to its root mean square. Runs on a CPU,
too, where the same calls take jaxnorm's plain JAX path.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm import Quantized, QuantSpec

NEXT_TO = (((1,), (1,)), ((), ()))  # [M, K] with [N, K]: contract the last dims, no batch


def int8_product(a: Quantized, w: Quantized) -> jax.Array:
    """int8 [M, K] and [N, K] with one scale a row -> float32 [M, N]; the sum is exact in int32 up to K = 133 000."""
    total = jax.lax.dot_general(a.values, w.values, NEXT_TO, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * a.scale * w.scale.T


def fp8_product(a: Quantized, w: Quantized) -> jax.Array:
    """fp8 [M, K] and [N, K] with one scale a row -> float32 [M, N]."""
    total = jax.lax.dot_general(a.values, w.values, NEXT_TO, preferred_element_type=jnp.float32)
    return total * a.scale * w.scale.T


def grouped_product(a: Quantized, w: Quantized) -> jax.Array:
    """Codes with float32 scales [M, G] and [N, G] of groups along K: one product a group, then ``sum_g s_a s_w part_g``."""
    group = a.spec.group_size
    assert group is not None and group == w.spec.group_size
    blocks = lambda q: q.values.reshape(q.values.shape[0], -1, group)  # noqa: E731
    accumulator = jnp.int32 if a.spec.dtype == "int8" else jnp.float32
    dims = (((2,), (2,)), ((1,), (1,)))  # the groups are the batch: [G, M, N]
    parts = jax.lax.dot_general(blocks(a), blocks(w), dims, preferred_element_type=accumulator)
    return jnp.einsum("gmn,mg,ng->mn", parts.astype(jnp.float32), a.scale, w.scale)


def mx_product(a: Quantized, w: Quantized) -> jax.Array:
    """MXFP8 (e4m3fn by its definition): ``jax.nn.scaled_matmul`` takes the codes and the exponents as they are.

    float8_e8m0fnu is the same byte as the exponent.
    """
    e8m0 = lambda q: jax.lax.bitcast_convert_type(q.scale, jnp.float8_e8m0fnu)[None]  # noqa: E731
    return jax.nn.scaled_matmul(a.values[None], w.values[None], e8m0(a), e8m0(w))[0]


def mx_product_by_groups(a: Quantized, w: Quantized) -> jax.Array:
    """The same without ``scaled_matmul``: the exponents as float32 powers of two."""
    power = lambda q: q.replace(scale=jnp.exp2(q.scale.astype(jnp.float32) - 127))  # noqa: E731
    return grouped_product(power(a), power(w))


def mx_on_this_platform() -> Callable[[Quantized, Quantized], jax.Array]:
    """``scaled_matmul`` has lowerings for CUDA and ROCm, none for CPU."""
    there = jax.default_backend() == "gpu" and hasattr(jax.nn, "scaled_matmul")
    return mx_product if there else mx_product_by_groups


def recipes() -> dict[str, tuple[QuantSpec, Callable[[Quantized, Quantized], jax.Array]]]:
    """What is printed: how both operands are quantised, and the product that reads them."""
    return {
        "int8, per token": (QuantSpec("int8"), int8_product),
        "int8, groups of 128": (QuantSpec("int8", group_size=128), grouped_product),
        "fp8, per token": (QuantSpec("fp8"), fp8_product),
        "fp8, groups of 128": (QuantSpec("fp8", group_size=128), grouped_product),
        "mxfp8": (QuantSpec("float8_e4m3fn", group_size=32, scale_dtype="e8m0"), mx_on_this_platform()),
    }


def block_end(
    x: jax.Array, residual: jax.Array, weight: jax.Array, w: Quantized, smooth: jax.Array | None, product: Callable
) -> tuple[jax.Array, jax.Array]:
    """(projection float32 [M, outputs], residual_out); the activation is quantised as the weight is."""
    q, residual_out = jaxnorm.add_rmsnorm_quant(x, residual, weight, w.spec, smooth_scale=smooth)
    return product(q, w), residual_out


def smooth_scale(weight: jax.Array, typical: jax.Array) -> jax.Array:
    """SmoothQuant with exponent 1/2: what the norm's output is multiplied by, and W's columns are divided by."""
    return jnp.sqrt(jnp.max(jnp.abs(weight), axis=0) / typical)


def errors(rows: int, features: int, outputs: int, seed: int = 0) -> dict[str, float]:
    """Relative root-mean-square error of every recipe on activations with a few outlier features, as those of a model have."""
    g = np.random.default_rng(seed)
    x, residual = (jnp.asarray(g.standard_normal((rows, features)), jnp.bfloat16) for _ in range(2))
    gain = g.uniform(0.5, 1.5, features) * np.where(np.arange(features) % 97 == 5, 20.0, 1.0)
    weight = jnp.asarray(gain, jnp.bfloat16)
    w = jnp.asarray(g.standard_normal((outputs, features)) / np.sqrt(features), jnp.float32)
    y, _ = jaxnorm.add_rmsnorm(x, residual, weight, out_dtype="float32")
    exact = jnp.matmul(y, w.T, precision="highest")
    smooth = smooth_scale(w, jnp.max(jnp.abs(y), axis=0))
    found = {}
    for name, (spec, product) in recipes().items():
        run = jax.jit(block_end, static_argnames="product")
        out, _ = run(x, residual, weight, jaxnorm.quantize(w, spec), None, product=product)
        found[name] = relative_error(out, exact)
        if name == "int8, per token":
            out, _ = run(x, residual, weight, jaxnorm.quantize(w / smooth, spec), smooth, product=product)
            found["int8, per token, smoothed"] = relative_error(out, exact)
    return found


def relative_error(got: jax.Array, exact: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--features", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--outputs", type=int, default=256)
    options = parser.parse_args(argv)
    if options.features % 128:
        parser.error("--features: expected a multiple of 128, the largest group")
    print(
        f"{options.rows} x {options.features} @ {options.features} x {options.outputs} on {jax.devices()[0].device_kind}"
    )
    print(f"{'activation and weight':28s} error against float32")
    for name, error in errors(options.rows, options.features, options.outputs).items():
        print(f"{name:28s} {error:.2%}")


if __name__ == "__main__":
    main()
