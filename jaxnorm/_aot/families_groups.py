"""Entries of the GroupNorm kernels. Everything is computed on ``[B, S, C]`` whatever the layout of the image."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ..kernels.configs import Launch, Problem
from .families import BITWISE, UNIT, Case, Kernel, Output, _close, _sum_bound
from .oracle import Array

CLOSE = {"mode": "close", "rtol": 1e-5, "atol": 1e-5}


class Image:
    """x of a case, and the norm's statistics."""

    def __init__(self, c: Case) -> None:
        shape = c.problem.shape("x" if c.problem.has("x") else "y")
        self.c, self.last, self.group = c, bool(c.option("last")), int(c.option("group_channels"))
        self.batch = shape[0]
        self.space, self.channels = (prod(shape[1:-1]), shape[-1]) if self.last else (prod(shape[2:]), shape[1])
        self.groups = self.channels // self.group
        x = c.g.standard_normal(shape) * 1.7 + 0.5
        self.x = self.flat(c.given("x", x, c.problem.dtype("x")))
        if "x" not in c.launch.inputs:
            del c.inputs["x"]
        grouped = self.grouped(self.x)
        self.mean = np.repeat(grouped.mean((1, 3)), self.group, -1)  # [B, C]
        eps = c.option("eps", 1e-5)
        self.rstd = np.repeat(1 / np.sqrt(grouped.var((1, 3)) + eps), self.group, -1)
        self.weight, self.bias = self.vector("weight", 1.0), self.vector("bias", 0.0)

    def vector(self, name: str, absent: float) -> Array:
        found = self.c.vector(name)
        return np.full(self.channels, absent) if found is None else found

    def flat(self, a: Array) -> Array:
        """An image as ``[B, S, C]``."""
        if self.last:
            return a.reshape(self.batch, self.space, self.channels)
        return np.moveaxis(a.reshape(self.batch, self.channels, self.space), 1, 2)

    def image(self, a: Array, name: str) -> Array:
        return (a if self.last else np.moveaxis(a, 2, 1)).reshape(self.c.problem.shape(name))

    def grouped(self, a: Array) -> Array:
        """``[B, S, G, CG]``"""
        return a.reshape(self.batch, self.space, self.groups, self.group)

    @property
    def xh(self) -> Array:
        return (self.x - self.mean[:, None]) * self.rstd[:, None]

    def gradient(self) -> Array:
        """g: dy through the activation; dy is an input."""
        dy = self.flat(self.c.normal("dy"))
        if not self.c.option("silu"):
            return dy
        v = self.xh * self.weight + self.bias
        s = 1 / (1 + np.exp(-v))
        return dy * s * (1 + v * (1 - s))

    def stats(self) -> Array:
        """``[B, 3, C]``: the mean, what its rounding lost, rstd."""
        m = self.mean.astype(np.float32).astype(np.float64)
        return np.stack([m, self.mean - m, self.rstd], 1)

    def give_stats(self) -> None:
        if "stats" in self.c.launch.inputs:
            stats = self.stats().astype(np.float32)
            self.c.inputs["stats"] = stats
            self.rstd = stats[:, 2].astype(np.float64)


def _activated(v: Array, silu: bool) -> Array:
    return v / (1 + np.exp(-v)) if silu else v


def _expect_y(c: Case, im: Image) -> None:
    y = _activated(im.xh * im.weight + im.bias, bool(c.option("silu")))
    kind = c.problem.dtype("y")
    c.expect("y", im.image(y, "y"), compare={"mode": "close", "rtol": UNIT[kind], "atol": 2e-5})


def forward(c: Case) -> None:
    """y = act((x - mean) * rstd * weight + bias), and the saved statistics."""
    im = Image(c)
    if "partials" in c.launch.inputs:  # hip: statistics of parts are put together by whoever normalises
        c.given("partials", _hip_parts(c, im))
    im.give_stats()
    if c.writes("y"):
        _expect_y(c, im)
    c.expect("stats", im.stats(), compare=CLOSE)


def held(c: Case) -> None:
    """The same by blocks that wait for one another's words, each of which they clear."""
    forward(c)
    _expect_clear_words(c)


def _expect_clear_words(c: Case) -> None:
    shape, kind = c.temps["words"]
    c.outputs["words"] = Output(np.zeros(shape, kind), BITWISE)


def few_images(problem: Problem, launch: Launch) -> tuple[Problem, Launch]:
    """A launch whose blocks meet, for as many images as a block has teams of: as many teams fewer."""
    waves = dict(launch.constants).get("JN_WAVES", 1)
    rows = waves if problem.rows % waves == 0 else problem.rows
    share = problem.rows // rows
    shapes = tuple((n, (rows, *s[1:]) if n in ("x", "y", "stats", "dy", "dx") else s) for n, s in problem.shapes)
    temps = tuple((n, (s[0] // share, *s[1:]), kind) for n, s, kind in launch.temps)
    blocks = launch.meeting // share
    small = replace(launch, grid=(blocks, 1, 1), meeting=blocks, temps=temps, scalars=(("batches", "i64", rows),))
    return replace(problem, rows=rows, shapes=shapes), small


def _spans(total: int, part: int) -> list[slice]:
    return [slice(i, min(i + part, total)) for i in range(0, total, part)]


def _hip_parts(c: Case, im: Image) -> Array:
    """``[B * G, 2 or 3, PARTS]``: mean, sum of squared deviations, and what the mean lost to rounding, of each part of a group:
    positions with channels last, chunks of the group with channels first."""
    grouped = np.moveaxis(im.grouped(im.x), 2, 1)  # [B, G, S, CG]
    groups = (
        grouped.reshape(-1, im.space, im.group)
        if im.last
        else np.moveaxis(grouped, 3, 2).reshape(-1, im.group * im.space)
    )
    part = c.constant("JN_PART") * (1 if im.last else c.constant("JN_V"))
    parts = [groups[:, s].reshape(len(groups), -1) for s in _spans(groups.shape[1], part)]
    mean = np.stack([p.mean(-1) for p in parts], -1)
    spread = np.stack([((p - p.mean(-1, keepdims=True)) ** 2).sum(-1) for p in parts], -1)
    low = mean - mean.astype(np.float32)
    return np.stack([mean, spread, low][: 3 if c.constant("JN_LOW") else 2], 1)


def partials(c: Case) -> None:
    """Statistics of parts: of groups (hip), of channels (triton)."""
    im = Image(c)
    if c.constant("JN_PART"):
        values = _hip_parts(c, im)
    else:
        values = _triton_parts(c, im)
    c.expect("partials", values, compare=CLOSE | {"atol": float(1e-6 * np.abs(values).max())})


def _triton_parts(c: Case, im: Image) -> Array:
    """``[B, PARTS, 3, C]``: the mean of a part's first tile, how far the part's lies from it, sum of squared deviations."""
    out = []
    for s in _spans(im.space, c.constant("PART")):
        a = im.x[:, s]
        centre = a[:, : c.constant("POS", a.shape[1])].mean(1)
        out.append(np.stack([centre, a.mean(1) - centre, ((a - a.mean(1, keepdims=True)) ** 2).sum(1)], 1))
    return np.stack(out, 1)


def combine(c: Case) -> None:
    """Triton: statistics from those of parts."""
    im = Image(c)
    c.given("partials", _triton_parts(c, im))
    c.expect("stats", im.stats(), compare=CLOSE)


def backward_sums(c: Case) -> None:
    """sum(g * xh) and sum(g) of each channel and part; hip: also their shares of the groups."""
    im = Image(c)
    im.give_stats()
    g = im.gradient()
    terms = np.stack([g * im.xh, g], 1)  # [B, 2, S, C]
    part = c.constant("PART") or c.constant("JN_PART") * (1 if im.last else c.constant("JN_V"))
    sums = np.stack([terms[:, :, s].sum(2) for s in _spans(im.space, part)], 1)  # [B, PARTS, 2, C]
    how = {"mode": "close", "rtol": 1e-5, "atol": float(2.0**-19 * np.abs(terms).sum(2).max())}
    if c.writes("partials"):
        c.expect("partials", sums.reshape(c.shape("partials")), compare=how)
    if c.writes("shares"):
        by_group = (sums * im.weight).reshape(im.batch, -1, 2, im.groups, im.group)  # [B, PARTS, 2, G, CG]
        shares = np.moveaxis(by_group, (3, 2), (1, 2))  # [B, G, 2, PARTS, CG]
        shares = shares.sum(-1) if im.last else np.swapaxes(shares, 3, 4)
        c.expect("shares", shares.reshape(c.shape("shares")), compare=how | {"atol": how["atol"] * im.group})


def _means(im: Image, g: Array) -> Array:
    """``[B, 2, C]``: mean(gw * xh) and mean(gw) of each channel's group."""
    gw = g * im.weight
    both = np.stack([im.grouped(gw * im.xh).mean((1, 3)), im.grouped(gw).mean((1, 3))], 1)
    return np.repeat(both, im.group, -1)


def backward_combine(c: Case) -> None:
    """Triton: the means of groups from the sums of parts, which are random here."""
    im = Image(c)
    sums = c.given("partials", c.g.standard_normal(c.shape("partials")))
    total = (sums.sum(1) * im.weight).reshape(im.batch, 2, im.groups, im.group).sum(-1) / (im.space * im.group)
    c.expect("means", np.repeat(total, im.group, -1), compare={"mode": "close", "rtol": 1e-5, "atol": 1e-6})


def backward_dx(c: Case) -> None:
    """dx = rstd * (gw - mean(gw) - xh * mean(gw * xh))."""
    im = Image(c)
    im.give_stats()
    g = im.gradient()
    means = _means(im, g)
    if "means" in c.launch.inputs:
        c.given("means", means)
    else:  # all of a group's sums in the first share
        shares = np.zeros((im.batch * im.groups, 2, c.constant("JN_SHARES")))
        shares[..., 0] = np.moveaxis(means[:, :, :: im.group], 2, 1).reshape(-1, 2) * (im.space * im.group)
        c.given("shares", shares.reshape(c.shape("shares")))
    _expect_dx(c, im, g, means)
    if c.writes("dweight") or c.writes("dbias"):  # hip
        vectors(c)


def _expect_dx(c: Case, im: Image, g: Array, means: Array) -> None:
    along, plain = means[:, 0, None], means[:, 1, None]
    dx = im.rstd[:, None] * (g * im.weight - plain - im.xh * along)
    c.expect("dx", im.image(dx, "dx"), compare=_close(dx, c.problem.dtype("dx")))


def backward_cluster(c: Case) -> None:
    """dx, and dweight and dbias or what each example adds to them."""
    im = Image(c)
    im.give_stats()
    g = im.gradient()
    _expect_dx(c, im, g, _means(im, g))
    terms = np.stack([g * im.xh, g], 1)  # [B, 2, S, C]
    bound = float(2.0**-19 * np.abs(terms).sum(2).max())
    if c.writes("partials"):
        c.expect("partials", terms.sum(2), compare={"mode": "close", "rtol": 1e-5, "atol": bound})
    for i, name in enumerate(("dweight", "dbias")):
        if c.writes(name):
            how = {"mode": "close", "rtol": 1e-5 + UNIT[c.problem.dtype(name)], "atol": bound * im.batch}
            c.expect(name, terms[:, i].sum((0, 1)), compare=how)


def backward_held(c: Case) -> None:
    """All three, by blocks that wait for one another's words."""
    backward_cluster(c)
    _expect_clear_words(c)


def vectors(c: Case) -> None:
    """dweight and dbias: the sums of random parts."""
    partial = c.given("partials", c.g.standard_normal(c.shape("partials")))
    partial = partial.reshape(-1, 2, partial.shape[-1])
    for i, name in enumerate(("dweight", "dbias")):
        if c.writes(name):
            c.expect(name, partial[:, i].sum(0), compare=_sum_bound(partial[:, i], c.problem.dtype(name)))


def _planned(fill: Any, clusters: bool = False) -> Kernel:
    return Kernel(fill, as_planned=True, clusters=clusters)


KERNELS: dict[str, Kernel] = {
    **{f"groupnorm.hip:groupnorm_{n}": _planned(f) for n, f in (
        ("fwd", forward), ("partials", partials), ("apply", forward), ("bwd_sums", backward_sums), ("bwd_dx", backward_dx))},
    **{f"groupnorm.hip:groupnorm_{n}": _planned(f, clusters=True) for n, f in (
        ("cluster", forward), ("bwd_cluster", backward_cluster), ("bwd_cluster_part", backward_cluster), ("bwd_add", vectors))},
    "groupnorm.hip:groupnorm_held": Kernel(held, shrink=few_images, clusters=True),
    "groupnorm.hip:groupnorm_bwd_held": Kernel(backward_held, shrink=few_images, clusters=True),
    **{f"groupnorm:groupnorm_{n}": _planned(f) for n, f in (
        ("fwd", forward), ("partials", partials), ("combine", combine), ("apply", forward), ("bwd_sums", backward_sums),
        ("bwd_combine", backward_combine), ("bwd_dx", backward_dx), ("bwd_reduce", vectors))},
}  # fmt: skip
