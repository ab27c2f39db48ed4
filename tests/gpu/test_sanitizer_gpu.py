"""compute-sanitizer over gpu/sanitize.py, each tool on each backend."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import needs
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def _tool() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (f for p in PLACES if (f := shutil.which("compute-sanitizer", path=p))), None
    )


@pytest.mark.parametrize("backend", ["triton", "hip"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool, backend):
    """No report from a tool, and the values are right under it.

    initcheck looks at our kernels alone: XLA reads padding of its own that nothing wrote.
    """
    binary = _tool()
    needs.need("compute_sanitizer", binary is not None, "compute-sanitizer is not installed")
    script = Path(__file__).with_name("sanitize.py")
    ours = ("norm", "quant", "cache")
    # Only writes of the kernels that it looks at are known to it, so copies to the host are no business of initcheck here.
    only = ["--check-api-memory-access", "no"] if tool == "initcheck" else []
    only += [o for name in ours if tool == "initcheck" for o in ("--kernel-name", f"kernel_substring={name}")]
    command = [
        binary,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *only,
        sys.executable,
        str(script),
        "--backend",
        backend,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr or "0 hazards" in done.stdout + done.stderr, (
        done.stdout[-2000:]
    )
