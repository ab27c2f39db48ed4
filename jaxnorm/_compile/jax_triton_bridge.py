"""Launches through ``jax_triton.triton_call``: an alternative to our launcher, for comparison and for who asks for it.

Known to differ from the launcher: never captured in command buffers with jax-triton 0.3, file paths inside the module on ROCm
(no export), device 0 decides the target, and compiler options beyond warps and stages are dropped by jax-triton 0.3.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedError
from ..kernels.configs import Launch, Problem, wave_size

REMEDY = "Use the launcher (JAXNORM_TRITON_BRIDGE=launcher)."
OLDEST, NEWEST = (0, 3, 1), (0, 4)  # inclusive; the second compares the first two numbers


def available(platform: str) -> tuple[bool, str, str]:
    """(whether ``call`` can serve ``platform``, reason, remedy), from the versions installed; imports nothing of them."""
    if importlib.util.find_spec("jax_triton") is None:
        return False, "jax-triton is not installed.", "pip install 'jax-triton>=0.3.1'"
    reason = _refusal(_version("jax-triton"), _version("jax"), _version("triton"), platform)
    return not reason, reason, REMEDY if reason else ""


def call(launch: Launch, problem: Problem, args: Sequence[Any], out_types: Sequence[Any]) -> list[Any]:
    """The launch on ``args`` (one array per input, stand-ins for absent ones), giving one array per output.

    Raises:
      UnsupportedError: jax-triton is missing, does not work in this combination of versions, or does not know the chip.
    """
    platform = "rocm" if problem.target.startswith("gfx") else "cuda"
    usable, reason, remedy = available(platform)
    if usable and platform == "rocm" and wave_size(problem.target) != 64:
        usable, reason, remedy = False, f"jax-triton launches waves of 64 lanes, {problem.target} has 32.", REMEDY
    if usable and any(dtype.startswith("float8") for _, dtype in problem.dtypes):
        # Our kernels write codes as bytes; into an fp8 pointer, which jax-triton would pass, they would be converted once more.
        usable, reason, remedy = (
            False,
            "jax-triton passes fp8 buffers with their dtype, the kernels write bytes.",
            REMEDY,
        )
    if not usable:
        raise UnsupportedError(problem.stage, problem.target, reason, remedy)
    return list(_module(problem.target).triton_call(*arguments(launch, args), **keywords(launch, problem, out_types)))


def arguments(launch: Launch, args: Sequence[Any]) -> tuple[Any, ...]:
    """Positional arguments of ``triton_call``: the arrays, then the scalars."""
    return (*args, *(value for _, _, value in launch.scalars))


def keywords(launch: Launch, problem: Problem, out_types: Sequence[Any]) -> dict[str, Any]:
    """Keyword arguments of ``triton_call``, by the names of the installed version."""
    from . import triton

    words: dict[str, Any] = {
        "kernel": triton.function(launch),
        "grid": launch.grid,
        "name": launch.kernel.split(":")[1],
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **dict(launch.constants),
    }
    if launch.aliases:
        words["input_output_aliases"] = launch.aliased()
    if problem.target.startswith("sm_"):
        words["compute_capability"] = int(problem.target[3:])
    if _version("jax-triton") >= (0, 4):
        words["out_type"] = list(out_types)
        words["backend_options"] = {"enable_fp_fusion": True, **dict(launch.options)}
    else:
        words["out_shape"] = list(out_types)
        words["enable_fp_fusion"] = True
    return words


def _version(package: str) -> tuple[int, ...]:
    from . import triton

    text = triton.version() if package == "triton" else _metadata_version(package)
    return tuple(int(p) for p in text.split(".")[:3] if p.isdigit())


@functools.cache
def _metadata_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _refusal(bridge: tuple[int, ...], jax: tuple[int, ...], triton: tuple[int, ...], platform: str) -> str:
    """Why this combination does not work; empty when it does or nothing is known against it."""
    names = [f"{n} {'.'.join(map(str, v))}" for n, v in (("jax-triton", bridge), ("jax", jax), ("triton", triton))]
    combination = " with ".join([names[0], " and ".join(names[1:])])
    if bridge < OLDEST or bridge[:2] > NEWEST:
        return f"{names[0]} was never tried; 0.3.1 to 0.4 are known."
    if platform == "rocm" and triton >= (3, 9):
        return f"{combination} fails on ROCm: KeyError 'num_ctas'."
    if bridge >= (0, 4):
        if jax >= (0, 12) or jax < (0, 11):
            return f"{combination} fails: its primitive wants jax 0.11."
        if triton < (3, 7) and platform == "cuda":
            return f"{combination} fails: it wants the GPUTarget of triton 3.7 or newer."
    return ""


@functools.cache
def _module(target: str) -> Any:
    """jax_triton, without the change to ``TRITON_CACHE_DIR`` that importing it makes."""
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    except ImportError as e:  # jax-triton 0.3 needs jaxlib's GPU extension even to be imported
        raise UnsupportedError("jax-triton", target, f"jax-triton cannot be imported: {e}.", REMEDY) from e
    finally:
        if before is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton
