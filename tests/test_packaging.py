"""What gets installed, and how: wheel, wheel without a compiler, editable, and a checkout on PYTHONPATH. Offline."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def setuptools_major():
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


builds = pytest.mark.skipif(
    setuptools_major() < 77, reason="needs setuptools: 77 or later, since builds download nothing"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is in the repository, so that a build leaves nothing in the real one."""
    copy = tmp_path / "checkout"
    for name in ("jaxnorm", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*command, cwd, **env):
    env = (
        {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAXNORM_REQUIRE")}
        | {"JAX_PLATFORMS": "cpu"}
        | env
    )
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build_wheel(checkout, **env):
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    )
    run(*pip, "-w", checkout.parent / "dist", checkout, cwd=checkout.parent, **env)
    (wheel,) = (checkout.parent / "dist").glob("*.whl")
    return wheel


def sources(*folders):
    """Files of the repository by their place in the wheel."""
    found = set()
    for folder, place in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".json", ".cc", ".h", ".hip") or path.name == "py.typed":
                found.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


LOOK = """
import json, pathlib, sys
import jaxnorm, jaxnorm.kernels.configs
from jaxnorm import _native, _paths
status = _native.status()
print(json.dumps({
    "jaxnorm": jaxnorm.__file__, "version": jaxnorm.__version__, "configs": jaxnorm.kernels.configs.__file__,
    "csrc": str(_paths.csrc_dir()), "kernels": str(_paths.kernels_dir()), "ok": status.ok, "reason": status.reason,
    "headers": sorted(p.name for p in (_paths.csrc_dir() / "include" / "jaxnorm").glob("*.h")),
    "hip": sorted(p.name for p in (_paths.csrc_dir() / "kernels").glob("*.hip")),
}))
"""


def look(cwd, before="", **env):
    """What an interpreter sees that was started in another folder than the checkout."""
    import json

    seen = json.loads(run(sys.executable, "-c", before + LOOK, cwd=cwd, **env))
    assert seen["version"] == "0.1.0"
    assert seen["headers"] == sorted(p.name for p in (ROOT / "csrc" / "include" / "jaxnorm").glob("*.h"))
    assert seen["hip"] == sorted(p.name for p in (ROOT / "csrc" / "kernels").glob("*.hip"))
    return seen


def test_package_list_is_complete():
    packages = {"jaxnorm.csrc"}
    for folder, name in (("jaxnorm", "jaxnorm"), ("kernels", "jaxnorm.kernels")):
        for path in (ROOT / folder).rglob("__init__.py"):
            packages.add(".".join((name, *path.parent.relative_to(ROOT / folder).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_stand_in_holds_no_module():
    """jaxnorm/kernels/ only points at kernels/: a module put there would be in no wheel."""
    assert [p.name for p in (ROOT / "jaxnorm" / "kernels").iterdir() if p.name != "__pycache__"] == ["__init__.py"]


@builds
def test_wheel(checkout, tmp_path):
    wheel = build_wheel(checkout)
    assert wheel.name.startswith("jaxnorm-0.1.0-cp311-abi3-linux_"), wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        metadata = z.read("jaxnorm-0.1.0.dist-info/METADATA").decode()
        scripts = z.read("jaxnorm-0.1.0.dist-info/entry_points.txt").decode()
        z.extractall(site)
    assert {n.split("/")[0] for n in names} == {"jaxnorm", "jaxnorm-0.1.0.dist-info"}
    expected = sources(("jaxnorm", "jaxnorm"), ("kernels", "jaxnorm/kernels"), ("csrc", "jaxnorm/csrc"))
    assert {n for n in names if n.startswith("jaxnorm/")} == expected | {"jaxnorm/_launcher.abi3.so"}
    assert "__path__" not in (site / "jaxnorm/kernels/__init__.py").read_text(), "the stand-in is in the wheel"
    assert (site / "jaxnorm/_launcher.abi3.so").stat().st_size < 500_000
    assert "jaxnorm = jaxnorm.cli:main" in scripts
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: jax>=0.10.2",
        "Requires-Dist: numpy",
    ):
        assert line in metadata.splitlines(), line

    seen = look(tmp_path, PYTHONPATH=str(site))
    assert seen["ok"], seen["reason"]
    for key in ("jaxnorm", "configs", "csrc", "kernels"):
        assert seen[key].startswith(str(site / "jaxnorm")), (key, seen[key])


@builds
def test_wheel_without_a_compiler(checkout, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(build_wheel(checkout, **NO_COMPILER)) as z:
        assert not [n for n in z.namelist() if n.endswith(".so")]
        z.extractall(site)
    seen = look(tmp_path, PYTHONPATH=str(site))
    assert not seen["ok"] and seen["reason"].startswith("launcher not built: ")


@builds
def test_editable_install(checkout, tmp_path):
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    )
    run(*pip, "--ignore-installed", "--prefix", tmp_path / "prefix", "-e", checkout, cwd=tmp_path, **NO_COMPILER)
    (site,) = (p.parent for p in (tmp_path / "prefix").rglob("__editable__*.pth"))
    (checkout / "kernels" / "later.py").write_text("seen = True\n")
    # -S leaves out the site-packages of this environment, which may hold another jaxnorm; its other packages come by path.
    other = importlib.metadata.distribution("jax").locate_file("")
    before = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({str(other)!r})\n"
    before += "import jaxnorm.kernels.later as later; assert later.seen\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", before + LOOK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    for part in (checkout / "jaxnorm", checkout / "kernels" / "configs", checkout / "csrc"):
        assert f'"{part}' in done.stdout, done.stdout


def test_checkout_that_is_not_installed(checkout, tmp_path):
    seen = look(tmp_path, PYTHONPATH=str(checkout))
    assert not seen["ok"] and seen["reason"].startswith("launcher not built: ")
    assert seen["jaxnorm"].startswith(str(checkout)) and seen["configs"].startswith(str(checkout / "kernels"))
    assert (seen["csrc"], seen["kernels"]) == (str(checkout / "csrc"), str(checkout / "kernels"))


@builds
def test_source_archive(checkout):
    script = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", script, checkout.parent, cwd=checkout)
    with tarfile.open(checkout.parent / "jaxnorm-0.1.0.tar.gz") as t:
        names = {n.removeprefix("jaxnorm-0.1.0/") for n in t.getnames()}
    missing = sources(("jaxnorm", "jaxnorm"), ("kernels", "kernels"), ("csrc", "csrc")) | {
        "setup.py",
        "setup.cfg",
        "LICENSE",
    }
    assert not missing - names


def test_top_level_kernels_is_refused():
    code = "import sys; sys.path.insert(0, '.')\ntry:\n  import kernels\nexcept ImportError as e:\n  print(e)"
    assert "import jaxnorm.kernels, not kernels" in run(sys.executable, "-c", code, cwd=ROOT)


def test_import_is_light(tmp_path):
    """No GPU package, no launcher, no backend, no environment change; under half a second of CPU beyond jax."""
    code = """
import os, sys, time
import jax, numpy
before, start = dict(os.environ), time.process_time()
import jaxnorm
took = time.process_time() - start
heavy = {"triton", "flax", "jax_triton", "jaxnorm._launcher", "typer", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
native = sys.modules.get("jaxnorm._native")
assert native is None or native._status is None, "the launcher was loaded"
assert not jax._src.xla_bridge._backends, "a backend was started"
assert dict(os.environ) == before
assert took < 0.5, took
"""
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
