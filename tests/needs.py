"""Skips for what a machine lacks. ``JAXNORM_REQUIRE`` turns them into failures (tests/conftest.py)."""

from __future__ import annotations

import os

import pytest


def required() -> dict[str, int]:
    """``JAXNORM_REQUIRE=hip,devices=8`` as ``{"hip": 1, "devices": 8}``."""
    found = {}
    for item in filter(None, (part.strip() for part in os.environ.get("JAXNORM_REQUIRE", "").split(","))):
        name, _, count = item.partition("=")
        found[name] = int(count or 1)
    return found


def need(name: str, available: bool, why: str) -> None:
    """Skip the test unless ``available``; a failure where ``JAXNORM_REQUIRE`` names it."""
    if not available:
        pytest.skip(f"needs {name}: {why}")


def need_devices(count: int) -> None:
    """Skip unless jax has that many devices."""
    import jax

    need("devices", len(jax.devices()) >= count, f"{count} devices, there are {len(jax.devices())}")
