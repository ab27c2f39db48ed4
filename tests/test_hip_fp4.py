"""The two ways to an fp4 code in csrc/include/jaxnorm/formats.h, on the CPU, against the nearest code with ties to the even one.

Pairs through float16 (sm_90) round twice, which is right only because of where the values between two codes come to lie.
"""

from __future__ import annotations

import ctypes
import subprocess

import needs
import numpy as np
import pytest
import simt_build

CHECK = r"""
#define JN_SIMT 1
#include "simt.h"
#include "jaxnorm/formats.h"
using namespace jaxnorm;
// Nearest of 0, 1/2, 1, 3/2, 2, 3, 4, 6 to a value up to 6 and a bit, exact: its double has bits to spare.
static unsigned nearest(float f) {
  const double a = f < 0 ? -double(f) : f, step = a < 2 ? 0.5 : a < 4 ? 1 : 2;
  const double k = __builtin_roundeven(a / step) + (a < 2 ? 0 : a < 4 ? 2 : 4);
  return unsigned(k) | (__builtin_signbit(f) ? 8u : 0u);
}
// Floats of the bits first, first + stride, ... below end, of both signs, in all places of a word: those that are wrong.
extern "C" long wrong(unsigned first, unsigned end, unsigned stride) {
  constexpr float unit = Conversion<FP4>::unit;
  long bad = 0;
  for (unsigned long at = first; at < end; at += 4ul * stride) {
    float f[8], scaled[8];
    unsigned want = 0, pairs = 0;
    for (int i = 0; i < 8; ++i) {
      const unsigned bits = unsigned(at + (i / 2) * stride);
      f[i] = bits_f32(bits | (i % 2 ? 0x80000000u : 0u));
      scaled[i] = f[i] * unit;
      want |= nearest(f[i]) << (4 * i);
    }
    for (int i = 0; i < 4; ++i) pairs |= two_fp4(scaled[2 * i], scaled[2 * i + 1]) << (8 * i);
    bad += eight_fp4(scaled) != want || pairs != want;
  }
  return bad;
}
"""
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize("wave", [32, 64])
def test_every_code_is_the_nearest(tmp_path, wave: int) -> None:
    """All floats next to a tie, and a sample of those up to 6; all of them have been tried (stride 1)."""
    needs.need("gxx", not (why := simt_build.missing()), why)
    source, out = tmp_path / "fp4.cc", tmp_path / "fp4.so"
    source.write_text(CHECK)
    include = [f"-I{simt_build.HERE}", f"-I{simt_build.csrc_dir() / 'include'}"]
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-DJN_WAVE={wave}"]
    subprocess.run(["g++", *options, *include, str(source), "-o", str(out)], check=True)
    wrong = ctypes.CDLL(str(out)).wrong
    wrong.restype, wrong.argtypes = ctypes.c_long, [ctypes.c_uint] * 3
    for tie in TIES:
        assert wrong(bits(tie) - 2048, bits(tie) + 2048, 1) == 0, tie
    assert wrong(0, bits(6.0) + 4, 2003) == 0
    assert wrong(bits(6.0) - 2048, bits(6.0) + 4, 1) == 0
