"""The launcher over the real NVIDIA driver, without any compiler of ours: the driver itself compiles the PTX below.

Streams, graphs and several devices, which the fake driver cannot show. On ROCm, which takes no assembly text, the kernels' own
GPU tests go through the launcher.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm import _native
from jaxnorm._compile.code_object import CodeObject
from jaxnorm._native import Kernel

pytestmark = pytest.mark.gpu

# wire(src, null, i32, i64, f32, dst, scratch, scratch): see fake_driver.c, for the same check without a GPU.
# meet(count, n): each block adds one to count[0] and waits until it is n; then count[1 + block] = 1.
# add_one(src, dst, n): dst[i] = src[i] + 1 with dynamic shared memory in between.
PTX = rb"""
.version 7.0
.target sm_80
.address_size 64
.extern .shared .align 4 .b8 room[];

.visible .entry wire(.param .u64 src, .param .u64 none, .param .u32 small, .param .u64 wide, .param .f32 real, .param .u64 dst,
                     .param .u64 scratch0, .param .u64 scratch1)
{
  .reg .b64 %p<8>; .reg .b32 %r<12>; .reg .pred %q<4>;
  ld.param.u64 %p1, [src];
  cvta.to.global.u64 %p1, %p1;
  ld.param.u64 %p2, [dst];
  cvta.to.global.u64 %p2, %p2;
  ld.global.u32 %r1, [%p1];
  st.global.u32 [%p2], %r1;
  ld.param.u64 %p3, [none];
  setp.eq.u64 %q1, %p3, 0;
  selp.u32 %r2, 1, 0, %q1;
  st.global.u32 [%p2+4], %r2;
  ld.param.u32 %r3, [small];
  st.global.u32 [%p2+8], %r3;
  ld.param.u64 %p4, [wide];
  mov.b64 {%r4, %r5}, %p4;
  st.global.u32 [%p2+12], %r4;
  st.global.u32 [%p2+16], %r5;
  ld.param.u32 %r6, [real];
  st.global.u32 [%p2+20], %r6;
  ld.param.u64 %p5, [scratch0];
  setp.eq.u64 %q2, %p5, 0;
  selp.u32 %r7, 1, 0, %q2;
  st.global.u32 [%p2+24], %r7;
  ld.param.u64 %p6, [scratch1];
  setp.eq.u64 %q3, %p6, 0;
  selp.u32 %r8, 1, 0, %q3;
  st.global.u32 [%p2+28], %r8;
  ret;
}

.visible .entry add_one(.param .u64 src, .param .u64 dst, .param .u32 n)
{
  .reg .b64 %p<6>; .reg .b32 %r<10>; .reg .f32 %f<3>; .reg .pred %q<2>;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.u32 %r4, %r1, %r2, %r3;
  ld.param.u32 %r5, [n];
  setp.ge.u32 %q1, %r4, %r5;
  @%q1 bra done;
  mul.wide.u32 %p1, %r4, 4;
  ld.param.u64 %p2, [src];
  cvta.to.global.u64 %p2, %p2;
  add.u64 %p2, %p2, %p1;
  ld.param.u64 %p3, [dst];
  cvta.to.global.u64 %p3, %p3;
  add.u64 %p3, %p3, %p1;
  ld.global.f32 %f1, [%p2];
  mov.u32 %r6, room;
  shl.b32 %r7, %r3, 2;
  add.u32 %r6, %r6, %r7;
  st.shared.f32 [%r6], %f1;
  ld.shared.f32 %f2, [%r6];
  add.f32 %f2, %f2, 0f3F800000;
  st.global.f32 [%p3], %f2;
done:
  ret;
}

.visible .entry meet(.param .u64 count, .param .u32 n)
{
  .reg .b64 %p<4>; .reg .b32 %r<6>; .reg .pred %q<2>;
  ld.param.u64 %p1, [count];
  cvta.to.global.u64 %p1, %p1;
  ld.param.u32 %r1, [n];
  red.release.gpu.global.add.u32 [%p1], 1;
again:
  ld.acquire.gpu.global.u32 %r2, [%p1];
  setp.lt.u32 %q1, %r2, %r1;
  @%q1 bra again;
  mov.u32 %r3, %ctaid.x;
  mul.wide.u32 %p2, %r3, 4;
  add.u64 %p3, %p1, %p2;
  mov.u32 %r4, 1;
  st.global.u32 [%p3+4], %r4;
  ret;
}
""".lstrip()


@pytest.fixture(autouse=True)
def cuda():
    if "rocm" in jax.devices()[0].client.platform_version.lower():
        pytest.skip("needs cuda: the kernels are PTX")
    if not _native.status().ok:
        pytest.skip(f"needs launcher: {_native.status().reason}")


def code(name, threads=1, shared=0, image=PTX):
    return CodeObject(image=image, name=name, target="sm_80", threads=threads, shared=shared, source_key="")


def add_one(x, shared=1024, threads=256):
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    c, grid = code("add_one", threads, shared), (-(-x.size // threads), 1, 1)
    return _native.launch([Kernel(c, grid, "ppi", (x.size,))], [x], out)[0]


def test_parameters_in_order():
    wide, bits = -(3 << 32) - 7, int(np.float32(1e-6).view(np.uint32))
    out = [jax.ShapeDtypeStruct((8,), jnp.int32)]

    def f(x):
        return _native.launch([Kernel(code("wire"), (1, 1, 1), "pnilfp", (-5, wide, bits))], [x], out)[0]

    got = jax.jit(f)(jnp.array([41, 42], jnp.int32))
    assert got.tolist() == [41, 1, -5, *np.array([wide]).view(np.int32).tolist(), bits, 1, 1]


@pytest.mark.parametrize("shared_kib", [1, 48, 100, 64])
def test_shared_memory(shared_kib):
    x = jnp.arange(1000, dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: add_one(x, shared_kib << 10))(x), np.arange(1000) + 1)


def test_first_call_inside_a_loop():
    """The module is loaded before XLA records anything, also when the first launch of a kernel is in a captured loop."""
    fresh = PTX + b"\n// loaded by this test only\n"
    out = [jax.ShapeDtypeStruct((4096,), jnp.float32)]

    def step(_, x):
        return _native.launch([Kernel(code("add_one", 256, 1024, fresh), (16, 1, 1), "ppi", (4096,))], [x], out)[0]

    f = jax.jit(lambda x: jax.lax.fori_loop(0, 50, step, x))
    for _ in range(3):
        np.testing.assert_array_equal(f(jnp.zeros(4096)), np.full(4096, 50))


def test_a_long_chain_many_times():
    def chain(x):
        for _ in range(64):
            x = add_one(x)
        return x

    f = jax.jit(chain)
    for start in range(20):  # Other buffers each time: a recorded graph must not keep the old ones.
        np.testing.assert_array_equal(f(jnp.full(5000, float(start))), np.full(5000, start + 64))


@pytest.mark.parametrize(("blocks", "meet"), [(128, True), (1 << 16, False)])
def test_blocks_that_meet(blocks, meet):
    """Where there is room for all, in a captured loop; else the launch of two that stands in, which waits for nobody."""
    out = [jax.ShapeDtypeStruct((blocks + 1,), jnp.int32)]
    kernels = [
        Kernel(code("meet"), (grid, 1, 1), "pi", (wait,), (1,), meeting=sign * blocks)
        for grid, wait, sign in ((blocks, blocks, 1), (2, 0, -1))
    ]

    def step(_, x):  # 20 times from zeros, which the kernel finds in the buffer of its result
        return x + _native.launch(kernels, [x * 0], out, aliases={0: 0})[0]

    got = jax.jit(lambda x: jax.lax.fori_loop(0, 20, step, x))(jnp.zeros(blocks + 1, jnp.int32))
    there = blocks if meet else 2
    want = np.where(np.arange(blocks + 1) <= there, 20, 0)
    want[0] = 20 * there
    np.testing.assert_array_equal(got, want)


@pytest.mark.multigpu
def test_every_device():
    f = jax.jit(lambda x: add_one(add_one(x)))
    results = [f(jax.device_put(np.full(777, float(i), np.float32), d)) for i, d in enumerate(jax.devices())]
    for i, result in enumerate(results):
        assert result.devices() == {jax.devices()[i]}
        np.testing.assert_array_equal(result, np.full(777, i + 2))


def test_errors_are_readable():
    x = jnp.zeros(8)

    def absent(x):
        out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        return _native.launch([Kernel(code("absent"), (1, 1, 1), "pp")], [x], out)

    with pytest.raises(Exception, match=r"kernel 'absent'.*CUDA_ERROR_NOT_FOUND \(500\)"):
        jax.block_until_ready(jax.jit(absent)(x))
    with pytest.raises(Exception, match=r"kernel 'add_one'.*shared memory.*cuFuncSetAttribute: CUDA_ERROR"):
        jax.block_until_ready(jax.jit(lambda x: add_one(x, shared=1 << 20))(x))
    # The device is still usable.
    np.testing.assert_array_equal(add_one(x), np.ones(8))
