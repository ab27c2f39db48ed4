"""Code objects on disk, so that a kernel is compiled once per machine and not once per process.

An entry is one file: a JSON header line, then the image and the assembly text. It is written under a temporary name and renamed,
so that a reader sees a whole entry or none; whatever does not verify on reading is a miss and is compiled again. Nothing that
goes wrong with the directory (read-only, full, foreign, gone) breaks a call: the memory cache goes on, and :func:`problem` says
what happened for ``doctor``. Machine code is loaded only from a directory that belongs to this user and that others cannot write.

The directory may also hold *shipped* entries, made elsewhere by ``python -m jaxnorm aot``. Their key has everything but the
compiler, so that a machine without one finds them; they are read after the exact key and before compiling.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .code_object import CodeObject

FORMAT = "jaxnorm-code/3"
SHIPPED = "shipped"
"""Folder of the entries that need no compiler to be found."""
_lock = threading.Lock()
_memory: dict[str, CodeObject] = {}
_building: dict[str, threading.Lock] = {}
_problem = ""


def directory() -> Path:
    """``$JAXNORM_CACHE_DIR``, else ``jaxnorm`` in the user's cache folder."""
    named = os.environ.get("JAXNORM_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "jaxnorm"


def problem() -> str:
    """Why the last access to the directory failed; empty when nothing did."""
    return _problem


def digest(parts: Sequence[bytes | str]) -> str:
    """SHA-256 over length-prefixed parts: no two different sequences give the same input."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def get_or_compile(
    key_parts: Sequence[bytes | str], build: Callable[[], CodeObject], portable: Sequence[bytes | str] = ()
) -> CodeObject:
    """The code object of ``key_parts``, from memory, from disk, or from ``build()``.

    ``key_parts`` must hold all that matters: sources with everything they include, constants, options, target, compiler and its
    version. ``portable`` is the same without the compiler, the key of a shipped entry. Threads that ask for the same key compile
    it once.
    """
    key = digest([FORMAT, *key_parts])
    if (hit := _memory.get(key)) is not None:
        return hit
    with _lock:
        mine = _building.setdefault(key, threading.Lock())
    with mine:
        if (hit := _memory.get(key)) is not None:
            return hit
        code = _read(_path(key), key)
        if code is None and portable:
            code = shipped(portable)
        if code is None:
            code = replace(build(), source_key=key)
            _write(directory(), _path(key), code)
        _memory[key] = code
    with _lock:
        _building.pop(key, None)
    return code


def shipped_key(portable: Sequence[bytes | str]) -> str:
    """Name of a shipped entry."""
    return digest([FORMAT, SHIPPED, *portable])


def shipped(portable: Sequence[bytes | str]) -> CodeObject | None:
    """The entry that ``aot`` put into the directory for these sources, options and target; None if there is none."""
    key = shipped_key(portable)
    if (hit := _memory.get(key)) is None and (hit := _read(shipped_path(directory(), key), key)) is not None:
        _memory[key] = hit
    return hit


def has_shipped() -> bool:
    """Whether the directory was made by ``aot``; says nothing about what is in it."""
    return (directory() / SHIPPED).is_dir()


def shipped_path(folder: Path, key: str) -> Path:
    """File of a shipped entry in a directory."""
    return folder / SHIPPED / key[:2] / f"{key}.code"


def ship(folder: Path, portable: Sequence[bytes | str], code: CodeObject) -> Path:
    """Writes a shipped entry into ``folder``, without assembly text; its file.

    Raises:
      OSError: it cannot be written. Unlike a cache, a directory that is made to be shipped must be whole.
    """
    key = shipped_key(portable)
    path = shipped_path(folder, key)
    _put(path, replace(code, source_key=key, asm=""))
    return path


def clear_memory() -> None:
    """Forget what this process holds; the disk stays. For tests."""
    _memory.clear()


@dataclass(frozen=True)
class Entry:
    """A file of the folder, as its header describes it."""

    path: Path
    bytes: int
    modified: float
    name: str = ""
    target: str = ""
    damage: str = ""
    """Why it would not be loaded; empty for a whole entry."""


def entries() -> list[Entry]:
    """What is in the folder: code objects, and what an interrupted write left. Other files there are not ours and not listed."""
    found = []
    for path in sorted([*directory().glob("*/*.code"), *directory().glob("*/.new-*")]):
        try:
            status, data = path.stat(), path.read_bytes()
        except OSError:
            continue  # another process took it away
        try:
            head = _header(data)[0]
            found.append(Entry(path, status.st_size, status.st_mtime, head["name"], head["target"]))
        except _BROKEN as e:
            found.append(Entry(path, status.st_size, status.st_mtime, damage=str(e) or type(e).__name__))
    return found


def remove(chosen: Sequence[Entry]) -> list[str]:
    """Deletes entries and the subfolders that are empty then; what could not be deleted, with the reason."""
    failed = []
    for entry in chosen:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as e:
            failed.append(f"{entry.path}: {e.strerror}")
    for folder in {entry.path.parent for entry in chosen}:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return failed


_BROKEN = (ValueError, KeyError, TypeError, AttributeError)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of an entry and what follows it, verified.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: damaged, cut off, or written in another format.
    """
    line, rest = data.split(b"\n", 1)
    head = json.loads(line)
    if head.pop("sha256") != _checksum(head, rest) or head["format"] != FORMAT or rest[:4] != b"\x7fELF":
        raise ValueError("checksum or format differs")
    return head, rest


def _path(key: str) -> Path:
    return directory() / key[:2] / f"{key}.code"


def _note(text: str) -> None:
    global _problem
    _problem = text


def trusted(folder: Path) -> bool:
    """Ours, and not writable by others: what is read here is executed on the GPU."""
    if not hasattr(os, "getuid"):
        return True
    try:
        st = folder.stat()
    except OSError:
        return False
    if st.st_uid not in (os.getuid(), 0):
        _note(
            f"{folder} belongs to uid {st.st_uid}: code objects are not loaded from it. Set JAXNORM_CACHE_DIR to a folder of yours."
        )
        return False
    if st.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _note(f"{folder} is writable by others: code objects are not loaded from it. Run: chmod go-w {folder}")
        return False
    return True


def _read(path: Path, key: str) -> CodeObject | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        _note(f"cannot read {path}: {e}")
        return None
    root = directory()
    if not all(trusted(folder) for folder in (root, *path.parents) if folder == root or root in folder.parents):
        return None
    try:
        return decode(data, key)
    except ValueError as e:
        _note(f"damaged cache entry {path} ({e}); it is compiled again")
        return None


def decode(data: bytes, key: str) -> CodeObject:
    """An entry's bytes as a code object.

    Raises:
      ValueError: they are not what was written.
    """
    try:
        head, rest = _header(data)
        image, asm = rest[: head["image_bytes"]], rest[head["image_bytes"] :]
        return CodeObject(
            image, head["name"], head["target"], head["threads"], head["shared"], key, asm.decode(), head["compiler"]
        )
    except _BROKEN as e:
        raise ValueError(str(e) or type(e).__name__) from None


def _checksum(head: dict[str, object], rest: bytes) -> str:
    """Over the header, too: a wrong number of threads is as bad as a wrong instruction."""
    return digest([json.dumps(head, sort_keys=True), rest])


def _write(root: Path, path: Path, code: CodeObject) -> None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if trusted(root):
            _put(path, code)
    except OSError as e:
        _note(f"cannot write to {root}: {e}; kernels are compiled anew in each process")


def _put(path: Path, code: CodeObject) -> None:
    rest = code.image + code.asm.encode()
    head: dict[str, object] = {
        "format": FORMAT,
        "name": code.name,
        "target": code.target,
        "threads": code.threads,
        "shared": code.shared,
        "compiler": code.compiler,
        "image_bytes": len(code.image),
    }
    head["sha256"] = _checksum(head, rest)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(json.dumps(head).encode() + b"\n" + rest)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
