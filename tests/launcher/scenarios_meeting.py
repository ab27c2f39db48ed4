"""Scenarios of launches whose blocks all run at the same time, and of those that stand in for them."""

import jax
import numpy as np
from recorded import Fake, X, code, error_of, expect, like, scenario

from jaxnorm import _native
from jaxnorm._native import Kernel


def meet(c, blocks, stand_ins=None):
    """X copied by so many blocks that meet, or by two launches of 13 and 17 that stand in for them, the second overlapping."""
    stand_ins = ((13, -blocks, False), (17, -blocks, True)) if stand_ins is None else stand_ins

    def f(x):
        launches = ((blocks, blocks, False), *stand_ins)
        kernels = [Kernel(c, (n, 1, 1), "ppi", (x.nbytes,), (0, 1), o, m) for n, m, o in launches]
        return _native.launch(kernels, [x], [like(x)])[0]

    return jax.jit(f)


@scenario("cuda")
def blocks_meet_where_all_have_room():
    """Four multiprocessors with room for two: eight blocks, twice. Then no launch that stands in, else no other."""
    for blocks, launches, together, overlaps, last in ((8, 1, 1, 0, 8), (9, 2, 0, 1, 17)):
        fake, f = Fake(), meet(code(image=b"\x7fELF meet %d" % blocks, shared=100 << 10), blocks)
        for times in (1, 2):
            np.testing.assert_array_equal(f(X), X)
            assert fake.counts() == {"loads": 1, "lookups": 1, "raises": 1, "launches": launches * times}
            assert (fake.together(), fake.overlaps()) == (together * times, overlaps * times)
        assert fake.last()[0] == last and fake.last()[6] == 100 << 10


@scenario("cuda")
def room_is_that_of_the_launch():
    """One function with blocks of several sizes, in any order: 200 KiB leave room for 4, 60 KiB for 12, 1024 threads for 8."""
    fake, image = Fake(), b"\x7fELF sizes of blocks"
    sizes = {
        4: code(image=image, shared=200 << 10),
        12: code(image=image, shared=60 << 10),
        8: code(image=image, threads=1024),
    }
    calls = [(meet(c, n), n <= room) for room, c in sizes.items() for n in (room, room + 1)]
    for f, there in (*calls, *reversed(calls)):
        before = fake.together()
        np.testing.assert_array_equal(f(X), X)
        assert fake.together() - before == there
    assert fake.counts()["raises"] == 1 and fake.counts()["launches"] == 2 * (3 + 3 * 2)


@scenario("cuda")
def a_driver_that_finds_no_room_after_all():
    """Launches stand in where it says so or knows no such launch; another status is an error."""
    fake, f = Fake(), meet(code(), 4)
    for status in (720, 801):
        fake.library.fake_fail(b"together", status)
        np.testing.assert_array_equal(f(X), X)
        assert fake.last()[0] == 17
    assert fake.together() == 0 and fake.counts()["launches"] == 4
    fake.library.fake_fail(b"together", 2)
    expect(error_of(f, X), "kernel 'copy'", "CUDA_ERROR_OUT_OF_MEMORY", "grid (4, 1, 1)")
    np.testing.assert_array_equal(f(X), X)
    assert fake.together() == 1 and fake.counts()["launches"] == 5


@scenario("hip")
def no_blocks_meet():
    """HIP, and drivers without launches with attributes: what stands in is launched, none of it overlapping."""
    fake, f = Fake(), meet(code(), 1)
    for launches in (2, 4):
        np.testing.assert_array_equal(f(X), X)
        assert fake.counts()["launches"] == launches and fake.last()[0] == 17
    assert fake.together() == fake.overlaps() == 0


@scenario()
def meeting_without_a_match():
    fake, c = Fake(), code()
    for f, part in (
        (meet(c, 8, ()), "meeting[0]: got 8, expected -8 behind it"),
        (meet(c, 8, ((13, 0, False), (13, -8, False))), "meeting[0]: got 8, expected -8 behind it"),
        (meet(c, 8, ((13, -8, False), (13, -9, False))), "meeting[2]: got -9, expected 9 before it"),
        (meet(c, 8, ((9, 8, False), (13, -8, False))), "meeting: got 8, expected its 9 blocks"),
    ):
        expect(error_of(f, X), "jaxnorm: kernel 'copy", part)
    assert fake.counts()["launches"] == 0
