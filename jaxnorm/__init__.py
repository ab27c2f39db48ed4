"""jaxnorm: normalisation kernels for JAX on AMD and NVIDIA GPUs, and on the CPU.

One call works under jit, grad, vmap, scan, pmap, shard_map and NamedSharding. ``python -m jaxnorm doctor`` tells what runs here.
"""

from ._api.rmsnorm import add_rmsnorm, rmsnorm
from ._compile.target import use_target
from ._dispatch import BackendInfo, backends, use_backend
from ._explain import Choice, explain
from ._export import export_checks
from ._version import __version__
from .errors import UnsupportedError

__all__ = [
    "BackendInfo",
    "Choice",
    "UnsupportedError",
    "__version__",
    "add_rmsnorm",
    "backends",
    "explain",
    "export_checks",
    "rmsnorm",
    "use_backend",
    "use_target",
]
