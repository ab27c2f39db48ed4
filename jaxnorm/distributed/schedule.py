"""Which way the rows go, from shapes and the target alone: every way gives the same bits (except ``reduce="native"``).

Figures are bytes. Those that were measured say so.
"""

from __future__ import annotations

from .._compile import target
from ._config import Config

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

# Partials that a rank receives, up to which one all_gather of them takes the place of an exchange and one or two gathers: two
# collectives saved at about 10 us each against 360 GB/s of an H200's links. The CPU has nothing to save but the copies.
FEW_BYTES = {"cuda": 2 << 20, "rocm": 512 << 10, "cpu": 0}


def few_rows(config: Config) -> bool:
    """Composite: gather the partials instead of exchanging row blocks. Fewer rows than ranks always are few."""
    received = (config.ranks - 1) * config.rows * config.features * ITEMSIZE[config.dtype]
    return config.rows < config.ranks or received <= FEW_BYTES.get(platform(), 0)


def platform() -> str:
    """What is traced now is for this platform; ``cpu`` where ``use_target`` or the default device name no GPU."""
    first = target.in_force(target.named())[0]
    return "cuda" if first.startswith("sm_") else "rocm" if first.startswith("gfx") else "cpu"
