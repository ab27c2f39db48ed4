"""Where the kernel sources are: in a wheel, in an editable install, and in a checkout on ``PYTHONPATH``."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _source_dir(name: str, marker: str) -> Path:
    # A checkout has jaxnorm/kernels/ too, a stand-in without kernels: so look for the marker, not for the folder.
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if (folder / marker).is_file():
            return folder
    raise FileNotFoundError(
        f"jaxnorm: {name}/{marker} is in neither {_PACKAGE / name} nor {_PACKAGE.parent / name}. Reinstall jaxnorm."
    )


def csrc_dir() -> Path:
    """Folder of ``launcher.cc``, ``include/jaxnorm/*.h`` and ``kernels/*.hip``."""
    return _source_dir("csrc", "launcher.cc")


def kernels_dir() -> Path:
    """Folder of the Triton kernels."""
    return _source_dir("kernels", "configs/__init__.py")
