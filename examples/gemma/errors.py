"""The one exception that the command line shows as a message instead of a traceback."""

from __future__ import annotations

from pathlib import Path


class DemoError(Exception):
    """Something the user can put right; the text says what came, what was expected and what to do."""


def damaged(path: Path, why: str) -> DemoError:
    return DemoError(
        f"gemma: {path} is not a usable Gemma 3 GGUF file: {why}. If the package wrote it, delete it and run again."
    )
