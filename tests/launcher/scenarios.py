"""Drives a host build of the launcher over a fake driver, under jit on the CPU platform.

``python scenarios.py LIBRARY hip|cuda [NAME...]`` runs the named scenarios (default: all of that vendor) and prints one JSON line
for each: its name and its traceback, null when it passed. The name ``error`` alone prints the error of one plain launch.
"""

import ctypes
import json
import sys
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import scenarios_meeting  # noqa: F401 (adds its own)
from recorded import FAKES, Fake, X, code, copy, error_of, expect, like, scenario, scenarios, use, vendor  # noqa: F401

from jaxnorm import _native
from jaxnorm._native import Kernel


@scenario()
def one_load_for_many_runs():
    fake, c = Fake(), code(shared=2048)
    f = jax.jit(lambda x: copy(c, x)[0])
    for _ in range(5):
        np.testing.assert_array_equal(f(X), X)
    assert fake.counts() == {"loads": 1, "lookups": 1, "raises": 0, "launches": 5}


@scenario()
def grid_block_and_shared_memory():
    for threads in (1, 96, 1024):
        fake, c = Fake(), code(shared=2048, threads=threads)
        jax.block_until_ready(copy(c, X, grid=(7, 5, 2)))
        assert fake.last() == [7, 5, 2, threads, 1, 1, 2048, 0], fake.last()


@scenario()
def parameters_in_order():
    c = code("wire")
    values = [-5, -(3 << 32) - 7, int(np.float32(1e-6).view(np.uint32))]
    out = [jax.ShapeDtypeStruct((8,), jnp.int32)]
    x = jnp.array([41, 42], jnp.int32)
    got = jax.jit(lambda x: _native.launch([Kernel(c, (1, 1, 1), "pnilfp", tuple(values))], [x], out)[0])(x)
    wide = np.array([values[1]], np.int64).view(np.int32).tolist()
    assert got.tolist() == [41, 1, -5, *wide, values[2], 1, 1], got


@scenario()
def call_sites_share_a_module():
    fake, one, other = Fake(), code(image=b"\x7fELFshared"), code("another", image=b"\x7fELFshared")
    twice = jax.jit(lambda x: copy(one, copy(one, x)[0])[0])
    np.testing.assert_array_equal(twice(X), X)
    np.testing.assert_array_equal(jax.jit(lambda x: copy(one, x)[0] + 1)(X), X + 1)
    jax.block_until_ready(jax.jit(lambda x: copy(other, x))(X))
    assert fake.counts() == {"loads": 1, "lookups": 2, "raises": 0, "launches": 4}


@scenario()
def one_load_for_each_device():
    fake, c = Fake(), code()
    f = jax.jit(lambda x: copy(c, x)[0])
    try:
        for device in (0, 1, 0, 1):  # The fake refuses a function of the other device.
            fake.device(device)
            np.testing.assert_array_equal(f(X), X)
    finally:
        fake.device(0)
    assert fake.counts() == {"loads": 2, "lookups": 2, "raises": 0, "launches": 4}


@scenario()
def concurrent_calls():
    fake, c = Fake(), code()
    f = jax.jit(lambda x: copy(c, x)[0]).lower(X).compile()
    barrier, failures = threading.Barrier(8), []

    def work(i):
        fake.device(i % 4)
        barrier.wait()
        try:
            for _ in range(100):
                np.testing.assert_array_equal(f(X), X)
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
    assert fake.counts() == {"loads": 4, "lookups": 4, "raises": 0, "launches": 800}


@scenario("cuda")
def large_shared_memory_is_asked_for_and_never_lowered():
    fake = Fake()
    small, large, middle = (code(image=b"\x7fELFlarge", shared=s << 10) for s in (48, 200, 100))
    calls = [jax.jit(lambda x, c=c: copy(c, x)[0]) for c in (small, large, middle)]
    for call in (*calls, calls[1]):
        np.testing.assert_array_equal(call(X), X)
    assert fake.counts() == {"loads": 1, "lookups": 1, "raises": 1, "launches": 4}


@scenario("cuda")
def large_clusters_are_allowed():
    """Once for each function; a driver that does not know them is no obstacle."""
    fake = Fake()
    before, codes = fake.library.fake_large_clusters(), [code(image=b"\x7fELFcluster%d" % i) for i in range(2)]
    calls = [jax.jit(lambda x, c=c: copy(c, x)[0]) for c in codes]
    for call in (*calls, *calls):
        np.testing.assert_array_equal(call(X), X)
    assert fake.library.fake_large_clusters() - before == 2


@scenario("cuda")
def too_much_shared_memory():
    c = code(shared=300 << 10)
    expect(error_of(lambda x: copy(c, x), X), "kernel 'copy'", str(300 << 10), "cuFuncSetAttribute", "sm_90")


@scenario()
def no_current_device():
    fake, c = Fake(), code()
    fake.device(-1)
    try:
        expect(error_of(lambda x: copy(c, x), X), "kernel 'copy'", "no current device")
    finally:
        fake.device(0)


@scenario()
def empty_grid_is_no_launch():
    for grid in ((0, 1, 1), (3, 0, 1), (3, 1, 0)):
        fake, c = Fake(), code(image=b"nobody loads this")
        jax.block_until_ready(jax.jit(lambda x, c=c, g=grid: copy(c, x, grid=g))(X))
        assert fake.counts() == {"loads": 0, "lookups": 0, "raises": 0, "launches": 0}


def chain(*codes, overlaps=(False, True), grids=((3, 1, 1), (3, 1, 1))):
    """X copied to scratch by the first kernel, and from there to the result by the second, in one call."""

    def f(x):
        kernels = [
            Kernel(c, grid, "ppi", (x.nbytes,), buffers, o)
            for c, grid, buffers, o in zip(codes, grids, ((0, 1), (1, 2)), overlaps, strict=True)
        ]
        return _native.launch(kernels, [x], [like(x), like(x)])[1]

    return jax.jit(f)


@scenario()
def kernels_of_one_call_share_its_buffers():
    fake, first, second = Fake(), code("copy"), code("wide_copy", shared=1024, threads=64)
    np.testing.assert_array_equal(chain(first, second, grids=((3, 1, 1), (5, 2, 1)))(X), X)
    assert fake.counts() == {"loads": 2, "lookups": 2, "raises": 0, "launches": 2}
    assert fake.last() == [5, 2, 1, 64, 1, 1, 1024, 0], fake.last()


@scenario()
def only_launches_behind_others_of_their_call_overlap():
    """And none on HIP, which has no such launch."""
    fake, first, second = Fake(), code("copy"), code("wide_copy")
    f = chain(first, second)
    for expected in (1, 2):
        np.testing.assert_array_equal(f(X), X)
        assert fake.overlaps() == (expected if vendor() == "cuda" else 0)
    chain(first, second, overlaps=(True, False))(X)  # the first of a call never
    chain(first, second, grids=((0, 1, 1), (3, 1, 1)))(X)  # nor the first that is there
    chain(first, second, overlaps=(False, False))(X)
    assert fake.overlaps() == (2 if vendor() == "cuda" else 0)
    assert fake.counts()["launches"] == 9


@scenario("cuda")
def a_driver_that_refuses_to_overlap():
    """CUDA_ERROR_NOT_SUPPORTED is an ordinary launch instead, another status an error."""
    fake, f = Fake(), chain(code("copy"), code("wide_copy"))
    fake.library.fake_fail(b"overlap", 801)
    np.testing.assert_array_equal(f(X), X)
    assert fake.overlaps() == 0 and fake.counts()["launches"] == 2
    fake.library.fake_fail(b"overlap", 2)
    expect(error_of(f, X), "kernel 'wide_copy'", "CUDA_ERROR_OUT_OF_MEMORY")
    np.testing.assert_array_equal(f(X), X)


@scenario()
def a_second_kernel_that_is_wrong():
    """The error names it; too few names, sizes or scalars for all are errors."""
    good, bad = code("copy"), code("copy", image=b"\x7fELFbad", threads=2048)
    expect(error_of(chain(good, bad), X), "threads: got 2048")
    fail = code("fail", threads=32)
    expect(error_of(chain(good, fail), X), "kernel 'fail'", "block 32", "(719)")
    short = [Kernel(good, (1, 1, 1), "ppi", (8,)), Kernel(good, (1, 1, 1), "ppi", (), (0, 1))]
    expect(error_of(lambda x: _native.launch(short, [x], [like(x)]), X), "scalars: got 0, expected 1")


@scenario()
def no_scalars_and_an_alias():
    fake, c = Fake(), code("nothing")
    f = jax.jit(lambda x: _native.launch([Kernel(c, (1, 1, 1), "pp")], [x], [like(x)], {0: 0})[0])
    np.testing.assert_array_equal(
        f(X), X
    )  # The kernel does nothing: the result is the operand's buffer, or a copy of it.
    assert fake.counts()["launches"] == 1


@scenario()
def invalid_image():
    c = code(image=b"nonsense")
    name = "hipErrorNoBinaryForGpu (209)" if vendor() == "hip" else "CUDA_ERROR_INVALID_IMAGE (200)"
    expect(error_of(lambda x: copy(c, x), X), "kernel 'copy'", "cannot load", "8 bytes", name, "some failure", c.target)


NAMES = {
    2: ("hipErrorOutOfMemory (2): out of memory", "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"),
    100: ("hipErrorNoDevice (100)", "CUDA_ERROR_NO_DEVICE (100)"),
}


def _injected(call, status, *parts):
    """The next driver call of a kind fails: a clear error, and the same call site works when it is run again."""
    fake, c = Fake(), code(shared=0)
    c = code(image=c.image + f"{call} {status}".encode(), threads=64)
    f = jax.jit(lambda x: copy(c, x)[0])
    fake.library.fake_fail(call.encode(), status)
    try:
        jax.block_until_ready(f(X))
    except Exception as e:
        expect(
            str(e),
            "jaxnorm: kernel 'copy'",
            NAMES[status][vendor() == "cuda"],
            c.target,
            "grid (3, 1, 1)",
            "block 64",
            *parts,
        )
    else:
        raise AssertionError("no error")
    np.testing.assert_array_equal(f(X), X)
    return fake.counts()


@scenario()
def out_of_memory_when_a_module_is_loaded():
    counts = _injected("load", 2, "cannot load its code object", "ModuleLoadData")
    assert counts == {"loads": 1, "lookups": 1, "raises": 0, "launches": 1}, "the refused module is not kept"


@scenario()
def out_of_memory_when_a_function_is_looked_up():
    counts = _injected("function", 2, "not in its code object", "ModuleGetFunction")
    assert counts == {"loads": 1, "lookups": 1, "raises": 0, "launches": 1}, "the module is kept, not loaded again"


@scenario()
def out_of_memory_at_the_launch():
    counts = _injected("launch", 2, "LaunchKernel", "shared memory 0 bytes")
    assert counts == {"loads": 1, "lookups": 1, "raises": 0, "launches": 1}


@scenario()
def the_device_is_gone():
    assert _injected("device", 100, "no current device")["loads"] == 1


@scenario("cuda")
def shared_memory_refused_once():
    """A limit that could not be raised counts as not raised."""
    fake, c = Fake(), code(shared=100 << 10)
    fake.library.fake_fail(b"attribute", 2)
    expect(error_of(lambda x: copy(c, x), X), "too much shared memory", "cuFuncSetAttribute", NAMES[2][1])
    jax.block_until_ready(jax.jit(lambda x: copy(c, x))(X))
    assert fake.counts() == {"loads": 1, "lookups": 1, "raises": 2, "launches": 1}


@scenario()
def unknown_kernel():
    c = code("absent")
    call = "hipModuleGetFunction" if vendor() == "hip" else "cuModuleGetFunction"
    expect(error_of(lambda x: copy(c, x), X), "kernel 'absent'", "not in its code object", call, "(500)")


@scenario()
def launch_error():
    c = code("fail", shared=64, threads=128)
    name = "hipErrorLaunchFailure (719)" if vendor() == "hip" else "CUDA_ERROR_LAUNCH_FAILED (719)"
    text = error_of(lambda x: copy(c, x, grid=(3, 2, 1)), X)
    expect(
        text,
        "kernel 'fail'",
        name,
        "unspecified launch failure",
        "grid (3, 2, 1)",
        "block 128",
        "shared memory 64 bytes",
    )


@scenario()
def what_does_not_fit_together():
    fake, c = Fake(), code()
    for kw, parts in (
        ({"layout": "pp"}, ("scalars: got 1, expected 0",)),
        ({"buffers": (0, 2)}, ("buffers: got 2", "2 operands and results")),
        ({"buffers": (-1, 1)}, ("buffers: got -1",)),
        ({"buffers": (0,)}, ("layout: got 'ppi' with 2 buffers, expected 1",)),
        ({"layout": "ppii"}, ("scalars: got 1, expected 2",)),
        ({"layout": "ppx"}, ("layout: got 'ppx'", "p, n, i, l and f")),
        ({"layout": "pppi"}, ("buffers: got 2",)),
        ({"layout": "p" * 65}, ("layout: got 65 parameters", "at most 64")),
        ({"scalars": (1 << 32,)}, ("scalars[0]: got 4294967296", "32 bits")),
        ({"scalars": (-(1 << 31) - 1,)}, ("scalars[0]: got -2147483649",)),
        ({"grid": (1 << 31, 1, 1)}, ("grid[0]: got 2147483648",)),
        ({"grid": (1, 65536, 1)}, ("grid[1]: got 65536", "0 to 65535")),
        ({"grid": (1, 1, 65536)}, ("grid[2]: got 65536", "0 to 65535")),
        ({"grid": (-1, 1, 1)}, ("grid[0]: got -1",)),
        ({"grid": (1, 1)}, ("grid: got 2 sizes, expected 3",)),
    ):
        expect(error_of(lambda x, kw=kw: copy(c, x, **kw), X), "jaxnorm: kernel 'copy'", *parts)
    for bad, part in (
        (code(threads=0), "threads: got 0"),
        (code(threads=1025), "threads: got 1025"),
        (code(shared=-1), "shared: got -1"),
    ):
        expect(error_of(lambda x, bad=bad: copy(bad, x), X), "kernel 'copy'", part)
    assert fake.counts()["launches"] == 0


@scenario()
def the_largest_grid():
    # HIP counts threads in 32 bits, CUDA blocks in 31.
    c, largest = code(threads=1024), (2**32 - 1) // 1024 if vendor() == "hip" else 2**31 - 1
    fake = Fake()
    jax.block_until_ready(copy(c, X, grid=(largest, 65535, 65535)))
    assert fake.last()[:3] == [largest, 65535, 65535]
    expect(
        error_of(lambda x: copy(c, x, grid=(largest + 1, 1, 1)), X),
        f"grid[0]: got {largest + 1}, expected 0 to {largest}",
    )


@scenario()
def sixty_four_parameters():
    fake, c = Fake(), code("nothing")
    jax.block_until_ready(jax.jit(lambda x: copy(c, x, layout="pp" + "n" * 30 + "l" * 32, scalars=tuple(range(32))))(X))
    assert fake.counts()["launches"] == 1


def main():
    library, by, *names = sys.argv[1:]
    use(by)
    # Work runs in the thread that called, so that a Python thread can choose the fake driver's device.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _native.register(ctypes.CDLL(library), "cpu")
    _native._status = _native.Status(True, "host build", "", library)
    if names == ["error"]:
        print(error_of(lambda x: copy(code(), x), X))
        return
    for name, (function, vendors) in scenarios.items():
        if name not in names if names else vendor() not in vendors:
            continue
        try:
            function()
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    main()
