"""The launcher, an optional extension: without a working compiler the package installs without it (see ``jaxnorm.backends()``)."""

import importlib.util
import pathlib
import sys

from setuptools import Extension, setup


def xla_headers() -> list[str]:
    """XLA's FFI headers inside jaxlib, found without importing it (jax itself is not in the build environment)."""
    spec = importlib.util.find_spec("jaxlib")
    folders = [pathlib.Path(p, "include") for p in (spec.submodule_search_locations or ())] if spec else []
    found = [str(f) for f in folders if (f / "xla/ffi/api/ffi.h").is_file()]
    if not found:
        print("warning: no jaxlib with XLA's FFI headers; the launcher will not be built", file=sys.stderr)
    return found


launcher = Extension(
    "jaxnorm._launcher",
    ["csrc/launcher.cc", "csrc/distributed/fused_call.cc"],
    depends=["csrc/driver.h", "csrc/distributed/group.h", "csrc/distributed/peer_driver.h"],
    language="c++",
    py_limited_api=True,  # It has no Python in it at all: one binary for every version.
    optional=True,
    libraries=["dl"],
    # -isystem: XLA's headers are not clean under -Wall -Wextra. -g0: Python's own flags would make 2 MB of debug data.
    extra_compile_args=[
        "-std=c++17",
        "-O2",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        *(f for folder in xla_headers() for f in ("-isystem", folder)),
    ],
)

setup(ext_modules=[launcher], options={"bdist_wheel": {"py_limited_api": "cp311"}})
