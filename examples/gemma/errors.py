"""The one exception that the command line shows as a message instead of a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can put right; the text says what came, what was expected and what to do."""
