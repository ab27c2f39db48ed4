"""A directory of code objects for machines without a compiler: made, described by a manifest, verified.

DIR/manifest.json                    what was asked for, and per code object: hash, kernel, target, compiler
DIR/shipped/ab/<key>.code            what JAXNORM_CACHE_DIR=DIR serves (see _compile/cache.py)
DIR/cases/                           kernel cases, with --bundle
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._compile import cache
from .._compile.code_object import CodeObject
from .._version import __version__
from ..errors import UnsupportedError, value_error
from . import elf, workers
from .instances import Instance, Stage, check_target, instances, stages
from .spec import Call, parse

FORMAT = "jaxnorm-aot/1"
MANIFEST = "manifest.json"


@dataclass
class Work:
    """What a list of calls needs for some targets."""

    instances: dict[str, Instance] = field(default_factory=dict)
    """By key, in order."""
    stages: list[tuple[Call, Stage, list[str]]] = field(default_factory=list)
    """Each stage of each call with the keys of its code objects."""

    @property
    def without_kernel(self) -> list[Stage]:
        """Stages that run on xla, whatever is shipped."""
        return [s for _, s, _ in self.stages if s.backend == "xla"]


def plan(calls: Sequence[Call], targets: Sequence[str], backend: str | None = None) -> Work:
    """The code objects of all calls for all targets.

    Raises:
      ValueError: a target that no kernel is for.
      UnsupportedError: nothing of a target can be compiled here.
    """
    for target in targets:
        check_target(target)
    work = Work()
    seen: dict[Stage, dict[str, Instance]] = {}
    for target in targets:
        for call in calls:
            for stage in stages(call, target, backend):
                if stage not in seen:
                    seen[stage] = instances(stage, call.counts)
                work.instances |= {k: i for k, i in seen[stage].items() if k not in work.instances}
                work.stages.append((call, stage, list(seen[stage])))
        mine = [s for _, s, _ in work.stages if s.target == target]
        if mine and all(s.backend == "xla" for s in mine):
            raise UnsupportedError(
                "aot", target, f"nothing to compile for {target}: {mine[0].why}.", "Install a compiler."
            )
    return work


def make(
    out: Path,
    calls: Sequence[Call],
    targets: Sequence[str],
    backend: str | None = None,
    report: Callable[[str], None] = lambda text: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[Instance, CodeObject]]:
    """Compiles into ``out`` and writes its manifest; the code objects by key. ``report`` gets remarks, ``step`` the progress.

    Raises:
      ValueError, UnsupportedError: as :func:`plan`.
      CompileError: a kernel did not compile.
      OSError: ``out`` cannot be written.
    """
    work = plan(calls, targets, backend)
    for stage in dict.fromkeys(work.without_kernel):
        report(f"{stage.target}: {stage.call.op} ({stage.call.stage}) runs on xla: {stage.why}")
    out.mkdir(mode=0o755, parents=True, exist_ok=True)
    made: dict[str, tuple[Instance, CodeObject]] = {}
    objects = []
    codes = workers.compile_all(list(work.instances.values()))
    for (key, instance), code in zip(work.instances.items(), codes, strict=True):
        path = cache.ship(out, instance.parts, code)
        made[key] = instance, code
        step(len(made), len(work.instances))
        objects.append(_entry(out, path, instance, code))
    _write_manifest(out, calls, targets, backend, work, objects)
    return made


def _entry(out: Path, path: Path, instance: Instance, code: CodeObject) -> dict[str, Any]:
    launch = instance.launch
    return {
        "key": path.stem,
        "file": path.relative_to(out).as_posix(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "target": code.target,
        "backend": instance.stage.backend,
        "stage": instance.stage.call.stage,
        "kernel": launch.kernel,
        "constants": dict(launch.constants),
        "threads": code.threads,
        "shared": code.shared,
        "bytes": len(code.image),
        "compiler": code.compiler,
        "rows_from": instance.rows,
    }


def _write_manifest(
    out: Path, calls: Sequence[Call], targets: Sequence[str], backend: str | None, work: Work, objects: list[Any]
) -> None:
    manifest = {
        "format": FORMAT,
        "jaxnorm": __version__,
        "targets": list(targets),
        "backend": backend,
        "calls": [c.to_json() for c in calls],
        "stages": [
            {"op": s.call.op, "stage": s.call.stage, "target": s.target, "backend": s.backend, "why": s.why, "objects": keys}
            for _, s, keys in work.stages
        ],
        "objects": objects,
    }  # fmt: skip
    temporary = out / f".{MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, out / MANIFEST)


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a directory.

    Raises:
      ValueError: there is none, or it has another format.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError) as e:
        raise value_error("aot", "--check", f"{out} ({e})", "a directory that `python -m jaxnorm aot` made") from None
    if manifest.get("format") != FORMAT:
        raise value_error("aot", "--check", f"format {manifest.get('format')!r}", repr(FORMAT))
    return manifest


def check(out: Path, calls: Sequence[Call] | None = None, targets: Sequence[str] = ()) -> list[str]:
    """What is wrong with a directory, one line each: files against their hashes, targets against the ELF headers, and the code
    objects that these calls (default: those of the manifest) need with this jaxnorm and that are not there."""
    manifest = read_manifest(out)
    wrong = []
    listed = {o["key"]: o for o in manifest["objects"]}
    for key, entry in listed.items():
        if text := _check_object(out / entry["file"], key, entry):
            wrong.append(f"{entry['file']} ({entry['kernel']}, {entry['target']}): {text}")
    for path in sorted((out / cache.SHIPPED).glob("*/*")):
        if path.stem not in listed:
            wrong.append(f"{path.relative_to(out)}: not in the manifest")
    calls = parse({"calls": manifest["calls"]}) if calls is None else calls
    for target in targets or manifest["targets"]:
        wrong += _missing(listed, calls, target, manifest)
    return wrong


def _check_object(path: Path, key: str, entry: dict[str, Any]) -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return "its SHA-256 is not that of the manifest"
    try:
        code = cache.decode(data, key)
        found = elf.target(code.image)
    except ValueError as e:
        return str(e)
    return "" if found == code.target == entry["target"] else f"its ELF header says {found}"


def _missing(listed: dict[str, Any], calls: Sequence[Call], target: str, manifest: dict[str, Any]) -> list[str]:
    """Code objects of the calls that the directory lacks, for the backends that it was made with."""
    check_target(target)
    by_stage = {(s["op"], s["stage"]): s["backend"] for s in manifest["stages"] if s["target"] == target}
    wrong = []
    for call in calls:
        for stage in stages(call, target, manifest["backend"], compilers=False):
            backend = by_stage.get((stage.call.op, stage.call.stage), stage.backend)
            needed = instances(stage.on(backend), call.counts)
            lacking = [i for key, i in needed.items() if key not in listed]
            if lacking:
                kernels = ", ".join(sorted({i.launch.kernel for i in lacking}))
                wrong.append(
                    f"{target}: {call.op} lacks {len(lacking)} of {len(needed)} code objects ({kernels}). "
                    "Run aot again: the calls, or the sources of jaxnorm, are not those it was made for."
                )
    return wrong
