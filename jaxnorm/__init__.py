"""jaxnorm: normalisation kernels for JAX on AMD and NVIDIA GPUs, and on the CPU.

One call works under jit, grad, vmap, scan, pmap, shard_map and NamedSharding. ``python -m jaxnorm doctor`` tells what runs here.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__

if "jax" in sys.modules:  # else it may not even be installed, and the doctor is asked why
    from . import _context as _context

if TYPE_CHECKING:
    from . import aiter as aiter
    from . import linen as linen
    from . import nnx as nnx
    from ._api.cache import qk_norm_rope_cache
    from ._api.groupnorm import groupnorm
    from ._api.layernorm import add_layernorm, layernorm
    from ._api.layernorm_quant import add_layernorm_quant, layernorm_quant
    from ._api.qk import qk_norm_rope, qk_norm_rope_two_stream
    from ._api.quant import add_rmsnorm_quant, quantize, rmsnorm_quant
    from ._api.rmsnorm import add_rmsnorm, rmsnorm
    from ._api.rope import mrope, rope, rope_table
    from ._cache import KVCache
    from ._compile.target import use_target
    from ._dispatch import BackendInfo, backends, use_backend
    from ._explain import Choice, explain
    from ._export import export_checks
    from ._swap import swap
    from ._types import Quantized, QuantSpec
    from .errors import UnsupportedError

__all__ = [
    "BackendInfo",
    "Choice",
    "KVCache",
    "QuantSpec",
    "Quantized",
    "UnsupportedError",
    "__version__",
    "add_layernorm",
    "add_layernorm_quant",
    "add_rmsnorm",
    "add_rmsnorm_quant",
    "backends",
    "explain",
    "export_checks",
    "groupnorm",
    "layernorm",
    "layernorm_quant",
    "mrope",
    "qk_norm_rope",
    "qk_norm_rope_cache",
    "qk_norm_rope_two_stream",
    "quantize",
    "rmsnorm",
    "rmsnorm_quant",
    "rope",
    "rope_table",
    "swap",
    "use_backend",
    "use_target",
]

# Loaded at first use: importing jaxnorm costs next to nothing, and `python -m jaxnorm doctor` works when jax does not.
_HOME = {
    "BackendInfo": "_dispatch",
    "Choice": "_explain",
    "KVCache": "_cache",
    "QuantSpec": "_types",
    "Quantized": "_types",
    "UnsupportedError": "errors",
    "add_layernorm": "_api.layernorm",
    "add_layernorm_quant": "_api.layernorm_quant",
    "add_rmsnorm": "_api.rmsnorm",
    "add_rmsnorm_quant": "_api.quant",
    "backends": "_dispatch",
    "explain": "_explain",
    "export_checks": "_export",
    "mrope": "_api.rope",
    "qk_norm_rope": "_api.qk",
    "qk_norm_rope_cache": "_api.cache",
    "qk_norm_rope_two_stream": "_api.qk",
    "groupnorm": "_api.groupnorm",
    "layernorm": "_api.layernorm",
    "layernorm_quant": "_api.layernorm_quant",
    "quantize": "_api.quant",
    "rmsnorm": "_api.rmsnorm",
    "rmsnorm_quant": "_api.quant",
    "rope": "_api.rope",
    "rope_table": "_api.rope",
    "swap": "_swap",
    "use_backend": "_dispatch",
    "use_target": "_compile.target",
}
# Modules, also at first use: linen and nnx import flax, which is optional.
_MODULES = ("aiter", "distributed", "linen", "nnx")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jaxnorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
