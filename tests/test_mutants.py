"""Every mutant of mutants.py is found by its tests, on a private copy of the checkout."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS as GENERAL
from mutants_aot import MUTANTS as AOT
from mutants_groupnorm import MUTANTS as GROUPNORM
from mutants_layernorm import MUTANTS as LAYERNORM
from mutants_modules import MUTANTS as MODULES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The checkout without its history; mutants are applied to it and undone one after the other."""
    target = tmp_path_factory.mktemp("mutants") / "checkout"
    skipped = shutil.ignore_patterns(
        ".git", "__pycache__", ".build", "build", "*.egg-info", ".venv*", "site", "docs", "benchmarks"
    )
    shutil.copytree(ROOT, target, ignore=skipped)
    return target


def run(copy: Path, selection: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(selection)]
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=900)


@functools.cache
def passes_without_a_mutant(copy: Path, selection: str) -> bool:
    """Otherwise a failure under a mutant proves nothing."""
    return run(copy, selection).returncode == 0


ALL = (*GENERAL, *GROUPNORM, *LAYERNORM, *MODULES, *AOT)


def test_every_mutant_fits():
    """Each stands in its file exactly once: one that no longer does would test nothing."""
    assert [m.name for m in ALL if (ROOT / m.file).read_text().count(m.old) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ALL, ids=lambda m: m.name.replace(" ", "-"))
def test_a_defect_is_found(mutant, copy):
    file = copy / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"the mutant does not fit {mutant.file} any more: mend mutants.py"
    assert passes_without_a_mutant(copy, mutant.killed_by), f"{mutant.killed_by} fails on the unchanged copy"
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        done = run(copy, mutant.killed_by)
    finally:
        file.write_text(text)
    assert done.returncode == 1, f"survived, or nothing ran (pytest returned {done.returncode}):\n{done.stdout[-3000:]}"
    assert " failed" in done.stdout, done.stdout[-3000:]
