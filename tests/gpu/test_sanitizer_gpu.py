"""compute-sanitizer over gpu/sanitize.py, each tool on each backend."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import needs
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
# Thread 0 makes a block's mbarrier and arrives at it, in this order (cluster_begin, cluster_expect in gpu.h). In machine code the
# first is one instruction of the whole wave with uniform registers (@!UP0 SYNCS.EXCH.64 [UR]), the second one of lane 0
# (@!P0 SYNCS.ARRIVE.TRANS64 [R]); racecheck takes them for accesses by different lanes of the wave, and warns of as many hazards
# as the mbarriers of the grid have bytes. On an H200 the two offsets of each report were those of these two instructions.
MBARRIER = re.compile(
    r"Warning: Race reported between Write access at (\w+_cluster\w*)\+0x([0-9a-f]+)\n"
    r"=+ +and Read access at \1\+0x([0-9a-f]+) \[(\d+) hazards\]"
)


def only_mbarriers(report: str) -> bool:
    """Whether all that racecheck reports is that: at the start of a kernel, 8 bytes for each block, no errors."""
    lines = "\n".join(line for line in report.splitlines() if line.startswith("===="))
    known = [
        (kernel, begin, read)
        for kernel, begin, read, hazards in MBARRIER.findall(lines)
        if int(begin, 16) < 0x800 and 0 < int(read, 16) - int(begin, 16) < 0x200 and int(hazards) % 8 == 0
    ]
    return bool(known) and f"(0 errors, {len(known)} warnings)" in lines and lines.count("Race reported") == len(known)


def test_only_mbarriers():
    begin = "========= Warning: Race reported between Write access at groupnorm_cluster+0x2f0"
    alarm = f"{begin}\n=========     and Read access at groupnorm_cluster+0x320 [128 hazards]\n"
    summary = "========= RACECHECK SUMMARY: 2 hazards displayed ({} errors, {} warnings)\n"
    assert only_mbarriers(f"{alarm}ok\n{alarm}{summary.format(0, 2)}")
    assert not only_mbarriers(f"{alarm}{alarm}{summary.format(1, 1)}")
    assert not only_mbarriers(f"{alarm}{alarm.replace('_cluster', '_fwd')}{summary.format(0, 2)}")
    assert not only_mbarriers(f"{alarm}{alarm.replace('0x320', '0x1320')}{summary.format(0, 2)}")


def _tool() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (f for p in PLACES if (f := shutil.which("compute-sanitizer", path=p))), None
    )


@pytest.mark.parametrize("backend", ["triton", "hip"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool, backend):
    """No report from a tool, and the values are right under it.

    initcheck looks at our kernels alone: XLA reads padding of its own that nothing wrote. Blocks that wait for words of one another
    read them before they are written, on purpose (post.h).
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
        *(["--without", "held"] if tool == "initcheck" else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    said = done.stdout + done.stderr
    assert "\nall done\n" in said, said[-6000:]
    if tool == "racecheck" and backend == "hip" and done.returncode == 9 and only_mbarriers(said):
        return
    assert done.returncode == 0, said[-6000:]
    assert "ERROR SUMMARY: 0 errors" in said or "SUMMARY: 0 hazards" in said, said[-2000:]
