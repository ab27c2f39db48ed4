"""What the scenarios of the launcher share: the fake driver and what it recorded, code objects for it, the list of scenarios."""

import ctypes
import sys

import jax
import numpy as np

from jaxnorm import _native
from jaxnorm._compile.code_object import CodeObject
from jaxnorm._native import Kernel

FAKES = {"hip": "libamdhip64.so.7", "cuda": "libcuda.so.1"}
X = np.arange(24, dtype=np.float32).reshape(3, 8)
scenarios = {}
_vendors = []


def vendor():
    """``hip`` or ``cuda``, of this process."""
    return _vendors[-1]


def use(name):
    _vendors.append(name)


def scenario(*vendors):
    def add(function):
        scenarios[function.__name__] = (function, vendors or ("hip", "cuda"))
        return function

    return add


class Fake:
    """What the launcher has asked of the fake driver since this object was made."""

    def __init__(self):
        self.library = ctypes.CDLL(FAKES[vendor()])
        self.before = self._read("fake_counts", 4)
        self.overlapped, self.met = self.library.fake_overlaps(), self.library.fake_together()

    def _read(self, name, n):
        out = (ctypes.c_int * n)()
        getattr(self.library, name)(out)
        return np.array(out[:])

    def counts(self):
        return dict(
            zip(
                ("loads", "lookups", "raises", "launches"),
                (self._read("fake_counts", 4) - self.before).tolist(),
                strict=True,
            )
        )

    def overlaps(self):
        return self.library.fake_overlaps() - self.overlapped

    def together(self):
        return self.library.fake_together() - self.met

    def last(self):
        return self._read("fake_last", 8).tolist()

    def device(self, d):
        self.library.fake_set_device(d)


def code(name="copy", image=b"", shared=0, threads=256):
    """A code object that no other scenario uses unless it asks for the same image."""
    target = "gfx942" if vendor() == "hip" else "sm_90"
    image = image or f"\x7fELF {sys._getframe(1).f_code.co_name} {name}".encode()
    return CodeObject(image=image, name=name, target=target, threads=threads, shared=shared, source_key="")


def copy(c, x, *, grid=(3, 1, 1), layout="ppi", scalars=None, buffers=None):
    scalars = (x.size * x.dtype.itemsize,) if scalars is None else scalars
    return _native.launch([Kernel(c, grid, layout, scalars, buffers)], [x], [like(x)])


def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def error_of(function, *args):
    try:
        jax.block_until_ready(jax.jit(function)(*args))
    except Exception as e:
        return str(e)
    raise AssertionError("no error")


def expect(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
