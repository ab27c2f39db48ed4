"""Reads tables of tuned plans, which ``jaxnorm tune`` writes: for one problem on one device, a faster plan with the same bits.

An entry names one of the plan module's own ``candidates(problem)`` by its digest, so a table can choose and never invent. It holds
only for the same device, problem, kernel sources, own choice and machine code: the search compared the bits of exactly these. What
does not hold is passed over, and :func:`notes` says so.

Looked up in ``$JAXNORM_TUNED_DIR`` (default: ``tuned`` in the cache folder), then among the tables in the package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._compile import cache
from ..kernels.configs import Launch, Problem

FORMAT = "jaxnorm-tuned-plans/1"
SHIPPED = Path(__file__).resolve().parent.parent / "data" / "tuned"
Plan = tuple[Launch, ...]
_forced: dict[tuple[str, Problem], Plan] = {}
_used: set[tuple[str, Problem]] = set()


@dataclass(frozen=True)
class Entry:
    """One line of a table."""

    own: str
    """Digest of the plan that the module picks itself."""
    plan: str
    """Digest of the plan that was measured to be faster."""
    sources: str
    code: str
    """Digest of the machine code of ``plan``."""
    label: str
    own_us: float
    us: float
    device: str
    file: str


def user_folder() -> Path:
    """``$JAXNORM_TUNED_DIR``, else ``tuned`` in the cache folder."""
    named = os.environ.get("JAXNORM_TUNED_DIR")
    return Path(named) if named else cache.directory() / "tuned"


def digest(value: object) -> str:
    """Of a plan, a problem or anything else whose repr says all."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def code_digest(images: list[bytes]) -> str:
    return cache.digest(images)[:32]


@functools.cache
def sources_digest(backend: str) -> str:
    """Of all texts that machine code of a backend is made from, and of the plan modules."""
    from .. import _paths

    h = hashlib.sha256()
    folders = (_paths.csrc_dir(), _paths.kernels_dir() / "configs") if backend == "hip" else (_paths.kernels_dir(),)
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".h", ".hip"):
                h.update(f"{path.relative_to(folder)}:{path.stat().st_size}:".encode() + path.read_bytes())
    return h.hexdigest()[:32]


@functools.cache
def _read(folder: Path, time: int) -> tuple[dict[tuple[str, str, str], Entry], tuple[str, ...]]:
    """((device, backend, problem) -> entry) of all tables of a folder, and notes on what was passed over."""
    del time  # part of the key: a folder that changed is read again
    found: dict[tuple[str, str, str], Entry] = {}
    notes = []
    if folder != SHIPPED and not cache.trusted(folder):
        return {}, (f"{folder}: {cache.problem() or 'not ours'}",)
    for path in sorted(folder.glob("*/plans/*.json")):
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, expected {FORMAT!r}")
            for problem, e in data["entries"].items():
                found[data["device"], data["backend"], problem] = Entry(
                    e["own"], e["plan"], e["sources"], e["code"], e["label"], float(e["own_us"]), float(e["us"]),
                    data["device"], str(path),
                )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path}: not read ({type(error).__name__}: {error})")
    return found, tuple(notes)


def _folders() -> Iterator[tuple[Path, int]]:
    for folder in (user_folder(), SHIPPED):
        try:
            times = [p.stat().st_mtime_ns for p in (folder, *folder.glob("*/plans"), *folder.glob("*/plans/*.json"))]
        except OSError:
            continue
        yield folder, hash(tuple(times))


def find(device: str, backend: str, problem: Problem) -> Entry | None:
    """The entry for a problem on a device, the user's before ours."""
    key = device, backend, digest(problem)
    for folder, time in _folders():
        if (entry := _read(folder, time)[0].get(key)) is not None:
            return entry
    return None


def tables() -> list[tuple[Path, str, str, int]]:
    """(file, device, backend, entries) of every table that can be read."""
    found: dict[str, list[tuple[str, str]]] = {}
    for folder, time in _folders():
        for (device, backend, _), entry in _read(folder, time)[0].items():
            found.setdefault(entry.file, []).append((device, backend))
    return [(Path(file), *keys[0], len(keys)) for file, keys in found.items()]


def notes() -> list[str]:
    """What is wrong with tables, a sentence each."""
    return [note for folder, time in _folders() for note in _read(folder, time)[1]]


@contextlib.contextmanager
def forced(backend: str, problem: Problem, plan: Plan) -> Iterator[None]:
    """Inside, this plan serves the problem: what a search measures with. For one thread.

    Raises:
      RuntimeError: at the end, when nothing was lowered with it: what was measured then is another plan.
    """
    _forced[backend, problem] = plan
    _used.discard((backend, problem))
    try:
        yield
    finally:
        del _forced[backend, problem]
    if (backend, problem) not in _used:
        raise RuntimeError(f"{problem.stage}: the plan to be measured was not used")


def choose(
    own: Plan,
    backend: str,
    problem: Problem,
    device: str,
    candidates: Callable[[Problem], Any],
    image: Callable[[Launch], bytes],
) -> tuple[Plan, str]:
    """(the plan to launch, what to say of it): the module's own, unless a table has a better one that still holds.

    Args:
      candidates: of the plan module.
      image:      the machine code of a launch; called only where all else fits.
    """
    if (plan := _forced.get((backend, problem))) is not None:
        _used.add((backend, problem))
        return plan, "forced by a search"
    entry = find(device, backend, problem) if device else None
    if entry is None:
        return own, ""
    passed = f"tuned plan of {entry.file} passed over: "
    if entry.sources != sources_digest(backend) or entry.own != digest(own):
        return own, f"{passed}made with other kernels"
    plan = next((p for p in candidates(problem) if digest(p) == entry.plan), None)
    if plan is None:
        return own, f"{passed}its plan is no candidate any more"
    try:
        code = code_digest([image(launch) for launch in plan])
    except (
        RuntimeError
    ) as error:  # no compiler here, and no code object of it made ahead of time; the own choice may have one
        return own, f"{passed}it does not compile here ({error})"
    if code != entry.code:
        return own, f"{passed}this compiler makes other code"
    gain = f"{entry.us:.4g} us for {entry.own_us:.4g}"
    return (
        plan,
        f"tuned on {entry.device} ({gain})" if entry.plan != entry.own else f"own choice, best on {entry.device}",
    )
