"""The doctor answers whatever is broken: jax, the launcher, the cache folder, the installation itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxnorm import doctor
from jaxnorm._compile import cache
from jaxnorm._version import __version__

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ("jaxnorm/doctor.py",)
MODULE = ("-m", "jaxnorm", "doctor")


def ask(*command: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def broken_jax(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "jax.py").write_text('raise ImportError("libfoo.so: undefined symbol")')
    return folder


def test_everything_is_reported():
    code, out = ask(*MODULE, "--json")
    r = json.loads(out)
    assert code == 0
    assert r["ok"]
    assert r["python"]["path"] == sys.executable
    assert r["versions"]["jax"] == r["jax"]["version"]
    assert {"jaxlib", "triton", "jax-triton", "numpy", "flax"} <= set(r["versions"])
    assert r["devices"][0]["platform"] == "cpu"
    assert set(r["backends"]) == {"xla", "triton", "hip"}
    assert r["backends"]["xla"]["usable"]
    assert all(b["usable"] or (b["reason"] and b["remedy"]) for b in r["backends"].values())
    assert set(r["compilers"]) == {"nvrtc", "hiprtc", "hipcc", "clang", "c++"}
    assert r["environment"]["JAX_PLATFORMS"] == "cpu"


def test_text_has_every_section():
    code, out = ask(*SCRIPT)
    assert code == 0
    for title in [
        "versions",
        "jax",
        "devices",
        "jaxnorm",
        "launcher",
        "compilers",
        "cache",
        "environment",
        "backends",
    ] + ["known problems"]:
        assert f"\n{title}\n" in out
    assert out.endswith("ok: the xla backend works\n")


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_broken_jax(command, broken_jax):
    code, out = ask(*command, PYTHONPATH=str(broken_jax))
    assert code == 1
    assert "not known (ImportError: libfoo.so: undefined symbol)" in out
    assert "NOT ok: the xla backend does not work" in out
    assert "compilers\n" in out
    assert "cache\n" in out


def test_nothing_installed(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    done = subprocess.run(
        [str(tmp_path / "bin/python"), *SCRIPT, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    r = json.loads(done.stdout)
    assert done.returncode == 1
    assert "No module named 'jax'" in r["jax"][doctor._FAILED]
    assert r["versions"]["jax"] is None
    assert r["compilers"]["nvrtc"] is None or "site-packages" not in r["compilers"]["nvrtc"]
    assert doctor.render(r)


def test_broken_launcher(tmp_path):
    """A copy of the sources with a library that does not load."""
    for folder in ("jaxnorm", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = tmp_path / "jaxnorm/_launcher.abi3.so"
    library.write_bytes(b"not a library")
    code, out = ask(str(tmp_path / "jaxnorm/doctor.py"), "--json", cwd=tmp_path)
    r = json.loads(out)
    assert code == 0
    assert r["jaxnorm"]["path"] == str(tmp_path / "jaxnorm")
    assert not r["launcher"]["built"]
    assert str(library) in r["launcher"]["reason"]
    assert r["launcher"]["remedy"]
    assert any("not built: " in line for line in doctor.render(r).splitlines())


def test_crash_and_silence_of_a_probe(monkeypatch):
    monkeypatch.setattr(doctor, "__file__", str(ROOT / "no such file"))
    r = doctor.collect(timeout=60)
    assert not r["ok"]
    assert "ended with code 2" in r["jax"][doctor._FAILED]
    assert "NOT ok" in doctor.render(r)


def test_timeout():
    r = doctor.collect(timeout=0.01)
    assert "no answer within 0.01 s" in r["jax"][doctor._FAILED]
    assert "NOT ok" in doctor.render(r)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor._cache() == {"path": str(cache.directory()), "exists": False, "writable": True}
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "entry").write_bytes(b"12345")
    found = doctor._cache()
    assert (found["mode"], found["trusted"], found["files"], found["bytes"]) == ("0700", True, 1, 5)
    (tmp_path / "cache").chmod(0o777)
    assert not doctor._cache()["trusted"]
    assert any("no machine code is loaded" in row for row in doctor._cache_rows(doctor._cache()))
    monkeypatch.delenv("JAXNORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor._cache()["path"] == str(cache.directory()) == str(tmp_path / "jaxnorm")


def test_read_only_cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(folder))
    monkeypatch.setattr(
        doctor.os, "access", lambda path, mode: False
    )  # root may write anywhere, whatever the mode says
    assert not doctor._cache()["writable"]
    assert any("NOT writable" in row for row in doctor._cache_rows(doctor._cache()))
    code, out = ask(*SCRIPT, "--json", JAXNORM_CACHE_DIR=str(folder))
    assert code == 0
    assert json.loads(out)["cache"]["mode"] == "0500"
    code, out = ask(*SCRIPT, "--json", JAXNORM_CACHE_DIR="/dev/null/nowhere")
    assert code == 0
    assert not json.loads(out)["cache"]["writable"]


GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "triton": "3.6.0", "jax-triton": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        (
            {"jax": "0.9.1", "jaxlib": "0.9.1"},
            "jax 0.9.1 is too old: pip install -U 'jax>=0.10.2'. jaxlib 0.9.1 is too old",
        ),
        ({"jaxlib": "0.11.2"}, "do not belong together"),
        ({"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}, ""),
        ({"triton": "3.5.1"}, "triton 3.5.1 is too old"),
        ({"jax-triton": "0.3.1"}, ""),
        ({"jax-triton": "0.3.1", "triton": "3.9.0"}, "num_ctas"),
        ({"jax-triton": "0.4.1", "jax": "0.11.2", "jaxlib": "0.11.2"}, "GPUTarget"),
        ({"jax-triton": "0.4.1", "jax": "0.12.0", "jaxlib": "0.12.0", "triton": "3.7.0"}, "dce rule"),
    ],
)
def test_known_version_problems(change, said):
    found = list(doctor.known_problems({**GOOD, **change}, (3, 11, 7), launcher_built=True))
    assert bool(found) == bool(said)
    assert said in " ".join(found)


def test_problems_of_python_and_launcher():
    assert "Python 3.10.2 is too old" in next(doctor.known_problems({}, (3, 10, 2), launcher_built=True))
    (only,) = doctor.known_problems(GOOD, (3, 11, 7), launcher_built=False)
    assert "CUDA only and from PTX" in only


def test_command_line():
    code, out = ask("-m", "jaxnorm", "--version")
    assert code == 0
    assert out.strip() == __version__
    done = subprocess.run(
        [sys.executable, "-m", "jaxnorm", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "doctor" in done.stderr
