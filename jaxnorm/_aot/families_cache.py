"""Entries of the KV cache kernels: the write with its norm and rotation, and the gather."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import oracle
from .families import BITWISE, CODES, Case, Kernel, Output, Retry, near_tie
from .families_heads import Angles, _rows, _table
from .oracle import Array, f64


def _at(geometry: Any, which: str, slot: int, head: int) -> Any:
    """Index of a head of a slot in k, v or the scales."""
    page, place = divmod(slot, geometry.page_size)
    if geometry.layout == "slots":
        return (slot, head)
    if geometry.layout == "paged":
        return (page, place, head)
    x = geometry.x
    return {"k": (page, head, slice(None), place), "v": (page, head, place // x, slice(None), place % x),
            "scale": (page, head, place)}[which]  # fmt: skip


def _slots(c: Case) -> Array:
    """Different slots as an input; the second is -1 and the fourth lies beyond the cache."""
    g, shape = c.option("geometry"), c.problem.shape("slots")
    slots = c.g.permutation(g.slots)[: shape[0]]
    if len(slots) > 1:
        slots[1] = -1
    if len(slots) > 3:
        slots[3] = g.slots + 2
    c.inputs["slots"] = slots.astype(c.problem.dtype("slots"))
    return slots


def _heads(c: Case) -> dict[str, Array]:
    """q, k and v, ``[T, H, D]`` in their dtypes, as inputs."""
    p, d = c.problem, c.problem.features
    if not c.reads("qkv"):
        for name in "qkv":
            if c.reads(name):
                c.normal(name)
        return {n: c.inputs[n].reshape(-1, *c.inputs[n].shape[-2:]) for n in "qkv" if n in c.inputs}
    c.normal("qkv")
    packed = c.inputs["qkv"]
    geometry = c.option("geometry")
    count = geometry.num_kv_heads
    q = p.shape("qkv")[-1] // d - 2 * count
    parts = np.split(packed.reshape(len(packed), -1, d), [q, q + count], 1)
    return {n: a for n, a in zip("qkv", parts, strict=True) if a.shape[1]}


def _angles(c: Case, tokens: int) -> Angles:
    table = _table(c, "cos_sin")
    positions = c.g.integers(0, table.shape[0], c.problem.shape("positions"))
    c.inputs["positions"] = positions.astype(c.problem.dtype("positions"))
    return Angles(*_rows(table, np.resize(positions, tokens)), c.option("style"))


def write(c: Case) -> None:
    """q and k normed and turned; k, v and their scales in the cache at their slots, everything else there as it was."""
    heads = _heads(c)
    turning, slots = _angles(c, len(heads["k"])), _slots(c)
    rounded, unsure = {"v": heads["v"]}, {"v": np.zeros(heads["v"].shape, bool)}
    for name in "qk":
        weight = c.vector(f"{name}_weight")
        if name not in heads:
            continue
        x, kind = f64(heads[name]), heads[name].dtype.name
        _, rstd = oracle.statistics(x, c.option("eps"), centred=False)
        n = oracle.affine(x * rstd, weight, None, c.option("weight_offset", 0.0), None)
        turned = turning.turn(f64(oracle.rounded(n, kind)))
        rounded[name] = oracle.rounded(turned, kind)
        tie = turning.either(near_tie(n, kind))
        unsure[name] = tie | near_tie(turned, kind)
        if c.writes(f"{name}_out"):
            c.expect(f"{name}_out", turned.reshape(c.shape(f"{name}_out")), ignore=tie.reshape(c.shape(f"{name}_out")))
    if c.writes("v_out"):
        c.outputs["v_out"] = Output(rounded["v"].reshape(c.shape("v_out")), BITWISE)
    for name in "kv":
        _store(c, name, rounded[name], unsure[name], slots)


def _store(c: Case, name: str, values: Array, unsure: Array, slots: Array) -> None:
    g, p = c.option("geometry"), c.problem
    exact, scales = f64(values), None
    if g.quant == "per_tensor":
        scale = np.float32(4.0 / oracle.TOP[g.dtype])
        c.given(f"{name}_scale", np.full(p.shape(f"{name}_scale"), scale))
        stored = oracle.codes((exact.astype(np.float32) / scale).astype(np.float64), g.dtype)
    elif g.quant == "per_token":
        largest = np.abs(exact).max(-1)
        if (unsure & (np.abs(exact) > 0.99 * largest[..., None])).any():
            raise Retry
        scales = (largest / oracle.TOP[g.dtype]).astype(np.float32)
        stored = oracle.codes((exact.astype(np.float32) / scales[..., None]).astype(np.float64), g.dtype)
    else:
        stored = oracle.rounded(exact, g.dtype)
    kind = oracle.dtype(g.dtype)
    old = c.g.integers(0, 64, p.shape(f"{name}_cache")).astype(np.uint8 if kind.itemsize == 1 else np.uint16)
    old = old.view(kind) if kind.itemsize < 4 else old.astype(kind)
    how = dict(CODES) if g.quant else None
    _place(c, f"{name}_cache_out", name, old, stored.view(kind) if g.quant else stored, slots, how, unsure)
    if scales is not None:
        old = c.g.uniform(0.5, 1.5, p.shape(f"{name}_scale")).astype(np.float32)
        how = {"mode": "close", "rtol": 2.0**-20, "atol": 0}
        _place(c, f"{name}_scale_out", "scale", old, scales, slots, how, np.zeros(scales.shape, bool))


def _place(
    c: Case, out: str, which: str, old: Array, values: Array, slots: Array, how: dict[str, Any] | None, unsure: Array
) -> None:
    """The buffer ``out``, which holds ``old``, with the values of the tokens in their slots."""
    g = c.option("geometry")
    new, written, ignore = old.copy(), np.zeros(old.shape, bool), np.zeros(old.shape, bool)
    for token, slot in enumerate(slots):
        if not 0 <= slot < g.slots:
            continue
        for head in range(values.shape[1]):
            at = _at(g, which, int(slot), head)
            shape = new[at].shape
            new[at] = values[token, head].reshape(shape)
            written[at] = True
            ignore[at] = unsure[token, head].reshape(shape)
    c.outputs[out] = Output(new, how, ignore if ignore.any() else None, written, before=old)


def gather(c: Case) -> None:
    """k and v of slots: the bits that are there, or float32 code * scale; zeros for a slot that is none."""
    g, slots = c.option("geometry"), _slots(c)
    kind = oracle.dtype(g.dtype)
    for name in "kv":
        shape = c.problem.shape(f"{name}_cache")
        if g.quant:
            found = oracle.codes(c.g.uniform(-1, 1, shape) * oracle.TOP[g.dtype], g.dtype)
            values = oracle.decoded(found, g.dtype)
            c.inputs[f"{name}_cache"] = found.view(kind)
            scale = c.given(f"{name}_scale", c.g.uniform(0.01, 0.02, c.problem.shape(f"{name}_scale")))
        else:
            values = c.given(f"{name}_cache", c.g.standard_normal(shape), g.dtype)
            scale = np.ones(())
        out = np.zeros((len(slots), g.num_kv_heads, g.head_dim))
        for token, slot in enumerate(slots):
            for head in range(g.num_kv_heads if 0 <= slot < g.slots else 0):
                factor = scale[_at(g, "scale", int(slot), head)] if g.quant == "per_token" else scale
                out[token, head] = values[_at(g, name, int(slot), head)].reshape(-1) * factor
        c.expect(f"{name}_out", out.reshape(c.shape(f"{name}_out")), compare=None if g.quant else BITWISE)


KERNELS: dict[str, Kernel] = {
    f"{file}:{name}": Kernel(fill, as_planned=True)
    for file in ("qk_cache.hip", "qk_cache")
    for name, fill in (("qk_norm_rope_cache", write), ("kv_cache_gather", gather))
}
