"""hipRTC without ROCm: a recording fake of the library, found where ROCm puts it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from jaxnorm.kernels.configs import Launch, Problem, rmsnorm_hip

from jaxnorm._compile import cache, hip, rtc
from jaxnorm.errors import CompileError

FAKE = Path(__file__).parent / "launcher" / "fake_hiprtc.c"
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc: a C compiler builds the fake")


@pytest.fixture(scope="module")
def rocm(tmp_path_factory) -> Path:
    """A ROCM_PATH with the fake in it."""
    folder = tmp_path_factory.mktemp("rocm")
    (folder / "lib").mkdir()
    path = folder / "lib" / "libhiprtc.so.7"
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-Wl,-soname,libhiprtc.so.7"]
    done = subprocess.run(["gcc", *flags, str(FAKE), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def fake(rocm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The fake as the compiler of gfx942, with an empty cache."""
    monkeypatch.setenv("ROCM_PATH", str(rocm))
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(hip.CLANG_VARIABLE, raising=False)
    cache.clear_memory()
    rtc.find.cache_clear()
    library = ctypes.CDLL(str(rocm / "lib" / "libhiprtc.so.7"))
    library.fake_hiprtc_record.restype = ctypes.c_char_p
    yield library
    library.fake_hiprtc_not_elf(0)
    library.fake_hiprtc_fail(b"", 0)
    rtc.find.cache_clear()
    cache.clear_memory()


def call() -> tuple[Launch, Problem]:
    buffers = (("x", (8, 1024)), ("weight", (1024,)), ("y", (8, 1024)))
    options = (("eps", 1e-6), ("weight_offset", 0.0), ("cast", "output"), ("residual_rounding", "float32"))
    problem = Problem("rmsnorm_fwd", 8, 1024, buffers, tuple((n, "bfloat16") for n, _ in buffers), options, "gfx942")
    return rmsnorm_hip.plan(problem)[0], problem


def test_what_hiprtc_is_asked(fake) -> None:
    launch, problem = call()
    assert hip.find("gfx942") == hip.Compiler("hiprtc", str(Path(rtc.find("hiprtc"))))
    code = hip.compile(launch, problem)
    assert code.image == b"\x7fELF made by the fake"
    assert (code.name, code.threads, code.shared, code.compiler) == (
        "rmsnorm_fwd",
        launch.threads,
        launch.shared,
        "hipRTC libhiprtc.so.7",
    )
    lines = fake.fake_hiprtc_record().decode().splitlines()
    values = {
        k: [line.split(" ", 1)[1] for line in lines if line.startswith(k + " ")] for k in ("name", "header", "option")
    }
    assert values["name"] == ["rmsnorm.hip:rmsnorm_fwd"]
    assert values["header"] == list(hip.headers()) and "jaxnorm/gpu.h" in values["header"]
    assert values["option"][:4] == ["--offload-arch=gfx942", "-std=c++17", "-O3", "-ffp-contract=off"]
    assert values["option"][4:] == hip.macros(launch, "gfx942"), "clang's own options are not for hipRTC"
    assert fake.fake_hiprtc_alive() == 0
    again = hip.compile(launch, problem)
    assert again is code, "from memory"


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        ("create", 1, ("HIPRTC_ERROR_OUT_OF_MEMORY", "rmsnorm.hip:rmsnorm_fwd")),
        ("compile", 6, ("HIPRTC_ERROR_COMPILATION", "unknown type name 'NoSuchType'", "options: --offload-arch=gfx942 ")),
        ("size", 1, ("GetCodeSize", "HIPRTC_ERROR_OUT_OF_MEMORY")),
        ("code", 4, ("GetCode", "HIPRTC_ERROR")),
    ],
)  # fmt: skip
def test_every_step_may_fail(fake, step: str, status: int, words: tuple[str, ...], tmp_path: Path) -> None:
    """A clear error, no program left behind, nothing in the cache, and the next compilation works."""
    launch, problem = call()
    fake.fake_hiprtc_fail(step.encode(), status)
    with pytest.raises(CompileError) as raised:
        hip.compile(launch, problem)
    assert all(word in str(raised.value) for word in words), raised.value
    assert fake.fake_hiprtc_alive() == 0
    assert not list(tmp_path.rglob("*.code"))
    assert hip.compile(launch, problem).image[:4] == b"\x7fELF"


def test_what_is_no_elf_file_is_refused(fake) -> None:
    fake.fake_hiprtc_not_elf(1)
    with pytest.raises(CompileError, match="hiprtc gave 4 bytes that are no ELF file for gfx942"):
        hip.compile(*call())


def test_a_newer_library_compiles_again(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """hipRTC's version call says nothing; the file's identity is in the key of the cache."""
    launch, problem = call()
    hip.compile(launch, problem)
    cache.clear_memory()
    monkeypatch.setattr(rtc, "identity", lambda path: "another build")
    fake.fake_hiprtc_fail(b"compile", 6)
    with pytest.raises(CompileError):
        hip.compile(launch, problem)


def test_other_constants_are_another_code_object(fake) -> None:
    launch, problem = call()
    first = hip.compile(launch, problem)
    other = replace(launch, constants=(*launch.constants[:-1], ("JN_ROUND_RESIDUAL", True)))
    assert hip.compile(other, problem).source_key != first.source_key
