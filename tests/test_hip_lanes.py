"""Which lane each exchange of csrc/include/jaxnorm/gpu.h reads, proved from the assembly by what AMD's ISA documents say the
controls do, and that the swaps of gfx950 give the sums that exchanges give."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from jaxnorm.kernels.configs import rmsnorm_hip, wave_size
from test_hip_compile import AMD, Case, machine_code, need_compiler

from jaxnorm._compile import hip
from jaxnorm._paths import csrc_dir

pytestmark = pytest.mark.compile
SOURCE = """
#include "jaxnorm/gpu.h"
#define EXCHANGE(D) JN_ENTRY exchange_##D(const float* in, float* out) { \\
  const u32 i = jaxnorm::thread_id(); \\
  out[i] = jaxnorm::shfl_xor<D>(in[i]); \\
}
EXCHANGE(1) EXCHANGE(2) EXCHANGE(4) EXCHANGE(8) EXCHANGE(16)
#if JN_WAVE == 64
EXCHANGE(32)
#endif
"""
MOVES = ("dpp", "v_permlane", "ds_swizzle", "ds_bpermute")


@functools.cache
def exchanges(target: str) -> dict[int, list[str]]:
    """Distance -> the instructions that move values between lanes."""
    need_compiler(target)
    compiler = hip.find(target)
    assert compiler is not None
    options = [*hip._target_options(compiler, target), f"-DJN_WAVE={wave_size(target)}", f"-I{csrc_dir() / 'include'}"]
    done = subprocess.run([compiler.path, *options, "-S", "-o", "-", "-"], input=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, body in re.findall(r"^exchange_(\d+):.*?$(.*?)s_endpgm", done.stdout, re.M | re.S):
        found[int(name)] = [line.strip() for line in body.splitlines() if any(m in line for m in MOVES)]
    return found


def sources(line: str, wave: int) -> np.ndarray:
    """The lane that each lane reads in one instruction."""
    lane = np.arange(wave)
    row = lane // 16 * 16
    if match := re.search(r"quad_perm:\[(\d),(\d),(\d),(\d)\]", line):
        return lane // 4 * 4 + np.array([int(k) for k in match.groups()])[lane % 4]
    if match := re.search(r"row_ror:(\d+)", line):  # rotate right: lane n gets lane n - k of its row of 16
        return row + (lane - int(match[1])) % 16
    if "row_half_mirror" in line:  # reverse within 8
        return lane // 8 * 8 + 7 - lane % 8
    if match := re.search(r"row_xmask:(\d+)", line):
        return row + (lane % 16 ^ int(match[1]))
    if match := re.search(r"swizzle\(SWAP,(\d+)\)", line):  # groups of so many lanes change places
        return lane ^ int(match[1])
    if "v_permlanex16" in line:  # the selects name lane n of the other row of 32
        return lane ^ 16
    raise AssertionError(f"an exchange that this test does not know: {line}")


@pytest.mark.parametrize("target", AMD)
def test_each_exchange_reads_the_lane_at_its_distance(target: str) -> None:
    wave, found = wave_size(target), exchanges(target)
    assert sorted(found) == [1, 2, 4, 8, 16, 32][: 6 if wave == 64 else 5]
    for distance, lines in found.items():
        if distance == 32 and target != "gfx950":
            assert len(lines) == 1 and "ds_bpermute_b32" in lines[0]  # by an address that is the lane's, xor 32
            continue
        if distance >= 16 and target == "gfx950":
            assert len(lines) == 1 and f"v_permlane{distance}_swap_b32" in lines[0]
            continue
        reads = np.arange(wave)
        for line in lines:
            reads = reads[sources(line, wave)]
        assert (reads == np.arange(wave) ^ distance).all(), (target, distance, lines)


def test_only_what_dpp_cannot_reach_goes_through_lds() -> None:
    crossbar = {
        t: [d for d, lines in exchanges(t).items() if any(line.startswith("ds_") for line in lines)] for t in AMD
    }
    assert crossbar == {"gfx90a": [16, 32], "gfx942": [16, 32], "gfx950": [], "gfx1100": []}


@pytest.mark.parametrize("target", AMD)
def test_a_row_of_a_wave_is_summed_in_registers(target: str) -> None:
    """In a whole kernel most exchanges are operands of an addition; gfx950 and gfx1100 leave the LDS alone."""
    problem = Case(1024, rows=8192, target=target).forward()
    (launch,) = rmsnorm_hip.plan(problem)
    text = machine_code(launch, problem)
    crossbar = len(re.findall(r"^\s*ds_(?:swizzle|bpermute)", text, re.M))
    sums = len(re.findall(r"^\s*v_add_f32_dpp", text, re.M))
    assert (crossbar == 0) == (target in ("gfx950", "gfx1100")), crossbar
    assert sums >= 3, "DPP moves are folded into additions"
    assert ("v_permlane32_swap" in text) == (target == "gfx950")


def swap(a: np.ndarray, b: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """v_permlane16_swap and v_permlane32_swap: the odd rows (the upper half) of a change places with the even rows of b."""
    a, b = a.reshape(-1, 2, distance).copy(), b.reshape(-1, 2, distance).copy()
    a[:, 1], b[:, 0] = b[:, 0].copy(), a[:, 1].copy()
    return a.reshape(-1), b.reshape(-1)


@pytest.mark.parametrize("distance", [16, 32])
def test_a_swap_gives_the_sums_of_an_exchange(distance: int) -> None:
    g = np.random.default_rng(0)
    a, b = (g.standard_normal(64).astype(np.float32) for _ in range(2))
    lane = np.arange(64)
    upper = (lane & distance) != 0
    keep, give = np.where(upper, b, a), np.where(upper, a, b)
    x, y = swap(a, b, distance)
    assert (x + y == keep + give[lane ^ distance]).all(), "packed sums"
    x, y = swap(a, a, distance)
    assert (x + y == a + a[lane ^ distance]).all(), "plain sums"
    assert (np.where(upper, x, y) == a[lane ^ distance]).all(), "shfl_xor picks the one that is not its own"


def test_the_header_says_what_the_test_reads() -> None:
    text = (Path(csrc_dir()) / "include" / "jaxnorm" / "gpu.h").read_text()
    assert "(lane_id() & D) ? s.a : s.b" in text


@pytest.mark.parametrize(
    ("target", "rows"), [("gfx90a", 1024), ("gfx942", 32768), ("gfx950", 32768), ("gfx1100", 8192)]
)
def test_only_results_larger_than_the_last_cache_are_stored_past_it(target: str, rows: int) -> None:
    streamed = []
    for count in (rows // 16, rows):
        problem = Case(8192, rows=count, target=target).forward()
        (launch,) = rmsnorm_hip.plan(problem)
        text = machine_code(launch, problem)
        stores = re.findall(r"^\s*global_store_(?:dwordx4|b128)\s.*$", text, re.M)
        assert stores
        marked = [line for line in stores if re.search(r"\b(?:nt|slc)\b", line)]
        assert len(marked) in (0, len(stores)), "y all or not at all"
        streamed.append(bool(marked))
    assert streamed == [False, True]


def test_nvidia_keeps_its_stores() -> None:
    for rows in (8, 1 << 20):
        (launch,) = rmsnorm_hip.plan(Case(8192, rows=rows, target="sm_90").forward())
        assert "JN_STREAM" not in dict(launch.constants)
