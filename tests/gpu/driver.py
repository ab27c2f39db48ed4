"""The GPU driver through ctypes, to run a stage's kernels on buffers inside one arena with guard bytes around each of them.

XLA owns the buffers of a jitted program, so nothing there can be put around an output; here every byte between the buffers is known
before and compared after the launches.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil

import jax
import numpy as np
from jaxnorm.kernels.configs import Problem

from jaxnorm import _api, _launch, _stage

for _module in pkgutil.iter_modules(_api.__path__):  # they register the stages
    importlib.import_module(f"jaxnorm._api.{_module.name}")

GUARD = 4096
"""Bytes before the first buffer and at least as many after each."""


class Driver:
    """The few driver calls that this needs, for CUDA and HIP."""

    def __init__(self) -> None:
        device = jax.devices()[0]
        self.hip = "rocm" in device.client.platform_version.lower()
        names = ("libamdhip64.so.7", "libamdhip64.so.6") if self.hip else ("libcuda.so.1",)
        self.library = next(lib for lib in map(self._open, names) if lib is not None)
        if not self.hip:
            context, handle = ctypes.c_void_p(), ctypes.c_int()
            self("cuDeviceGet", ctypes.byref(handle), 0)
            self("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self("cuCtxSetCurrent", context)

    @staticmethod
    def _open(name: str) -> ctypes.CDLL | None:
        try:
            return ctypes.CDLL(name)
        except OSError:
            return None

    def __call__(self, name: str, *args) -> None:
        code = getattr(self.library, name)(*args)
        assert code == 0, f"{name} returned {code}"

    def allocate(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self("hipMalloc" if self.hip else "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def free(self, pointer: ctypes.c_void_p) -> None:
        self("hipFree" if self.hip else "cuMemFree_v2", pointer)

    def upload(self, pointer: ctypes.c_void_p, data: np.ndarray) -> None:
        self(
            "hipMemcpyHtoD" if self.hip else "cuMemcpyHtoD_v2",
            pointer,
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_size_t(data.nbytes),
        )

    def download(self, data: np.ndarray, pointer: ctypes.c_void_p) -> None:
        self(
            "hipMemcpyDtoH" if self.hip else "cuMemcpyDtoH_v2",
            ctypes.c_void_p(data.ctypes.data),
            pointer,
            ctypes.c_size_t(data.nbytes),
        )

    def launch(self, code, grid, layout: str, scalars: list[int], pointers: list[int], together: bool = False) -> None:
        """``layout`` as for the library's launcher; two null pointers follow. ``together``: all blocks at the same time."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        prefix = "hip" if self.hip else "cu"
        self(f"{prefix}ModuleLoadData", ctypes.byref(module), code.image)
        self(f"{prefix}ModuleGetFunction", ctypes.byref(function), module, code.name.encode())
        if code.shared > 48 << 10 and not self.hip:
            self("cuFuncSetAttribute", function, 8, ctypes.c_int(code.shared))  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        if not self.hip:  # clusters of more than 8 blocks
            self("cuFuncSetAttribute", function, 14, ctypes.c_int(1))  # NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        buffers, numbers, values = iter(pointers), iter(scalars), []
        for kind in layout + "nn":
            if kind in "pn":
                values.append(ctypes.c_void_p(next(buffers) if kind == "p" else None))
            else:
                values.append(
                    ctypes.c_int64(next(numbers)) if kind == "l" else ctypes.c_uint32(next(numbers) & 0xFFFFFFFF)
                )
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        name = f"{prefix}{'Module' if self.hip else ''}Launch{'Cooperative' if together else ''}Kernel"
        sizes = map(ctypes.c_uint, (*grid, code.threads, 1, 1, code.shared))
        self(name, function, *sizes, None, parameters, *([] if together else [None]))
        self("hipDeviceSynchronize" if self.hip else "cuCtxSynchronize")
        self("hipModuleUnload" if self.hip else "cuModuleUnload", module)


def run_guarded(
    driver: Driver, backend: str, problem: Problem, operands: dict[str, np.ndarray], fill: int, room: bool = True
) -> dict[str, np.ndarray]:
    """Run all launches of a stage in an arena filled with the byte ``fill``; results by name.

    Buffers start on 256 bytes, as XLA's do, and end where they end; a result that takes an operand's place has its buffer. Asserts
    that no byte outside of a launch's outputs changed.
    ``room``: on NVIDIA, launches whose blocks meet are launched; else those that stand in for them.
    ``fill`` = 0xFF is NaN in every float format, so a value read from a guard shows in the results.
    """
    stage = _stage.STAGES[problem.stage]
    plan = importlib.import_module(f"jaxnorm.kernels.configs.{stage.plans[backend]}").plan(problem)
    room = room and not driver.hip
    plan = [launch for launch in plan if launch.meeting == 0 or (launch.meeting > 0) == room]
    shapes = dict(problem.shapes) | {name: shape for launch in plan for name, shape, _ in launch.temps}
    dtypes = dict(problem.dtypes) | {name: dtype for launch in plan for name, _, dtype in launch.temps}
    size = lambda name: int(np.prod(shapes[name], dtype=np.int64)) * _numpy(dtypes[name]).itemsize  # noqa: E731
    same = {result: operand for launch in plan for operand, result in launch.aliases}
    offsets, end = {}, GUARD
    for name in shapes:
        if name in same:
            offsets[name] = offsets[same[name]]
            continue
        offsets[name] = end
        end = -(-(end + size(name)) // 256) * 256 + GUARD
    host = np.full(end, fill, np.uint8)
    for name, value in operands.items():
        assert value.nbytes == size(name), name
        host[offsets[name] : offsets[name] + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    arena = driver.allocate(end)
    assert arena.value is not None
    try:
        driver.upload(arena, host)
        after = host.copy()
        known = dict.fromkeys(operands)
        for launch in plan:
            layout, scalars = _launch._layout(launch, problem, known)
            outputs = [n for n in launch.outputs if n in shapes]
            used = [n for n in launch.inputs if n in known] + outputs
            code = _launch.compile_launch(launch, problem, backend)
            addresses = [arena.value + offsets[n] for n in used]
            driver.launch(code, launch.grid, layout, scalars, addresses, together=launch.meeting > 0)
            driver.download(after, arena)
            for name in outputs:
                span = slice(offsets[name], offsets[name] + size(name))
                host[span] = after[span]
            changed = np.flatnonzero(host != after)
            assert not len(changed), (
                f"{launch.kernel} wrote {len(changed)} bytes outside of its results: {_where(int(changed[0]), offsets, size)}"
            )
            known |= dict.fromkeys(outputs)
    finally:
        driver.free(arena)
    cut = lambda n: after[offsets[n] : offsets[n] + size(n)].view(_numpy(dtypes[n])).reshape(shapes[n])  # noqa: E731
    return {name: cut(name) for name in shapes if name not in operands}


def _numpy(name: str) -> np.dtype:
    import cases

    return cases.dtype(name)


def _where(byte: int, offsets: dict[str, int], size) -> str:
    name = max((n for n in offsets if offsets[n] <= byte), key=lambda n: offsets[n], default="")
    return f"byte {byte - offsets[name] - size(name):+d} from the end of {name}" if name else "before the first buffer"
