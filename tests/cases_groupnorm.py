"""GroupNorm workloads: shapes of Stable Diffusion, of videos, and odd ones, in both layouts; data for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import numpy as np
import oracle_groupnorm as oracle
from jaxnorm.kernels.configs import Problem

BF16, F16, F32 = cases.FLOATS


@dataclass(frozen=True)
class Case:
    """One call: batch, spatial dims and channels, whatever the layout."""

    batch: int
    spatial: tuple[int, ...]
    channels: int
    groups: int
    last: bool = True
    x: str = BF16
    weight: str | None = BF16
    bias: str | None = BF16
    silu: bool = False
    eps: float = 1e-5
    out: str | None = None
    mean: float = 0.5
    std: float = 1.7

    def __str__(self) -> str:
        short = {BF16: "b", F16: "h", F32: "f", None: "-"}
        kinds = "".join(short[k] for k in (self.x, self.weight, self.bias, self.out))
        size = "x".join(map(str, (self.batch, *self.spatial, self.channels)))
        parts = ["nhwc" if self.last else "nchw", size, f"g{self.groups}", kinds]
        return "-".join(parts + ["silu"] * self.silu + [f"mean{self.mean:g}"] * (self.mean != 0.5))

    @property
    def first(self) -> Case:
        """The same with channels first."""
        return replace(self, last=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *self.spatial, self.channels) if self.last else (self.batch, self.channels, *self.spatial)

    @property
    def out_dtype(self) -> str:
        return self.out or self.x

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public function."""
        found = {"num_groups": self.groups, "eps": self.eps, "activation": "silu" if self.silu else None}
        return found | {"channel_axis": -1 if self.last else 1, "out_dtype": self.out}

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """x, weight (random, of both signs), bias; each group has a mean and a deviation of its own."""
        g = cases.rng(seed + self.channels)
        noise = g.standard_normal((self.batch, int(np.prod(self.spatial)), self.groups, self.channels // self.groups))
        level, spread = (g.uniform(0.5, 2.0, (self.batch, 1, self.groups, 1)) for _ in range(2))
        x = oracle.from_groups(noise * self.std * spread + self.mean * level, self.shape, -1 if self.last else 1)
        x = np.ascontiguousarray(x).astype(cases.dtype(self.x))
        bias = None if self.bias is None else cases.normal(g, (self.channels,), self.bias, std=0.5)
        return x, cases.weight(g, self.channels, self.weight), bias

    def cotangent(self, seed: int = 7) -> np.ndarray:
        return cases.normal(cases.rng(seed), self.shape, self.out_dtype, mean=0.25)

    def forward(self, arrays: tuple[Any, ...]) -> oracle.GroupNorm:
        return oracle.forward(*arrays, **self.options)

    def problem(self, stage: str, target: str = "sm_90", *, stats: bool = True, vectors: bool = True) -> Problem:
        """``groupnorm_fwd`` or ``groupnorm_bwd`` as a kernel's plan sees it."""
        c, image, forward = self.channels, self.shape, stage == "groupnorm_fwd"
        saved, size = ((self.batch, 3, c), F32), c // self.groups
        buffers: dict[str, tuple[tuple[int, ...], str | None]] = {"x": (image, self.x)}
        buffers |= {"weight": ((c,), self.weight), "bias": ((c,), self.bias if forward or self.silu else None)}
        if forward:
            buffers |= {"y": (image, self.out_dtype), **({"stats": saved} if stats else {})}
        else:
            buffers |= {"stats": saved, "dy": (image, self.out_dtype), "dx": (image, self.x)}
            buffers |= {"dweight": ((c,), self.weight), "dbias": ((c,), self.bias)} if vectors else {}
        kept = {n: (s, d) for n, (s, d) in buffers.items() if d is not None}
        options: dict[str, object] = {"group_channels": size, "count": size * int(np.prod(self.spatial))}
        options |= {"last": self.last or not self.spatial, "silu": self.silu} | ({"eps": self.eps} if forward else {})
        shapes, dtypes = (tuple((n, v[i]) for n, v in kept.items()) for i in range(2))
        return Problem(stage, self.batch, c, shapes, dtypes, tuple(options.items()), target)

    def stats(self, f: oracle.GroupNorm) -> np.ndarray:
        """The saved statistics of the oracle, ``[B, 3, C]``: m0, what it lost to rounding, 1 / deviation."""
        mean, rstd = (np.broadcast_to(a, (self.batch, 1, *f.weight.shape)) for a in (f.mean, f.rstd))
        m0 = mean.astype(np.float32)
        return np.stack([a.reshape(self.batch, -1) for a in (m0, mean - m0, rstd)], 1).astype(np.float32)


# --- after models
SD_UNET = (
    Case(2, (64, 64), 320, 32),
    Case(2, (32, 32), 640, 32),
    Case(2, (16, 16), 1280, 32),
    Case(2, (8, 8), 1280, 32),
    Case(2, (16, 16), 1920, 32),
    Case(2, (8, 8), 2560, 32),
    Case(2, (32, 32), 960, 32),
)
SD_VAE = (
    Case(1, (512, 512), 128, 32, eps=1e-6),
    Case(1, (256, 256), 256, 32, eps=1e-6),
    Case(1, (128, 128), 512, 32, eps=1e-6),
)
# spatial sizes that are no multiple of 4, channels first as the models have it
VIDEO = (
    Case(3, (5, 7, 11), 256, 32, last=False),
    Case(5, (2, 5, 3), 32, 16, last=False),
    Case(4, (17, 144, 256), 256, 16, last=False),
)
# --- edges: what changes the way of a kernel
SMALL = (
    Case(2, (4, 4), 32, 8),
    Case(3, (5,), 12, 3, x=F16, weight=F32, bias=F32, silu=True),
    Case(2, (3, 3, 3), 10, 2, x=F32, weight=BF16, bias=None),  # 5 channels a group: groups straddle chunks
    Case(2, (7, 9), 40, 4, silu=True, weight=F32, out=F32),
    Case(3, (11,), 8, 8, x=F32, weight=F32, bias=F16, silu=True),  # instance norm
    Case(2, (33,), 96, 32, weight=F16, bias=BF16, silu=True),
    Case(4, (), 24, 6, weight=None, bias=F32),  # no spatial dims
    Case(2, (6, 5), 14, 1, x=F16, weight=None, bias=None, out=BF16),  # layer norm over all
    Case(1, (1, 1), 6, 2, x=F16, weight=F16, bias=F32),
    Case(2, (3, 2, 2), 20, 4, x=F32, weight=F16, bias=BF16, out=F16),
    Case(3, (8, 3), 12, 6, x=F16, weight=BF16, bias=F16, silu=True),
)
"""Every pair of dtypes of x and weight."""
EVERY_SMALL = (*SMALL, *(c.first for c in SMALL[:6]))
# float32 holds 1e4 + N(0, 1); 16-bit formats do not, so mean 64 and deviation 8
LARGE_MEAN = (
    Case(2, (6, 7), 20, 2, x=F32, weight=F32, bias=F32, mean=1e4, std=1.0),
    Case(2, (6, 7), 20, 2, weight=F32, bias=F32, mean=64.0, std=8.0, silu=True),
    Case(2, (16, 16), 24, 3, x=F16, weight=F32, bias=F32, mean=64.0, std=8.0).first,
)
