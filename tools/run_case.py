"""Runs kernel cases (docs/kernel-case.md) on the GPU of this machine and says which differ. numpy alone; no jax, no ROCm tools.

    python tools/run_case.py DIR [DIR ...]        # folders with cases (or of `jaxnorm aot --bundle`), or single JSON files
    python tools/run_case.py DIR --only quant -v  # cases with this in their name, a line for each

Exit code: 0 all ran and agree; 1 a case differs or fails; 2 nothing could be run (no GPU, no case for it).
A buffer lies between guard bytes, which must stay; inputs must keep theirs; what a kernel leaves unwritten still holds the fill.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kernel_case import CaseError, bits_differ, compare, itemsize, load

GUARD, FILL = 512, 0xA5
SHARED_LIMIT = 48 << 10  # CUDA: more dynamic shared memory must be asked for
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LARGE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
TRITON_SCRATCH = 2  # null pointers behind the last argument; other kernels do not look
NO_BINARY = (209, 200)  # hipErrorNoBinaryForGpu, CUDA_ERROR_INVALID_IMAGE


class OtherTargetError(Exception):
    """The code object is for another GPU than this machine's."""


# The driver


class Driver:
    """The few driver calls that are needed, of CUDA or HIP."""

    def __init__(self, hip: bool, library: ctypes.CDLL) -> None:
        self.hip, self.library = hip, library
        count = ctypes.c_int()
        if not hip:
            self("cuInit", 0)
        self("hipGetDeviceCount" if hip else "cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise CaseError("the driver finds no device")
        if hip:
            self("hipSetDevice", 0)
        else:
            context, device = ctypes.c_void_p(), ctypes.c_int()
            self("cuDeviceGet", ctypes.byref(device), 0)
            self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self("cuCtxSetCurrent", context)

    @classmethod
    def open(cls) -> Driver:
        """The first vendor with a driver and a device.

        Raises:
          CaseError: there is none.
        """
        reasons = []
        for hip, names in (
            (False, ["libcuda.so.1"]),
            (True, ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"]),
        ):
            for name in names:
                try:
                    return cls(hip, ctypes.CDLL(name))
                except OSError as e:
                    reasons.append(str(e))
                except CaseError as e:
                    reasons.append(f"{name}: {e}")
        raise CaseError("no GPU: " + "; ".join(reasons))

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status in NO_BINARY and name.endswith("ModuleLoadData"):
            raise OtherTargetError(f"{name}: {self._error(status)}")
        if status:
            raise CaseError(f"{name}: {self._error(status)}")

    def _error(self, status: int) -> str:
        text = ctypes.c_char_p()
        try:
            if self.hip:
                function = self.library.hipGetErrorName
                function.restype = ctypes.c_char_p
                text.value = function(status)
            else:
                self.library.cuGetErrorName(status, ctypes.byref(text))
        except AttributeError:
            pass
        return f"{(text.value or b'error').decode()} ({status})"

    def target(self) -> str:
        """``gfx942`` or ``sm_90``; empty when the driver does not say."""
        if not self.hip:
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            self("cuCtxGetDevice", ctypes.byref(device))
            self("cuDeviceGetAttribute", ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
            self("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
            return f"sm_{major.value}{minor.value}"
        # gcnArchName stands at another offset in every version of the structure, and nothing else in it begins with gfx
        properties = ctypes.create_string_buffer(1 << 14)
        for name in ("hipGetDevicePropertiesR0600", "hipGetDeviceProperties"):
            function = getattr(self.library, name, None)
            if function is not None and function(properties, 0) == 0:
                match = re.search(rb"gfx[0-9a-f]+", properties.raw)
                return match[0].decode() if match else ""
        return ""

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self("hipMalloc" if self.hip else "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        self("hipFree" if self.hip else "cuMemFree_v2", ctypes.c_void_p(address))

    def upload(self, address: int, data: np.ndarray) -> None:
        name = "hipMemcpyHtoD" if self.hip else "cuMemcpyHtoD_v2"
        self(name, ctypes.c_void_p(address), ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))

    def download(self, data: np.ndarray, address: int) -> None:
        name = "hipMemcpyDtoH" if self.hip else "cuMemcpyDtoH_v2"
        self(name, ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(address), ctypes.c_size_t(data.nbytes))

    def load(self, image: bytes, name: str, shared: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """(module, function)"""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        prefix = "hip" if self.hip else "cu"
        self(f"{prefix}ModuleLoadData", ctypes.byref(module), image)
        try:
            self(f"{prefix}ModuleGetFunction", ctypes.byref(function), module, name.encode())
            if shared > SHARED_LIMIT and not self.hip:
                self("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, ctypes.c_int(shared))
            if not self.hip:  # a driver that does not know it has no such functions
                self.library.cuFuncSetAttribute(function, LARGE_CLUSTERS, ctypes.c_int(1))
        except CaseError:
            self.unload(module)
            raise
        return module, function

    def unload(self, module: ctypes.c_void_p) -> None:
        self("hipModuleUnload" if self.hip else "cuModuleUnload", module)

    def launch(
        self, function: ctypes.c_void_p, grid: list[int], block: list[int], shared: int, values: list[Any],
        together: bool = False,
    ) -> None:  # fmt: skip
        """One launch, waited for. ``together``: all blocks run at the same time, or it is refused."""
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = map(ctypes.c_uint, (*grid, *block, shared))
        name = f"{'hipModule' if self.hip else 'cu'}Launch{'Cooperative' if together else ''}Kernel"
        self(name, function, *sizes, None, pointers, *([] if together else [None]))
        self("hipDeviceSynchronize" if self.hip else "cuCtxSynchronize")


# Cases


@dataclass
class Buffer:
    """One buffer argument: its bytes with guards before and after, on the host and on the device."""

    argument: dict[str, Any]
    host: np.ndarray
    start: int
    size: int
    base: int = 0
    """Of the allocation on the device; ``host`` is copied to ``shift`` behind it."""
    shift: int = 0
    outcome: list[str] = field(default_factory=list)

    @property
    def inside(self) -> slice:
        return slice(self.start, self.start + self.size)


def make_buffer(argument: dict[str, Any], arrays: dict[str, np.ndarray]) -> Buffer:
    """Host bytes of a buffer argument: guards, fill, data."""
    size = int(np.prod(argument["shape"], dtype=np.int64)) * itemsize(argument["dtype"])
    host = np.full(GUARD + size + GUARD, FILL, np.uint8)
    buffer = Buffer(argument, host, GUARD, size)
    host[buffer.inside] = argument.get("fill", FILL)
    if "data" in argument:
        host[buffer.inside] = arrays[argument["data"]].reshape(-1).view(np.uint8)
    for part in argument.get("parts", ()):
        if "data" in part:
            data = arrays[part["data"]].reshape(-1).view(np.uint8)
            host[buffer.start + part["at"] : buffer.start + part["at"] + data.size] = data
    return buffer


def scalar(argument: dict[str, Any]) -> Any:
    """A scalar argument as bytes of its size."""
    dtype, value = argument["dtype"], argument["value"]
    size = itemsize(dtype)
    if isinstance(value, str):
        raw = int(value, 16).to_bytes(size, "little")
    elif dtype == "bfloat16":
        raw = np.float32(value).tobytes()[2:]
    else:
        raw = np.array(value).astype(np.dtype(dtype)).tobytes()
    return (ctypes.c_char * max(size, 8)).from_buffer_copy(raw.ljust(max(size, 8), b"\0"))


def pointers(argument: dict[str, Any]) -> list[dict[str, Any]]:
    """The buffers (or nulls) that an argument points to: itself, or those of a struct of pointers."""
    return argument["to"] if argument["kind"] == "pointers" else [argument]


def run(driver: Any, path: Path, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """Launches a case and compares; a line for each buffer that differs, nothing when all agree.

    Raises:
      CaseError: the driver refused something.
      OtherTargetError: the code object is not for this GPU.
    """
    buffers = {
        (i, j): make_buffer(a, arrays)
        for i, argument in enumerate(case["args"])
        for j, a in enumerate(pointers(argument))
        if a["kind"] not in ("scalar", "null")
    }
    image = (path.parent / case["code_object"]).read_bytes()
    module, function = driver.load(image, case["kernel"], case.get("shared", 0))
    try:
        values: list[Any] = []
        for i, argument in enumerate(case["args"]):
            if argument["kind"] == "scalar":
                values.append(scalar(argument))
                continue
            keys = [(i, j) for j in range(len(pointers(argument)))]
            addresses = [_place(driver, buffers[key]) if key in buffers else None for key in keys]
            values.append((ctypes.c_void_p * len(keys))(*addresses))
        values += [ctypes.c_void_p(None)] * TRITON_SCRATCH
        together = {"together": True} if case.get("together") else {}
        driver.launch(function, case["grid"], case["block"], case.get("shared", 0), values, **together)
        wrong = []
        for (i, _), buffer in buffers.items():
            after = np.empty_like(buffer.host)
            driver.download(after, buffer.base + buffer.shift)
            name = buffer.argument.get("name", f"argument {i}")
            wrong += [f"{name}: {text}" for text in differences(buffer, after, arrays)]
        return wrong
    finally:
        for buffer in buffers.values():
            if buffer.base:
                driver.free(buffer.base)
        driver.unload(module)


def _place(driver: Any, buffer: Buffer) -> int:
    """Copies a buffer to the device, its first byte ``offset`` behind a multiple of ``align``; that address."""
    align, offset = buffer.argument.get("align", 256), buffer.argument.get("offset", 0)
    buffer.base = driver.allocate(len(buffer.host) + align + offset)
    first = -(-(buffer.base + buffer.start) // align) * align + offset
    buffer.shift = first - buffer.start - buffer.base
    driver.upload(buffer.base + buffer.shift, buffer.host)
    return first


def differences(buffer: Buffer, after: np.ndarray, arrays: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with a buffer after the launch."""
    argument, wrong = buffer.argument, []
    outside = np.ones(len(after), bool)
    outside[buffer.inside] = False
    if (touched := np.flatnonzero(outside & (after != buffer.host))).size:
        at = int(touched[0]) - buffer.start
        where = f"{at}" if at < 0 else f"{at - buffer.size} past the end"
        wrong.append(f"{touched.size} bytes outside of the buffer were written, the first at byte {where}")
    kind = argument["kind"]
    before, inside = buffer.host[buffer.inside], np.ascontiguousarray(after[buffer.inside])
    if kind == "in":
        if (inside != before).any():
            wrong.append("an input was written")
        return wrong
    if "parts" in argument:
        return wrong + _parts(buffer, inside, before, arrays)
    return wrong + (_compared(buffer, argument, inside, before, arrays) if "expect" in argument else [])


def _parts(buffer: Buffer, after: np.ndarray, before: np.ndarray, arrays: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with the parts of a buffer that expect something, and that nothing else was written."""
    wrong, rest = [], after != before
    for part in buffer.argument["parts"]:
        if "expect" not in part:
            continue
        here = slice(part["at"], part["at"] + arrays[part["expect"]].nbytes)
        rest[here] = False
        found = _compared(buffer, part, np.ascontiguousarray(after[here]), before[here], arrays)
        wrong += [f"{part.get('name', part['at'])}: {text}" for text in found]
    if rest.any():
        wrong.append(f"{int(rest.sum())} bytes outside of the parts were written, the first at {int(rest.argmax())}")
    return wrong


def _compared(
    buffer: Buffer, argument: dict[str, Any], inside: np.ndarray, before: np.ndarray, arrays: dict[str, np.ndarray]
) -> list[str]:
    """What differs between bytes and what the buffer, or a part of it, expects."""
    wrong: list[str] = []
    want = arrays[argument["expect"]]
    got = inside.view(want.dtype).reshape(want.shape)
    skip = arrays[argument["ignore"]].astype(bool) if "ignore" in argument else np.zeros(want.shape, bool)
    if "written" in argument:
        unwritten = ~arrays[argument["written"]].astype(bool)
        changed = unwritten & bits_differ(got, np.ascontiguousarray(before).view(want.dtype).reshape(want.shape))
        if changed.any():
            wrong.append(
                f"{int(changed.sum())} elements were written that must stay, the first {np.argwhere(changed)[0]}"
            )
        skip = skip | unwritten
    outcome = compare(got, want, argument, skip)
    buffer.outcome.append(outcome.text)
    if outcome.bad:
        wrong.append(f"{outcome.bad} of {outcome.checked} elements differ: {outcome.text}")
    return wrong


def find(paths: list[Path]) -> list[Path]:
    """The JSON files of cases in folders, and those named."""
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        folder = path / "cases" if (path / "cases").is_dir() else path
        found += sorted(p for p in folder.glob("*.json") if p.name != "manifest.json")
    return found


def main(argv: list[str] | None = None, driver: Any = None) -> int:
    """Runs the cases named on the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each case")
    options = parser.parse_args(argv)
    cases = [p for p in find(options.paths) if options.only in p.name]
    if not cases:
        print(f"no kernel case in {', '.join(map(str, options.paths))}", file=sys.stderr)
        return 2
    try:
        driver = driver or Driver.open()
    except CaseError as e:
        print(e, file=sys.stderr)
        return 2
    here = driver.target()
    passed, failed, other = 0, 0, 0
    for path in cases:
        try:
            case, arrays = load(path)
            if here and case["target"] != here:
                other += 1
                continue
            wrong = run(driver, path, case, arrays)
        except OtherTargetError as e:
            if not here:
                other += 1
                continue
            wrong = [str(e)]
        except (CaseError, OSError) as e:
            wrong = [str(e)]
        passed, failed = passed + (not wrong), failed + bool(wrong)
        if wrong or options.verbose:
            print(f"{'FAIL' if wrong else 'ok  '} {path.stem}")
        for text in wrong:
            print(f"     {text}")
    print(
        f"{here or 'GPU'}: {passed} cases agree, {failed} differ or fail"
        + (f", {other} for other GPUs" if other else "")
    )
    return 1 if failed else 0 if passed else 2


if __name__ == "__main__":
    sys.exit(main())
