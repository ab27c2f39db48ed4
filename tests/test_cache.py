"""The disk cache of code objects: whole entries or none, and never a call broken by its directory."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from jaxnorm._compile import cache
from jaxnorm._compile.code_object import CodeObject

CODE = CodeObject(b"\x7fELF" + bytes(range(256)), "kernel", "sm_90", 256, 1024, "", "asm text\n\nwith blank lines")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXNORM_CACHE_DIR", str(tmp_path / "cache"))
    cache.clear_memory()
    monkeypatch.setattr(cache, "_problem", "")
    return tmp_path / "cache"


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> CodeObject:
        self.calls += 1
        return CODE


def entry(folder: Path) -> Path:
    (found,) = folder.rglob("*.code")
    return found


def test_compiles_once_per_process_and_once_per_machine(folder: Path) -> None:
    build = Builder()
    first = cache.get_or_compile(["a", b"b"], build)
    assert cache.get_or_compile(["a", b"b"], build) is first
    cache.clear_memory()
    second = cache.get_or_compile(["a", b"b"], build)
    assert build.calls == 1
    assert second == first
    assert (second.image, second.name, second.threads, second.shared, second.asm) == (
        CODE.image,
        "kernel",
        256,
        1024,
        CODE.asm,
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_key_parts_are_not_run_together(folder: Path) -> None:
    build = Builder()
    cache.get_or_compile(["ab", "c"], build)
    cache.get_or_compile(["a", "bc"], build)
    cache.get_or_compile(["abc"], build)
    assert build.calls == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "not json", "not elf", "threads"])
def test_damaged_entry_is_compiled_again(folder: Path, damage: str) -> None:
    build = Builder()
    cache.get_or_compile(["a"], build)
    path = entry(folder)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-7],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "not json": b"{" + data,
            "threads": data.replace(b'"threads": 256', b'"threads": 255'),
            "not elf": data.replace(b"\x7fELF", b"\x7fELG"),
        }[damage]
    )
    cache.clear_memory()
    assert cache.get_or_compile(["a"], build).image == CODE.image
    assert build.calls == 2
    assert "damaged" in cache.problem()
    cache.clear_memory()
    cache.get_or_compile(["a"], build)
    assert build.calls == 2, "the new entry replaced the damaged one"


def test_directory_that_cannot_be_made(folder: Path) -> None:
    folder.write_text("a file stands in the way")
    build = Builder()
    assert cache.get_or_compile(["a"], build).image == CODE.image
    assert "cannot write" in cache.problem()
    assert cache.get_or_compile(["a"], build) and build.calls == 1, "the memory cache goes on"


@pytest.mark.skipif(os.getuid() == 0, reason="needs an ordinary user: root writes everywhere")
def test_read_only_directory(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    assert cache.get_or_compile(["a"], Builder()).image == CODE.image
    assert "cannot write" in cache.problem()


def test_full_disk_leaves_no_fragment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert cache.get_or_compile(["a"], Builder()).image == CODE.image
    assert "No space left" in cache.problem()
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_code_is_not_loaded_from_a_directory_others_can_write(folder: Path) -> None:
    build = Builder()
    cache.get_or_compile(["a"], build)
    folder.chmod(0o777)
    cache.clear_memory()
    cache.get_or_compile(["a"], build)
    assert build.calls == 2
    assert "writable by others" in cache.problem()


def test_threads_compile_a_key_once(folder: Path) -> None:
    gate = threading.Event()

    class Slow(Builder):
        def __call__(self) -> CodeObject:
            gate.wait(5)
            return super().__call__()

    build = Slow()
    threads = [threading.Thread(target=cache.get_or_compile, args=(["a"], build)) for _ in range(8)]
    for t in threads:
        t.start()
    gate.set()
    for t in threads:
        t.join()
    assert build.calls == 1
