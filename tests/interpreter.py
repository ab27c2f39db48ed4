"""Runs the launches of a Triton plan on the CPU, through Triton's own interpreter with its rounding put right.

numpy only: no torch, no TRITON_INTERPRET, and kernels can be compiled before and after in the same process. It shows indexing,
masks, rounding points and arithmetic. It does not show races, alignment, access widths, spills, or anything of the hardware.

Every array lies between guards of all-ones bytes, which read as NaN in every float format: an access out of bounds shows as a
NaN in a result or as a changed guard.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter as _triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _get_np_dtype, interpreter_builder
from triton.runtime.jit import JITFunction

GUARD = 4096
"""Bytes before and after an array."""
POISON = 0xFF
CASTS = ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "cast_impl")
"""Methods of the interpreter's builder that convert between float formats."""
_SPECIAL = {
    "bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn, "fp8e5": ml_dtypes.float8_e5m2,
    "fp8e4b8": ml_dtypes.float8_e4m3fnuz, "fp8e5b16": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
_lock = threading.RLock()  # the patching below is process-wide
_twins: dict[
    int, InterpretedFunction
] = {}  # by id: hash(JITFunction) walks its dependencies, which are swapped just then


def expected_internals() -> list[str]:
    """What this module needs of triton's interpreter and does not find: empty, or the interpreter changed."""
    missing = [
        f"InterpreterBuilder.{name}" for name in (*CASTS, "create_fma") if not hasattr(interpreter_builder, name)
    ]
    for name in (
        "InterpretedFunction",
        "GridExecutor",
        "TensorHandle",
        "_patch_lang",
        "_patch_lang_tensor",
        "_patch_lang_core",
        "_get_np_dtype",
    ):
        if not hasattr(_triton_interpreter, name):
            missing.append(name)
    return missing


class Guarded:
    """An array with a guard on either side, aligned to 64 bytes (to ``64 * k + offset`` with an offset)."""

    def __init__(self, shape: Sequence[int], dtype: Any, offset: int = 0):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.raw = np.full(size + 2 * GUARD + 128, POISON, np.uint8)
        self.start = GUARD + (-(self.raw.ctypes.data + GUARD) % 64) + offset
        self.stop = self.start + size
        self.array = self.raw[self.start : self.stop].view(dtype).reshape(shape)

    def check(self, name: str) -> None:
        """Fail if a guard was written."""
        for side, guard in (("before", self.raw[: self.start]), ("after", self.raw[self.stop :])):
            if (bad := np.flatnonzero(guard != POISON)).size:
                raise AssertionError(
                    f"{name}: {bad.size} bytes {side} the array were overwritten, first at {int(bad[0])}"
                )


class _Storage:
    def __init__(self, array: np.ndarray):
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> _Storage:
        return self

    def copy_(self, other: _Storage) -> None:
        """Host and device are one memory here."""


class _Pointer:
    """The least the interpreter asks of a torch tensor."""

    def __init__(self, array: np.ndarray | None, dtype: str = ""):
        self.array = array
        self.dtype = dtype or np.dtype(array.dtype).name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Storage:
        return _Storage(self.array)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def new_empty(self, _: int, device: str | None = None) -> _Pointer:
        return _Pointer(None, self.dtype)

    def set_(self, storage: _Storage, *_: object) -> None:
        self.array = storage.array


def _twin(fn: Any) -> InterpretedFunction:
    plain = getattr(fn, "fn", fn)
    if id(plain) not in _twins:
        _twins[id(plain)] = InterpretedFunction(plain)
    return _twins[id(plain)]


def _rounding_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """To nearest even for every pair of float formats; the interpreter's own truncates float32 to bfloat16."""

    def cast(src: Any, dst_type: Any, *rest: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        floats = source.is_floating() and target.is_floating()
        if not floats or not {source.name, target.name} & _SPECIAL.keys():
            return original(src, dst_type, *rest)
        data = np.ascontiguousarray(src.data)
        if source.name in _SPECIAL:
            data = data.view(_SPECIAL[source.name]).astype(np.float32)
        with np.errstate(all="ignore"):
            data = data.astype(_SPECIAL.get(target.name) or _get_np_dtype(target))
        return TensorHandle(data.view(_get_np_dtype(target)) if target.name in _SPECIAL else data, target)

    return cast


def _fused(x: Any, y: Any, z: Any) -> Any:
    """A multiply-add with one rounding (the float64 sum is itself exact or rounds far below float32); the interpreter's has two."""
    with np.errstate(all="ignore"):
        wide = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _patch_tensor(tensor: Any, scope: Any, original: Callable[..., Any]) -> None:
    """Scalars as loop bounds: the interpreter holds them as arrays of one element, which numpy 2.4 refuses to call an int."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_core(lang: Any, scope: Any, original: Callable[..., Any]) -> None:
    """The interpreter's table of types lacks the fnuz formats, though its builder has them."""
    original(lang, scope)
    known = tl.dtype.to_ir
    rest = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}
    new = lambda self, builder: getattr(builder, rest[self.name])() if self.name in rest else known(self, builder)  # noqa: E731
    scope.set_attr(tl.dtype, "to_ir", new)


class _Interpreting:
    """While open, ``fn`` and all it calls are interpreted; on leaving, ``triton.language`` is as it was.

    The interpreter patches ``triton.language`` from every helper it enters and never undoes that, after which compilation in the
    process fails: so the modules and classes are photographed first."""

    def __init__(self, fn: Any):
        self.fn = fn
        self.undo: list[tuple[Callable[[str, Any], None], str, Any]] = []

    def _set(self, setter: Callable[[str, Any], None], key: str, old: Any, new: Any) -> None:
        self.undo.append((setter, key, old))
        setter(key, new)

    def __enter__(self) -> None:
        # triton imports gluon lazily; it must see the real functions, so now
        importlib.import_module("triton.experimental.gluon.language")
        modules = [
            m for n, m in list(sys.modules.items()) if n == "triton.language" or n.startswith("triton.language.")
        ]
        owned = lambda c: isinstance(c, type) and c.__module__.startswith("triton.language")  # noqa: E731
        classes = [c for m in modules for c in vars(m).values() if owned(c)]
        self.photo = [(o, dict(vars(o))) for o in {id(o): o for o in [*modules, *classes]}.values()]
        for owner in [*modules, tl.tensor]:  # tl.sum(x) and x.sum()
            for key, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    self._set(functools.partial(setattr, owner), key, value, _twin(value))
        for key in CASTS:
            old = getattr(interpreter_builder, key)
            self._set(functools.partial(setattr, interpreter_builder), key, old, _rounding_cast(old))
        old = interpreter_builder.create_fma
        self._set(functools.partial(setattr, interpreter_builder), "create_fma", old, _fused)
        for name, ours in (("_patch_lang_tensor", _patch_tensor), ("_patch_lang_core", _patch_core)):
            patch = getattr(_triton_interpreter, name)
            replacement = functools.partial(ours, original=patch)
            self._set(functools.partial(setattr, _triton_interpreter), name, patch, replacement)
        self._swap_helpers()

    def _swap_helpers(self) -> None:
        """Twins for the @jit functions that the kernel reaches through module globals."""
        seen, todo = set(), [self.fn]
        while todo:
            names = todo.pop().__globals__
            if id(names) in seen:
                continue
            seen.add(id(names))
            for key, value in list(names.items()):
                if isinstance(value, JITFunction) and not value.__module__.startswith("triton."):
                    self._set(names.__setitem__, key, value, _twin(value))
                    todo.append(value.fn)

    def __exit__(self, *_: object) -> None:
        for setter, key, value in reversed(self.undo):
            setter(key, value)
        for owner, before in self.photo:
            now = dict(vars(owner))
            for key, value in before.items():
                if now.get(key, self) is not value:
                    setattr(owner, key, value)
            if isinstance(owner, type):  # additions to modules stay: rewritten functions look names up there
                for key in now.keys() - before.keys():
                    delattr(owner, key)


def launch(fn: Any, grid: Sequence[int], args: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """One launch. ``args``: numpy arrays (bf16 and fp8 as ml_dtypes), written in place, and scalars, in kernel order."""
    plain = getattr(fn, "fn", fn)
    with _lock:
        twin = _twin(plain)
        with _Interpreting(plain), np.errstate(all="ignore"):
            pointers = [_Pointer(a) if isinstance(a, np.ndarray) else a for a in args]
            twin.run(*pointers, grid=tuple(grid), warmup=False, **constants)


def run(
    plan: Sequence[Any], problem: Any, operands: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None
):
    """All launches of a plan; results and scratch by name.

    ``aliases`` maps a result to the operand whose buffer it shares. Fails if a guard was overwritten or an operand changed."""
    from jaxnorm._compile import triton as compiler

    aliases = dict(aliases or {})
    buffers = {name: Guarded(a.shape, a.dtype) for name, a in operands.items()}
    for name, guarded in buffers.items():
        guarded.array[...] = operands[name]
    for step in plan:
        temps = {name: (shape, dtype) for name, shape, dtype in step.temps}
        for name in step.outputs:
            if name in temps:
                buffers[name] = Guarded(temps[name][0], _dtype(temps[name][1]))
            elif name in aliases and name not in buffers:
                buffers[name] = buffers[aliases[name]]
            elif problem.has(name) and name not in buffers:
                buffers[name] = Guarded(problem.shape(name), _dtype(problem.dtype(name)))
        # An absent buffer gets one poisoned element: to read it shows, to write it is caught.
        absent = {name: Guarded((1,), np.float32) for name in (*step.inputs, *step.outputs) if name not in buffers}
        everything = buffers | absent
        pointer = lambda name: _bytes_of_fp8(everything[name].array)  # noqa: B023, E731
        args = [*map(pointer, step.inputs), *(v for _, _, v in step.scalars), *map(pointer, step.outputs)]
        launch(compiler.function(step), step.grid, args, dict(step.constants))
        for name, guarded in everything.items():
            guarded.check(name)
        for name, guarded in absent.items():
            assert (guarded.array.view(np.uint8) == POISON).all(), f"{name}: written though absent"
    for name, a in operands.items():
        if name not in aliases.values():
            assert buffers[name].array.tobytes() == a.tobytes(), f"{name}: an operand was written"
    return {name: guarded.array for name, guarded in buffers.items() if name not in operands}


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _bytes_of_fp8(a: np.ndarray) -> np.ndarray:
    """Kernels write fp8 as bytes, as jaxnorm._compile.triton.TYPES says."""
    return a.view(np.uint8) if a.dtype.name.startswith("float8") else a
