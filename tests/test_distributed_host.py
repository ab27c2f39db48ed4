"""The host side of the fused distributed calls over a fake driver: see distributed_host.py."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from jaxnorm._paths import csrc_dir

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs gxx: g++ was not found")
SCENARIOS = {"values": {}, "missing": {}, "no_peer": {"FAKE_NO_PEER": "2"}, "no_memory": {"FAKE_MOST_BYTES": "1000"}}


@functools.cache
def library() -> Path:
    """The host build; a warning is an error."""
    out = Path(tempfile.mkdtemp(prefix="jaxnorm-fused-")) / "fused_host.so"
    flags = ("-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-DJAXNORM_LAUNCHER_HOST")
    source = csrc_dir() / "distributed" / "fused_call.cc"
    done = subprocess.run(["g++", *flags, "-isystem", jax.ffi.include_dir(), str(source), "-ldl", "-pthread", "-o", str(out)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]
    return out


@functools.cache
def driver() -> Path:
    code = "import distributed_host, simt_ranks; print(simt_ranks.fake_driver('sm_90', distributed_host.launches()))"
    return Path(python(code).strip().splitlines()[-1])


def python(code: str, *argv: str, **env: str) -> str:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    child = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=child, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3500:]
    return done.stdout


@pytest.mark.parametrize("name", ["values", "missing", "no_peer", pytest.param("no_memory", marks=pytest.mark.slow)])
def test_scenario(name):
    run = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = str(HERE / "distributed_host.py")
    code = f"import sys; sys.argv = [{script!r}, {str(library())!r}, {name!r}]; {run}"
    assert "SCENARIO OK" in python(code, LD_LIBRARY_PATH=str(driver()), **SCENARIOS[name])


def test_rocm(tmp_path):
    """The same over the recording fake of HIP, with failures injected: see distributed_rocm.py."""
    source = HERE / "launcher" / "fake_driver.c"
    flags = ("-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-Wl,-soname,libamdhip64.so.7")
    subprocess.run(["gcc", *flags, str(source), "-o", str(tmp_path / "libamdhip64.so.7")], check=True)
    code = "import runpy, sys; sys.argv = ['', sys.argv[1]]; runpy.run_path(%r, run_name='__main__')"
    out = python(code % str(HERE / "distributed_rocm.py"), str(library()), LD_LIBRARY_PATH=str(tmp_path), JAXNORM_FUSED_COMM="1",
                 XLA_FLAGS="--xla_force_host_platform_device_count=8")  # fmt: skip
    assert "SCENARIO OK" in out
