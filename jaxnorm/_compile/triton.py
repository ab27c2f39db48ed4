"""A Triton kernel of ``kernels/`` to machine code for a named target, through Triton's public compile().

No device, no vendor library: triton brings the assemblers of both vendors. Triton is imported only when a kernel is really
compiled; a code object from the cache costs its key alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import threading
from pathlib import Path
from typing import Any

from ..kernels.configs import Launch, Problem, wave_size
from .cache import get_or_compile
from .code_object import CodeObject

TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8", "uint8": "u8", "int32": "i32", "int64": "i64",
    # Kernels write fp8 as bytes: not every target's compiler has every format as a type.
    "float8_e4m3fn": "u8", "float8_e5m2": "u8", "float8_e4m3fnuz": "u8", "float8_e5m2fnuz": "u8",
}  # fmt: skip
POINTER_ALIGNMENT = 16
OLDEST, REMEDY = (3, 6), "pip install 'triton>=3.6'"
_compiling = threading.Lock()  # triton.compile is not documented as thread-safe


def available() -> tuple[bool, str, str]:
    """(whether Triton kernels can be compiled here, reason, remedy), without importing triton."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed.", REMEDY
    number = version()
    if not number:
        return False, "triton has no version metadata.", REMEDY
    if tuple(int(p) for p in number.split(".")[:2]) < OLDEST:
        return False, f"triton {number} is older than {'.'.join(map(str, OLDEST))}.", REMEDY
    return True, "", ""


@functools.cache
def version() -> str:
    """Version of the installed triton, from its metadata; empty when there is none."""
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def signature(launch: Launch, problem: Problem) -> tuple[str, ...]:
    """Triton type of every run-time parameter, in order."""
    temps = {name: dtype for name, _, dtype in launch.temps}
    given = dict(problem.dtypes) | temps
    # A temp of an earlier launch of the stage is an input here; it is float32 unless this launch says otherwise.
    missing = given.get(launch.inputs[0], "float32")
    buffer = lambda name: "*" + TYPES[given.get(name, missing)]  # noqa: E731
    return (*map(buffer, launch.inputs), *(kind for _, kind, _ in launch.scalars), *map(buffer, launch.outputs))


def compile(launch: Launch, problem: Problem) -> CodeObject:
    """Machine code of one launch for ``problem.target``, from the cache or compiled now.

    Raises:
      ValueError: an option that the backend of this triton does not have.
      RuntimeError: triton is missing, or asks for memory that no launcher provides.
    """
    types, options, portable = signature(launch, problem), _options(launch), portable_key(launch, problem)
    return get_or_compile(
        ["no line info", version(), *portable], lambda: _build(launch, problem.target, types, options), portable
    )


def portable_key(launch: Launch, problem: Problem) -> list[str]:
    """All that decides the machine code but the version of triton: what a shipped code object is found by."""
    return [
        "triton", problem.target, launch.kernel, *signature(launch, problem), str(POINTER_ALIGNMENT), sources_digest(),
        *(_exact(k, v) for k, v in launch.constants), "options", *(_exact(k, v) for k, v in sorted(_options(launch).items())),
    ]  # fmt: skip


def _options(launch: Launch) -> dict[str, object]:
    return {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,  # said aloud: its default differs between versions
        **dict(launch.options),
    }


def _exact(name: str, value: object) -> str:
    """Text that differs whenever the constant does, in type or in the last bit."""
    return f"{name}={type(value).__name__}:{value.hex() if isinstance(value, float) else value!r}"


@functools.cache
def sources_digest() -> str:
    """Digest of the text of every kernel module: a kernel may call helpers of any of them."""
    h = hashlib.sha256()
    spec = importlib.util.find_spec("jaxnorm.kernels")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*.py")):
            h.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return h.hexdigest()


def _target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, wave_size(target))
    if target.startswith("sm_") and target[3:].isdigit():
        return GPUTarget("cuda", int(target[3:]), 32)
    raise ValueError(f"target: got {target!r}, expected gfxNNN or sm_NN.")


def function(launch: Launch) -> Any:
    """The ``@triton.jit`` function of a launch. Imports triton."""
    module, name = launch.kernel.split(":")
    return getattr(importlib.import_module(f"jaxnorm.kernels.{module}"), name)


def run(launch: Launch, types: tuple[str, ...], target: str, options: dict[str, object], aligned: bool = True) -> Any:
    """Triton's own result (``.asm``, ``.metadata``). ``aligned=False`` leaves out the alignment of pointers, which tests use to
    prove that their look at access widths still sees narrow ones."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    fn, gpu = function(launch), _target(target)
    assert isinstance(gpu, GPUTarget)
    defaults: Any = make_backend(gpu).parse_options({})
    known = {f.name for f in dataclasses.fields(defaults)}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"{launch.kernel}: options: got {unknown}, which triton {version()} does not have for {target}."
        )
    constants = dict(launch.constants)
    names = fn.arg_names
    if names[len(types) :] != list(constants):
        raise ValueError(f"{launch.kernel}: constants: got {list(constants)}, expected {names[len(types) :]}.")
    # The number of rows gets no hint on purpose: one code object for every M.
    attrs = {(i,): [["tt.divisibility", POINTER_ALIGNMENT]] for i, t in enumerate(types) if t[0] == "*" and aligned}
    source = ASTSource(
        fn,
        {n: types[i] if i < len(types) else "constexpr" for i, n in enumerate(names)},
        {(names.index(n),): v for n, v in constants.items()},
        attrs,
    )
    with knobs.compilation.scope():
        # Paths of this machine's sources would end up in the code object. Triton's own cache has the knob in
        # its key, ours the words "no line info".
        knobs.compilation.disable_line_info = True
        return triton.compile(source, target=gpu, options=dict(options))


def _build(launch: Launch, target: str, types: tuple[str, ...], options: dict[str, object]) -> CodeObject:
    usable, reason, remedy = available()
    if not usable:
        raise RuntimeError(f"{launch.kernel}: {reason} {remedy}")
    with _compiling:
        kernel = run(launch, types, target, options)
    meta = kernel.metadata
    if scratch := getattr(meta, "global_scratch_size", 0):
        raise RuntimeError(
            f"{launch.kernel}: needs {scratch} bytes of global scratch, which the launcher does not provide."
        )
    if (getattr(meta, "num_ctas", 1) or 1) != 1:
        raise RuntimeError(
            f"{launch.kernel}: needs clusters of {meta.num_ctas} workgroups, which the launcher does not launch."
        )
    hip = target.startswith("gfx")
    return CodeObject(
        image=kernel.asm["hsaco" if hip else "cubin"],
        name=meta.name,
        target=target,
        threads=meta.num_warps * wave_size(target),
        shared=meta.shared,
        source_key="",
        asm=kernel.asm["amdgcn" if hip else "ptx"],
        compiler=f"triton {version()}",
    )
