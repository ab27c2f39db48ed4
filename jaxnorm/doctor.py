"""A report on this installation: ``python -m jaxnorm doctor``, or ``python path/to/jaxnorm/doctor.py``.

Standard library only, and every probe is guarded: the report is for the days on which something does not import.
Whatever could crash, hang or take GPU memory (importing jax, finding devices, loading the launcher) happens in a child
process, which hands back each result as soon as it has it.
"""

from __future__ import annotations

import argparse
import ctypes.util
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm60-plugin", "jax-rocm7-plugin")
PACKAGES = ("jaxnorm", "jax", "jaxlib", *PLUGINS, "triton", "jax-triton", "numpy", "ml_dtypes", "flax")
MINIMUM = {"jax": (0, 10, 2), "jaxlib": (0, 10, 2), "triton": (3, 6)}
VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "CUDA_HOME",
    "ROCM_PATH",
    "HIP_PATH",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "PYTHONPATH",
)
_MARK = "jaxnorm-doctor: "  # starts a line of the child that is a result, whatever else its libraries print
_FAILED = "probe failed"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:400]


def _guard(probe: Callable[[], object]) -> object:
    try:
        return probe()
    except BaseException as error:  # A probe must not end the report, whatever a broken library raises on import.
        return {_FAILED: _text(error)}


def _error(value: object) -> str | None:
    return value.get(_FAILED) if isinstance(value, dict) else None


def _probe_jax() -> dict:
    import jax

    return {"version": jax.__version__, "path": jax.__path__[0]}


def _probe_devices() -> list[dict]:
    import jax

    return [
        {
            "id": d.id,
            "platform": d.platform,
            "kind": d.device_kind,
            "target": str(getattr(d, "compute_capability", "") or ""),
        }
        for d in jax.local_devices()
    ]


def _probe_jaxnorm() -> dict:
    import jaxnorm

    return {"version": jaxnorm.__version__, "path": jaxnorm.__path__[0]}


def _probe_backends() -> dict:
    import jaxnorm

    return {
        name: {"usable": bool(b.usable), "reason": b.reason, "remedy": b.remedy}
        for name, b in jaxnorm.backends().items()
    }


def _probe_launcher() -> dict:
    from jaxnorm import _native

    status = _native.status()
    return {"built": bool(status.ok), "reason": status.reason, "remedy": status.remedy, "path": status.path}


def _probe_xla() -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxnorm

    x = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4)
    expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        y = np.asarray(jaxnorm.rmsnorm(jnp.asarray(x), jnp.ones(4), backend="xla"))
    if not np.allclose(y, expected, rtol=1e-5):
        raise ArithmeticError(f"rmsnorm gave {y.tolist()}, expected {expected.tolist()}")
    return "rmsnorm ran on the CPU and is right"


# In the order of the report; a crash or a hang of one loses only the later ones.
CHILD_PROBES: dict[str, Callable[[], object]] = {
    "jax": _probe_jax,
    "devices": _probe_devices,
    "jaxnorm": _probe_jaxnorm,
    "launcher": _probe_launcher,
    "backends": _probe_backends,
    "xla": _probe_xla,
}


def _child() -> None:
    for name, probe in CHILD_PROBES.items():
        print(f"\n{_MARK}{json.dumps([name, _guard(probe)])}", flush=True)


def _run_child(timeout: float) -> dict[str, object]:
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    ended = ""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        out = done.stdout
        if done.returncode:
            tail = (done.stderr.strip().splitlines() or [""])[-1]
            ended = f"the probing process ended with code {done.returncode}: {tail}"[:400]
    except subprocess.TimeoutExpired as expired:
        out = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        ended = f"no answer within {timeout:g} s"
    results: dict[str, object] = {}
    for line in out.splitlines():
        if line.startswith(_MARK):
            name, value = json.loads(line.removeprefix(_MARK))
            results[name] = value
    for name in CHILD_PROBES:
        results.setdefault(name, {_FAILED: ended or "the probing process said nothing"})
    return results


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    found = {name: _version(name) for name in PACKAGES}
    return {k: v for k, v in found.items() if v or k not in PLUGINS}


def _library(stem: str, patterns: list[str]) -> str | None:
    """Full path of a shared library, or its soname where only the loader knows it."""
    for pattern in patterns:
        for path in sorted(glob.glob(pattern), reverse=True):
            return path
    return ctypes.util.find_library(stem)


def _compilers() -> dict[str, str | None]:
    rocm = os.environ.get("ROCM_PATH") or "/opt/rocm"
    wheels = [f"{folder}/nvidia/*/lib/libnvrtc.so.*" for folder in sys.path if folder]
    cuda = [f"{os.environ['CUDA_HOME']}/lib64/libnvrtc.so.*"] if os.environ.get("CUDA_HOME") else []
    return {
        "nvrtc": _library("nvrtc", [*wheels, *cuda]),
        "hiprtc": _library("hiprtc", [f"{rocm}/lib/libhiprtc.so.*", f"{rocm}/lib/libhiprtc.so"]),
        "hipcc": shutil.which("hipcc") or shutil.which(f"{rocm}/bin/hipcc"),
        "clang": os.environ.get("JAXNORM_HIP_CLANG"),
        "c++": shutil.which(os.environ.get("CXX") or "c++"),
    }


def _cache() -> dict:
    named = os.environ.get("JAXNORM_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(named) if named else Path(base) / "jaxnorm"
    report: dict[str, object] = {"path": str(path), "exists": path.is_dir()}
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    report["writable"] = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    if path.is_dir():
        status = path.stat()
        sizes = [f.stat().st_size for f in path.rglob("*") if f.is_file()]
        report |= {
            "mode": f"{stat.S_IMODE(status.st_mode):04o}",
            "trusted": status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH),
            "files": len(sizes),
            "bytes": sum(sizes),
        }
    return report


def _environment() -> dict[str, str]:
    names = [n for n in os.environ if n.startswith("JAXNORM_")]
    return {n: os.environ[n] for n in [*sorted(names), *VARIABLES] if n in os.environ}


def _numbers(version: str | None) -> tuple[int, ...]:
    if not version:
        return ()
    parts = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        parts.append(int(digits))
    return tuple(parts)


def known_problems(versions: dict[str, str | None], python: tuple[int, ...], launcher_built: bool) -> Iterator[str]:
    """Sentences about version combinations that are known not to work, each with its remedy."""
    number = {name: _numbers(version) for name, version in versions.items()}
    jax, jaxlib, triton, bridge = (number.get(n, ()) for n in ("jax", "jaxlib", "triton", "jax-triton"))
    unset = "do not set JAXNORM_TRITON_BRIDGE=jax-triton"
    if python < (3, 11):
        yield f"Python {'.'.join(map(str, python))} is too old: use 3.11 or newer."
    for name, least in MINIMUM.items():
        if number.get(name) and number[name] < least:
            wanted = ".".join(map(str, least))
            yield f"{name} {versions[name]} is too old: pip install -U '{name}>={wanted}'."
    if jax and jaxlib and jax[:3] != jaxlib[:3]:
        yield f"jax {versions['jax']} and jaxlib {versions['jaxlib']} do not belong together: pip install -U jax jaxlib."
    if bridge and triton:
        pair = f"jax-triton {versions['jax-triton']} with triton {versions['triton']}"
        if triton >= (3, 9):
            yield f"{pair} cannot lower for ROCm (KeyError 'num_ctas'): {unset}."
        if bridge[:2] >= (0, 4) and triton < (3, 7):
            yield f"{pair} cannot lower for CUDA (TypeError in GPUTarget): use jax-triton 0.3.1, or {unset}."
    if bridge[:3] == (0, 4, 1) and jax >= (0, 12):
        yield (
            f"jax-triton {versions['jax-triton']} fails with jax {versions['jax']} (TypeError, dce rule): "
            f"use an older jax, or {unset}."
        )
    if triton and not launcher_built and (0, 10, 1) <= jaxlib < (0, 11, 2):
        yield (
            f"without the launcher, jaxlib {versions['jaxlib']} runs Triton kernels on CUDA only and from PTX: "
            "reinstall jaxnorm with a C++ compiler present, or use jaxlib 0.11.2 or newer."
        )


def collect(timeout: float = 180.0) -> dict:
    """The report as a dict that JSON can hold. ``ok`` says whether the xla backend works."""
    live = _run_child(timeout)
    versions = _guard(_versions)
    launcher = live["launcher"]
    built = isinstance(launcher, dict) and bool(launcher.get("built"))
    names = versions if isinstance(versions, dict) and not _error(versions) else {}
    return {
        "ok": _error(live["xla"]) is None,
        "python": {"version": platform.python_version(), "path": sys.executable, "system": platform.platform()},
        "versions": versions,
        **live,
        "compilers": _guard(_compilers),
        "cache": _guard(_cache),
        "environment": _guard(_environment),
        "problems": _guard(lambda: list(known_problems(names, sys.version_info[:3], built))),
    }


def _lines(title: str, value: object, rows: Callable[[], list[str]]) -> list[str]:
    error = _error(value)
    body = [f"not known ({error})"] if error else rows() or ["none"]
    return [title, *(f"  {line}" for line in body)]


def _backend_rows(backends: dict) -> list[str]:
    rows = []
    for name, info in backends.items():
        rows.append(f"{name:<8}{'usable' if info['usable'] else 'not usable'}: {info['reason']}")
        if not info["usable"] and info["remedy"]:
            rows.append(f"        -> {info['remedy']}")
    return rows


def _cache_rows(cache: dict) -> list[str]:
    state = "writable" if cache["writable"] else "NOT writable: kernels are compiled again in every process"
    rows = [cache["path"], state]
    if cache["exists"]:
        rows.append(f"mode {cache['mode']}, {cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB")
        if not cache["trusted"]:
            rows.append("-> others can write to it, so no machine code is loaded from it: make it yours and chmod 700")
    return rows


def render(report: dict) -> str:
    """The report as text."""
    r = report
    rows = [f"python {r['python']['version']}  {r['python']['path']}", f"{r['python']['system']}"]
    rows += _lines("versions", r["versions"], lambda: [f"{k:<18}{v or '-'}" for k, v in r["versions"].items()])
    rows += _lines("jax", r["jax"], lambda: [f"{r['jax']['version']} from {r['jax']['path']}"])
    device = "{platform}:{id}  {kind}  {target}".format
    rows += _lines("devices", r["devices"], lambda: [device(**d).rstrip() for d in r["devices"]])
    rows += _lines("jaxnorm", r["jaxnorm"], lambda: [f"{r['jaxnorm']['version']} from {r['jaxnorm']['path']}"])
    one = r["launcher"]
    rows += _lines(
        "launcher",
        one,
        lambda: [f"built: {one['path']}"] if one["built"] else [f"not built: {one['reason']}", f"-> {one['remedy']}"],
    )
    rows += _lines(
        "compilers", r["compilers"], lambda: [f"{k:<8}{v or 'not found'}" for k, v in r["compilers"].items()]
    )
    rows += _lines("cache", r["cache"], lambda: _cache_rows(r["cache"]))
    rows += _lines("environment", r["environment"], lambda: [f"{k}={v}" for k, v in r["environment"].items()])
    rows += _lines("known problems", r["problems"], lambda: list(r["problems"]))
    rows += _lines("backends", r["backends"], lambda: _backend_rows(r["backends"]))
    rows.append(
        "ok: the xla backend works" if r["ok"] else f"NOT ok: the xla backend does not work ({_error(r['xla'])})"
    )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Prints the report. Returns 0 where the xla backend works, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="jaxnorm doctor", description="Report on this installation of jaxnorm.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for jax and the devices")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        _child()
        return 0
    report = collect(options.timeout)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    # Run by path: the package's own folder must not shadow other modules, its parent must be importable.
    if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
