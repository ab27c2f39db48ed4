"""Triton kernels without our launcher: the message of jaxlib's own call, and jax-triton."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import needs
import pytest
from jaxnorm.kernels.configs import Problem, rmsnorm_triton

from jaxnorm._compile import jax_triton_bridge, jaxlib_proto
from jaxnorm._compile.code_object import CodeObject
from jaxnorm.errors import UnsupportedError


def problem(target: str, rows=8, features=1024) -> Problem:
    shape = (rows, features)
    return Problem("rmsnorm_fwd", rows, features, (("x", shape), ("weight", (features,)), ("y", shape)),
                   (("x", "bfloat16"), ("weight", "bfloat16"), ("y", "bfloat16")),
                   (("eps", 1e-6), ("weight_offset", 0.0), ("cast", "output"), ("residual_rounding", "float32")),
                   target)  # fmt: skip


def gpu_triton():
    """jaxlib's encoder, which comes with a CUDA plugin wheel and works without a GPU."""
    try:
        from jaxlib import gpu_triton

        gpu_triton.TritonKernel  # noqa: B018
    except (ImportError, AttributeError) as e:
        needs.need("jaxlib_gpu_triton", False, f"no CUDA plugin wheel ({e})")
    return gpu_triton


def test_the_message_is_byte_for_byte_what_jaxlib_writes():
    encoder = gpu_triton()
    values = [(7, "i32"), (-7, "i32"), (1e-6, "fp32"), (True, "B"), (-1, "i64"), (2.5, "fp64")]
    params = [encoder.create_array_parameter(0, 16), encoder.create_array_parameter(4096, 16)]
    params += [encoder.create_scalar_parameter(v, k) for v, k in values]
    theirs = encoder.TritonKernelCall(encoder.TritonKernel("kern", 4, 1, 1234, "PTXTEXT", "TTIR", 90), 5, 6, 1, params)
    ours = jaxlib_proto.kernel_call(
        jaxlib_proto.kernel("kern", 4, 1, 1234, "PTXTEXT", "TTIR", 90),
        (5, 6, 1),
        [
            jaxlib_proto.array_param(0),
            jaxlib_proto.array_param(4096),
            *(jaxlib_proto.scalar_param(k, v) for v, k in values),
        ],
    )
    assert jaxlib_proto.any_call(ours, "nm", b"md") == theirs.to_proto("nm", b"md")


def test_jaxlib_reads_a_message_with_an_image():
    encoder = gpu_triton()
    kernel = jaxlib_proto.kernel("k", 4, 1, 0, "hash", "", 0, image=b"\x7fELF" * 100)
    message = jaxlib_proto.any_call(jaxlib_proto.kernel_call(kernel, (1,), [jaxlib_proto.array_param()]), "k", b"META")
    assert encoder.get_serialized_metadata(zlib.compress(message)) == b"META"


def fields(message: bytes) -> dict[int, list]:
    """Fields of a protobuf message by number: a reader that shares nothing with the writer."""
    found: dict[int, list] = {}
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        else:
            size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            value = message[at : at + size]
            at += size
        found.setdefault(tag >> 3, []).append(value)
    return found


@pytest.mark.parametrize(("target", "platform", "threads", "warps", "capability"), [
    ("sm_90", "cuda", 128, 4, 90), ("gfx942", "rocm", 256, 4, None), ("gfx1100", "rocm", 128, 2, None),
])  # fmt: skip
def test_what_the_message_says(target, platform, threads, warps, capability):
    """On gfx1100 half the waves: jaxlib multiplies by 64 lanes whatever the chip."""
    p = problem(target)
    launch = rmsnorm_triton.plan(p)[0]
    code = CodeObject(b"\x7fELFimage", "rmsnorm_fwd", target, threads, 4096, "key")
    call = fields(zlib.decompress(jaxlib_proto.ffi_arguments(code, launch, p, platform)["opaque"]))
    call = fields(call[1][0])
    kernel = fields(call[1][0])
    assert [call[i][0] for i in (2, 3, 4)] == list(launch.grid)
    assert len(call[5]) == len(launch.inputs) + len(launch.scalars) + len(launch.outputs)
    assert fields(call[5][3]) == {3: [8]}  # M, after three pointers
    assert kernel[1] == [b"rmsnorm_fwd"]
    assert kernel[2] == [warps]
    assert kernel[3] == [4096]
    assert kernel.get(6, [None]) == [capability]
    assert fields(kernel[11][0])[1] == [code.image]


def test_a_workgroup_that_jaxlib_cannot_launch_is_refused():
    code = CodeObject(b"\x7fELF", "k", "gfx1100", 32, 0, "key")
    p = problem("gfx1100")
    with pytest.raises(ValueError, match=r"32 threads on gfx1100.*multiples of 64"):
        jaxlib_proto.ffi_arguments(code, rmsnorm_triton.plan(p)[0], p, "rocm")


def test_no_plan_has_such_a_workgroup():
    for features in (1, 100, 1024, 1500, 8192, 100000):
        for launch in rmsnorm_triton.plan(problem("gfx1100", features=features)):
            assert launch.num_warps % jaxlib_proto.fewest_warps("gfx1100") == 0


@pytest.mark.parametrize(("versions", "platform", "reason"), [
    (((0, 3, 1), (0, 10, 2), (3, 6, 0)), "cuda", ""),
    (((0, 3, 1), (0, 11, 2), (3, 6, 0)), "cuda", ""),
    (((0, 3, 1), (0, 10, 2), (3, 6, 0)), "rocm", ""),
    (((0, 3, 1), (0, 10, 2), (3, 9, 0)), "cuda", ""),
    (((0, 3, 1), (0, 10, 2), (3, 9, 0)), "rocm", "KeyError 'num_ctas'"),
    (((0, 4, 1), (0, 11, 2), (3, 9, 0)), "cuda", ""),
    (((0, 4, 1), (0, 11, 2), (3, 9, 0)), "rocm", "KeyError 'num_ctas'"),
    (((0, 4, 1), (0, 11, 2), (3, 6, 0)), "cuda", "GPUTarget"),
    (((0, 4, 1), (0, 12, 0), (3, 9, 0)), "cuda", "wants jax 0.11"),
    (((0, 3, 0), (0, 10, 2), (3, 6, 0)), "cuda", "never tried"),
    (((0, 5, 0), (0, 11, 2), (3, 9, 0)), "cuda", "never tried"),
])  # fmt: skip
def test_combinations_of_versions(versions, platform, reason):
    refusal = jax_triton_bridge._refusal(*versions, platform)
    assert (reason in refusal) if reason else not refusal


def test_jax_triton_refuses_by_name(monkeypatch):
    monkeypatch.setattr(jax_triton_bridge, "available", lambda platform: (True, "", ""))
    p = problem("gfx1100")
    with pytest.raises(UnsupportedError, match="64 lanes, gfx1100 has 32"):
        jax_triton_bridge.call(rmsnorm_triton.plan(p)[0], p, [], [])
    plain = problem("sm_90")
    coded = dataclasses.replace(plain, dtypes=(*plain.dtypes, ("values", "float8_e4m3fn")))
    with pytest.raises(UnsupportedError, match="fp8"):
        jax_triton_bridge.call(rmsnorm_triton.plan(plain)[0], coded, [], [])
    monkeypatch.setattr(jax_triton_bridge, "available", lambda platform: (False, "too old.", "Upgrade."))
    with pytest.raises(UnsupportedError, match=r"too old\. Upgrade\."):
        jax_triton_bridge.call(rmsnorm_triton.plan(p)[0], p, [], [])


@pytest.mark.compile
@pytest.mark.parametrize("rows", [1, 8])
def test_jax_triton_lowers_every_launch(rows):
    """For CUDA from a machine without one. M = 1 on purpose: jax-triton turns an argument 1 into a constexpr."""
    usable, reason, _ = jax_triton_bridge.available("cuda")
    needs.need("jax_triton", usable, reason)
    gpu_triton()
    forward = problem("sm_90", rows)
    shape = forward.shape("x")
    backward = Problem("rmsnorm_bwd", rows, 1024,
                       (("n", shape), ("weight", (1024,)), ("rstd", (rows,)), ("dy", shape), ("dx", shape), ("dweight", (1024,))),
                       (("n", "bfloat16"), ("weight", "bfloat16"), ("rstd", "float32"), ("dy", "bfloat16"), ("dx", "bfloat16"),
                        ("dweight", "float32")), (("weight_offset", 0.0),), "sm_90")  # fmt: skip
    for p in (forward, backward):
        for launch in rmsnorm_triton.plan(p):
            known = {n: jax.ShapeDtypeStruct(p.shape(n), p.dtype(n)) for n, _ in p.dtypes}
            known |= {n: jax.ShapeDtypeStruct(s, d) for n, s, d in launch.temps}
            known |= {"dweight_share": jax.ShapeDtypeStruct((2, 1024), jnp.float32)}
            stand_in = jax.ShapeDtypeStruct((1,), jnp.bfloat16)
            outs = [known.get(n, stand_in) for n in launch.outputs]
            args = [known.get(n, stand_in) for n in launch.inputs]
            f = jax.jit(lambda *a, launch=launch, p=p, outs=outs: jax_triton_bridge.call(launch, p, a, outs))
            text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            assert "triton_kernel_call" in text
