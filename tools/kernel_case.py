"""Kernel cases (docs/kernel-case.md) read and compared, with numpy alone: the part of run_case.py that needs no driver."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "kernel-case/1"
FLOATS = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
CODES = {"mode": "codes", "max_diff": 1, "max_fraction": 0.001}
DEFAULTS: dict[str, dict[str, Any]] = {
    "float32": {"mode": "close", "rtol": 1e-5, "atol": 1e-6},
    "float64": {"mode": "close", "rtol": 1e-5, "atol": 1e-6},
    "float16": {"mode": "ulp", "max": 1},
    "bfloat16": {"mode": "ulp", "max": 1},
    "int8": CODES,
    **{name: CODES for name in FLOATS if name.startswith("float8")},
}
NAN_BITS = {
    "float8_e4m3fn": lambda b: (b & 0x7F) == 0x7F,
    "float8_e4m3fnuz": lambda b: b == 0x80,
    "float8_e5m2": lambda b: (b & 0x7F) > 0x7C,
    "float8_e5m2fnuz": lambda b: b == 0x80,
}


class CaseError(Exception):
    """A case that cannot be run: a broken file, or the driver refused."""


# Numbers


def itemsize(dtype: str) -> int:
    if dtype == "bfloat16":
        return 2
    return 1 if dtype.startswith("float8") else np.dtype(dtype).itemsize


def numeric(a: np.ndarray, dtype: str) -> np.ndarray:
    """Elements as float64; ``a`` holds their bits for the dtypes that numpy has not."""
    if dtype == "bfloat16":
        return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.view(np.dtype(dtype)).astype(np.float64)


def line(a: np.ndarray, dtype: str) -> np.ndarray:
    """Position of each element on the line of all values of its format, both zeros at 0."""
    if dtype == "int8":
        return a.view(np.int8).astype(np.int64)
    size = itemsize(dtype)
    bits = a.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]).astype(np.int64)
    sign = np.int64(1) << (8 * size - 1) if size < 8 else np.int64(-1) << 63
    magnitude = bits & ~sign
    return np.where(bits & sign, -magnitude, magnitude)


def is_nan(a: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in NAN_BITS:
        return NAN_BITS[dtype](a.view(np.uint8))
    return np.isnan(numeric(a, dtype)) if dtype in FLOATS else np.zeros(a.shape, bool)


def is_inf(a: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float8_e5m2":
        return (a.view(np.uint8) & 0x7F) == 0x7C
    return np.isinf(numeric(a, dtype)) if dtype in FLOATS and "float8" not in dtype else np.zeros(a.shape, bool)


# Comparison


@dataclass
class Outcome:
    """How one buffer compares."""

    bad: int = 0
    checked: int = 0
    text: str = ""
    """First difference, or the worst that is allowed."""


def compare(got: np.ndarray, want: np.ndarray, argument: dict[str, Any], skip: np.ndarray | None = None) -> Outcome:
    """By the rule of the argument, or that of its dtype. Arrays hold bits of the argument's dtype; ``skip`` is not compared."""
    dtype = argument["dtype"]
    rule = argument.get("compare") or DEFAULTS.get(dtype, {"mode": "bitwise"})
    keep = np.ones(want.shape, bool) if skip is None else ~skip
    mode = rule["mode"]
    if mode == "codes4":
        nibbles = lambda a: np.stack([a.view(np.uint8) & 15, a.view(np.uint8) >> 4])  # noqa: E731
        code = lambda a: np.where(a & 8, -(a & 7).astype(np.int64), (a & 7).astype(np.int64))  # noqa: E731
        distance = np.abs(code(nibbles(got)) - code(nibbles(want)))
        return _few(distance, np.broadcast_to(keep, distance.shape), rule, got, want)
    if mode == "bitwise":
        return _outcome(keep & bits_differ(got, want), keep, got, want, dtype, "bits")
    special = is_nan(got, dtype) != is_nan(want, dtype)
    special |= (is_inf(got, dtype) | is_inf(want, dtype)) & (line(got, dtype) != line(want, dtype))
    same = is_nan(want, dtype) | is_inf(want, dtype)
    if mode == "ulp":
        distance = np.where(same, 0, np.abs(line(got, dtype) - line(want, dtype)))
        bad = keep & ((distance > rule["max"]) | special)
        return _outcome(bad, keep, got, want, dtype, f"{int(distance[keep].max(initial=0))} ulp")
    if mode == "codes":
        distance = np.where(special, 1 << 20, np.where(same, 0, np.abs(line(got, dtype) - line(want, dtype))))
        return _few(distance, keep, rule, got, want)
    if mode == "close":
        g, w = numeric(got, dtype), numeric(want, dtype)
        with np.errstate(all="ignore"):
            error = np.where(same, 0.0, np.abs(g - w))
            limit = rule.get("rtol", 0.0) * np.abs(w) + rule.get("atol", 0.0)
            bad = keep & (special | ~(same | (error <= limit)))
        worst = float(np.nanmax(np.where(keep, error, 0.0), initial=0.0))
        return _outcome(bad, keep, got, want, dtype, f"largest error {worst:.3g}")
    raise CaseError(f"compare: got mode {mode!r}, expected bitwise, ulp, codes, codes4 or close")


def bits_differ(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    size = want.dtype.itemsize
    whole = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    return got.view(whole) != want.view(whole)


def _few(distance: np.ndarray, keep: np.ndarray, rule: dict[str, Any], got: np.ndarray, want: np.ndarray) -> Outcome:
    """Codes: a small difference in a small part. One differing element is always allowed."""
    far = keep & (distance > rule["max_diff"])
    near = keep & (distance > 0)
    too_many = int(near.sum()) > max(1, int(rule["max_fraction"] * keep.sum()))
    bad = far | near if too_many else far
    text = f"{int(near.sum())} codes differ"
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        at = index[-got.ndim :]
        text += f", at most by {int(distance[keep].max())}; first at {at}: got {got[at]}, want {want[at]}"
    return Outcome(int(bad.sum()), int(keep.sum()), text)


def _outcome(bad: np.ndarray, keep: np.ndarray, got: np.ndarray, want: np.ndarray, dtype: str, text: str) -> Outcome:
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        show = lambda a: numeric(a, dtype)[at] if dtype in FLOATS and "float8" not in dtype else a[at]  # noqa: E731
        text = f"{text}; first at {at}: got {show(got)!r}, want {show(want)!r}"
    return Outcome(int(bad.sum()), int(keep.sum()), text)


# Files


def described(arguments: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Whatever may name arrays: arguments, the buffers of a struct of pointers, the parts of a buffer."""
    for argument in arguments:
        yield argument
        yield from described(argument.get("to", ()))
        yield from described(argument.get("parts", ()))


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A case and its arrays.

    Raises:
      CaseError: not a case.
    """
    try:
        case = json.loads(path.read_text())
        if case["format"] != FORMAT:
            raise CaseError(f"format: got {case['format']!r}, expected {FORMAT!r}")
        with np.load(path.with_name(case.get("arrays", f"{path.stem}.npz"))) as stored:
            arrays = {name: np.require(stored[name], requirements="C") for name in stored.files}  # a scalar stays one
        for argument in described(case["args"]):
            for key in ("data", "expect", "ignore", "written"):
                if key in argument and list(arrays[argument[key]].shape) != argument["shape"]:
                    raise CaseError(
                        f"{argument[key]}: got shape {arrays[argument[key]].shape}, expected {argument['shape']}"
                    )
        return case, arrays
    except (OSError, ValueError, KeyError) as e:
        raise CaseError(f"not a kernel case: {type(e).__name__}: {e}") from None
