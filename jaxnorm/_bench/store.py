"""Results on disk: one JSON file per operator, rewritten after every cell, and the facts about machine and versions beside them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from typing import Any

from .. import _paths

FORMAT = "jaxnorm-bench/1"
PACKAGE = pathlib.Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
"""What has to be on the path to import this jaxnorm: the checkout, or site-packages."""
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "triton", "torch", "quack-kernels",
    "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "liger-kernel", "tokamax", "jax-triton", "nvidia-cuda-nvrtc",
)  # fmt: skip


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces the file in one step, so that a run that is killed leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
    with os.fdopen(fd, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def read_json(path: pathlib.Path) -> Any | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class Store:
    """Cells by operator and key, from ``out/{op}.json`` and, below them, from directories of earlier runs."""

    def __init__(self, out: pathlib.Path, earlier: list[pathlib.Path] | None = None) -> None:
        self.out = out
        self.files: dict[str, dict[str, Any]] = {}
        for directory in [*(earlier or []), out]:
            for path in sorted(directory.glob("*.json")):
                data = read_json(path)
                if isinstance(data, dict) and data.get("format") == FORMAT:
                    self._file(data["op"])["cells"].update(data["cells"])

    def _file(self, op: str) -> dict[str, Any]:
        return self.files.setdefault(op, {"format": FORMAT, "op": op, "cells": {}})

    def get(self, op: str, key: str) -> dict[str, Any] | None:
        return self._file(op)["cells"].get(key)

    def put(self, op: str, key: str, record: dict[str, Any]) -> None:
        """Adds a cell and writes the operator's file."""
        self._file(op)["cells"][key] = record
        write_json(self.out / f"{op}.json", self._file(op))

    def write_all(self) -> None:
        """Writes every operator that is known, so that ``out`` also holds what earlier runs measured."""
        for op, data in self.files.items():
            if data["cells"]:
                write_json(self.out / f"{op}.json", data)

    def records(self) -> list[dict[str, Any]]:
        return [cell for data in self.files.values() for cell in data["cells"].values()]


def is_complete(record: dict[str, Any] | None) -> bool:
    """Whether a cell need not be measured again: the copy, XLA and every jaxnorm contestant tried have a time."""
    if record is None or not record.get("copy_us"):
        return False
    ours = {k: v for k, v in record["contestants"].items() if k.startswith("jaxnorm") or k == "xla"}
    return any(k.startswith("jaxnorm") for k in ours) and all("median_us" in v for v in ours.values())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _smi(fields: str) -> list[str]:
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return [f.strip() for f in out.strip().splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


def clocks() -> dict[str, str]:
    """SM and memory clock, temperature and power right now; empty without nvidia-smi."""
    names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    return dict(zip(names, _smi(",".join(names)), strict=False))


def source_digest() -> str:
    """Digest of the library's and the kernels' sources: says what was measured where there is no git."""
    digest = hashlib.sha256()
    for folder in (PACKAGE, _paths.kernels_dir(), _paths.csrc_dir()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".h", ".hip", ".cc") and path.is_file():
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The git commit, marked when the tree differs from it; JAXNORM_BENCH_COMMIT names it where there is no git."""
    named = os.environ.get("JAXNORM_BENCH_COMMIT")
    if named:
        return named
    try:
        # An installed package may lie inside the git repository of somebody else's program.
        _git("ls-files", "--error-unmatch", "_version.py")
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code: device, driver, versions, date, source."""
    import jax

    device = jax.devices()[0]
    env: dict[str, Any] = {
        "device": device.device_kind, "platform": jax.default_backend(), "versions": versions(), "commit": commit(),
        "source": source_digest(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip
    capability = getattr(device, "compute_capability", None)
    if capability:
        env["capability"] = str(capability)
    env["runtime"] = " ".join(str(device.client.platform_version).split())
    smi = _smi("name,driver_version,memory.total")
    if smi:
        env["driver"] = smi[1]
    flags = {k: os.environ[k] for k in ("XLA_FLAGS", "JAXNORM_BACKEND", "JAXNORM_TRITON_BRIDGE") if os.environ.get(k)}
    return {**env, "flags": flags} if flags else env
