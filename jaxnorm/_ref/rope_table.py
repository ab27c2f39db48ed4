"""Frequencies of rotary tables, in float64 by numpy: the scalings that Hugging Face's configurations name.

Source: the formulas of ``modeling_rope_utils`` in Hugging Face transformers; Peng et al. 2023 (YaRN); bloc97 2023 (NTK).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def frequencies(width: int, base: float) -> np.ndarray:
    """``base^(-2i / width)``, i < width / 2, float64."""
    return base ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def linear(width: int, base: float, length: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Position interpolation: every frequency divided by ``factor``."""
    return frequencies(width, base) / s["factor"], 1.0


def dynamic(width: int, base: float, length: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Dynamic NTK for a sequence as long as the table: a larger base, where the table is longer than the original context."""
    original = s.get("original_max_position_embeddings") or length
    stretch = s["factor"] * max(length, original) / original - (s["factor"] - 1)
    return frequencies(width, base * stretch ** (width / (width - 2)) if width > 2 else base), 1.0


def yarn(width: int, base: float, length: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Fast pairs as they are, slow ones interpolated, a ramp between; cos and sin are scaled by the attention factor."""
    factor, original = s["factor"], s.get("original_max_position_embeddings") or length

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(s.get("beta_fast") or 32), pair_that_turns(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    fast = frequencies(width, base)
    return fast / factor * ramp + fast * (1 - ramp), _attention_factor(factor, s)


def _attention_factor(factor: float, s: Mapping[str, Any]) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return magnitude(s["mscale"]) / magnitude(s["mscale_all_dim"])
    return magnitude(1.0)


def llama3(width: int, base: float, length: int, s: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Long waves divided by ``factor``, short ones as they are, those between ``high`` and ``low`` turns blended."""
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    fast = frequencies(width, base)
    turns = s["original_max_position_embeddings"] * fast / (2 * math.pi)
    smooth = (turns - low) / (high - low) if high != low else np.zeros_like(turns)
    blended = (1 - smooth) * fast / s["factor"] + smooth * fast
    return np.where(turns < low, fast / s["factor"], np.where(turns > high, fast, blended)), 1.0


# rope_type -> (function, keys that must be there, keys that may be)
SCALINGS = {
    "linear": (linear, ("factor",), ()),
    "dynamic": (dynamic, ("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        yarn,
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
