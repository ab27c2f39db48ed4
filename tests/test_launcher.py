"""The launcher without a GPU: a host build over a recording fake driver, and the real build as XLA and Python see it.

This shows what the launcher asks of a driver. It shows nothing about streams, graphs or real drivers: see launcher/test_on_gpu.py.
"""

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCE = ROOT / "csrc" / "launcher.cc"
FAKE = HERE / "launcher" / "fake_driver.c"
sys.path.insert(0, str(HERE / "launcher"))
import scenarios  # noqa: E402  (needs the folder above)

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("gcc")), reason="needs launcher: gcc and g++ are not here"
)


def compile_to(path, *command):
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return path


def build(folder, name, *flags):
    """The launcher, unoptimised for speed of compilation; a warning is an error."""
    flags = ("-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *flags)
    return compile_to(folder / name, "g++", *flags, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-ldl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launcher")


@pytest.fixture(scope="module")
def libraries(folder):
    """The host build and the real one, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        host = pool.submit(build, folder, "host.so", "-DJAXNORM_LAUNCHER_HOST")
        real = pool.submit(build, folder, "launcher.so")
        return host.result(), real.result()


@pytest.fixture(scope="module")
def host_library(libraries):
    return libraries[0]


@pytest.fixture(scope="module")
def library(libraries):
    return libraries[1]


@pytest.fixture(scope="module")
def fakes(folder):
    """A folder for LD_LIBRARY_PATH with both drivers."""
    flags = ("gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared")
    for name, macro in (("libamdhip64.so.7", ()), ("libcuda.so.1", ("-DFAKE_CUDA",))):
        compile_to(folder / name, *flags, *macro, f"-Wl,-soname,{name}", str(FAKE))
    return folder


def python(*args, path=None, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **env}
    if path:
        env["LD_LIBRARY_PATH"] = f"{path}:{env.get('LD_LIBRARY_PATH', '')}"
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def outcomes(host_library, fakes):
    """Vendor -> scenario -> traceback or None; one process for each vendor, since a driver stays loaded."""
    results = {}
    for vendor in scenarios.FAKES:
        done = python(HERE / "launcher" / "scenarios.py", host_library, vendor, path=fakes)
        results[vendor] = dict(json.loads(line) for line in done.stdout.splitlines())
        results[vendor]["process"] = None if done.returncode == 0 else done.stderr[-4000:]
    return results


@pytest.mark.parametrize(
    ("vendor", "name"), [(v, name) for name, (_, vendors) in scenarios.scenarios.items() for v in vendors]
)
def test_scenario(outcomes, vendor, name):
    assert outcomes[vendor]["process"] is None, outcomes[vendor]["process"]
    assert outcomes[vendor][name] is None, outcomes[vendor][name]


@pytest.mark.parametrize("vendor", scenarios.FAKES)
def test_no_driver_at_all(host_library, vendor):
    try:
        ctypes.CDLL(scenarios.FAKES[vendor])
        pytest.skip("this machine has the driver")
    except OSError:
        pass
    done = python(HERE / "launcher" / "scenarios.py", host_library, vendor, "error")
    reason = {
        "hip": "no ROCm runtime: libamdhip64.so.7: cannot open",
        "cuda": "no NVIDIA driver: libcuda.so.1: cannot open",
    }
    assert "jaxnorm: kernel 'copy': " + reason[vendor] in done.stdout, done.stdout + done.stderr


def test_an_incomplete_driver(host_library, tmp_path):
    (tmp_path / "empty.c").write_text("int nothing;\n")
    compile_to(
        tmp_path / "libamdhip64.so.7",
        "gcc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libamdhip64.so.7",
        str(tmp_path / "empty.c"),
    )
    done = python(HERE / "launcher" / "scenarios.py", host_library, "hip", "error", path=tmp_path)
    assert "the driver has no function hipModuleLoadData" in done.stdout, done.stdout + done.stderr


def test_an_old_driver(host_library, tmp_path):
    """Without cuLaunchKernelEx and the occupancy call."""
    flags = ("-DFAKE_CUDA", "-DFAKE_OLD", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")
    compile_to(tmp_path / "libcuda.so.1", "gcc", *flags, str(FAKE))
    done = python(HERE / "launcher" / "scenarios.py", host_library, "cuda", "no_blocks_meet", path=tmp_path)
    assert done.stdout.strip() == '["no_blocks_meet", null]', done.stdout + done.stderr


def test_the_mapped_driver_is_used(host_library, fakes):
    """A driver that somebody loaded by its full path, as JAX's plugin does, is found although no search path has it."""
    script = f"""
import ctypes, runpy, sys
ctypes.CDLL({str(fakes / "libamdhip64.so.7")!r})
sys.path.insert(0, {str(HERE / "launcher")!r})
sys.argv = ["scenarios.py", {str(host_library)!r}, "hip", "one_load_for_many_runs"]
runpy.run_path({str(HERE / "launcher" / "scenarios.py")!r}, run_name="__main__")
"""
    done = python("-c", script)
    assert done.stdout.strip() == '["one_load_for_many_runs", null]', done.stdout + done.stderr


REAL = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxnorm import _native
from jaxnorm._compile.code_object import CodeObject
_native._status = _native._load_from({library!r})
assert _native.status().ok, _native.status()
assert not jax._src.xla_bridge._backends, "registration must not start a backend"
for platform, target in (("rocm", "gfx942"), ("cuda", "sm_90")):
    c = CodeObject(image=b"\\x7fELF not run", name="copy", target=target, threads=64, shared=0, source_key="")
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    f = jax.jit(lambda x: _native.launch([_native.Kernel(c, (1, 1, 1), "ppi", (96,))], [x], [x])[0])
    lowered = f.trace(x).lower(lowering_platforms=(platform,))
    assert "@jaxnorm_launch" in lowered.as_text()
    assert "API_VERSION_TYPED_FFI" in lowered.as_text(dialect="hlo")
    checks = [jax.export.DisabledSafetyCheck.custom_call(_native.TARGET)]
    assert b"jaxnorm_launch" in jax.export.export(f, platforms=[platform], disabled_checks=checks)(x).mlir_module_serialized
print("ok")
"""


def test_real_build_registers_and_lowers_for_both_vendors_without_a_gpu(library):
    done = python("-c", REAL.format(library=str(library)))
    assert done.stdout.strip() == "ok", done.stderr


def test_handlers_tell_xla_what_they_may_do(library, folder):
    """Execute may be recorded in a graph; loading a module in initialize may not."""
    include = ("-I", jax.ffi.include_dir())
    tool = compile_to(folder / "read_metadata", "gcc", *include, str(HERE / "launcher" / "read_metadata.c"), "-ldl")
    traits = {}
    for stage in ("Instantiate", "Initialize", "Execute"):
        done = subprocess.run([tool, library, f"JaxnormLaunch{stage}"], capture_output=True, text=True, check=True)
        major, minor, traits[stage] = map(int, done.stdout.split())
        assert (major, minor) == (0, ctypes.CDLL(str(library)).JaxnormLaunchFfiMinor())
    assert traits == {"Instantiate": 0, "Initialize": 0, "Execute": 1}


def test_only_the_handlers_leave_the_library(library):
    done = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[2] for line in done.stdout.splitlines() if line.split()[1] == "T"}
    stages = {"Instantiate", "Initialize", "Execute", "Interface", "FfiMinor"}
    assert names == {f"JaxnormLaunch{s}" for s in stages}


class TestStatus:
    """What a user reads when there is no launcher: from ``backends()``, from doctor, and from an error."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        from jaxnorm import _native

        monkeypatch.setattr(_native, "_status", None)
        monkeypatch.delenv("JAXNORM_REQUIRE", raising=False)
        self.native = _native
        self.monkeypatch = monkeypatch

    def not_built(self):
        self.monkeypatch.setattr(self.native.importlib.machinery.PathFinder, "find_spec", lambda name, path: None)

    def test_not_built(self):
        self.not_built()
        status = self.native.status()
        assert not status.ok and status.path is None
        assert status.reason.startswith("launcher not built: ") and "compiler" in status.remedy
        assert self.native.require() == status

    def test_required(self):
        self.not_built()
        self.monkeypatch.setenv("JAXNORM_REQUIRE", "triton, launcher,devices=8")
        with pytest.raises(RuntimeError, match=r"JAXNORM_REQUIRE asks for the launcher\. launcher not built"):
            self.native.require()

    def test_launch_without_launcher(self):
        self.not_built()
        with pytest.raises(RuntimeError, match="launcher not built"):
            self.native.launch([], [], [])

    def test_not_a_library(self, tmp_path):
        (tmp_path / "text.so").write_text("text")
        status = self.native._load_from(str(tmp_path / "text.so"))
        assert not status.ok and status.reason.startswith("launcher not loaded: ") and status.path

    def test_built_from_other_sources(self, library):
        self.monkeypatch.setattr(self.native, "_INTERFACE", 99)
        assert "expected 99" in self.native._load_from(str(library)).reason

    def test_built_for_a_newer_jaxlib(self, library):
        self.monkeypatch.setattr(self.native, "_ffi_minor", lambda: 2)
        assert "was built for XLA FFI 0." in self.native._load_from(str(library)).reason

    def test_ffi_minor_is_read_from_the_headers(self, library):
        assert self.native._ffi_minor() == ctypes.CDLL(str(library)).JaxnormLaunchFfiMinor()

    def test_jax_refuses(self, library):
        def refuse(library, platform):
            raise ValueError("no such platform")

        self.monkeypatch.setattr(self.native, "register", refuse)
        assert "launcher not registered with jax" in self.native._load_from(str(library)).reason
