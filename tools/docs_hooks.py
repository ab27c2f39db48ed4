"""What ``mkdocs`` cannot know of our docstrings: a Sphinx role before a name is a code span and nothing more."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles; called by mkdocs."""
    return _ROLE.sub("", html)
