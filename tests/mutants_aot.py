"""Defects of what is made ahead of time, of kernel cases, and of the exchanges between lanes of AMD's waves."""

# ruff: noqa: E501 -- the code of a mutant stands on one line

from __future__ import annotations

from mutants import Mutant

CACHE, HIP, BUNDLE, LANES = (
    "jaxnorm/_compile/cache.py",
    "jaxnorm/_compile/hip.py",
    "jaxnorm/_aot/bundle.py",
    "csrc/include/jaxnorm/gpu.h",
)
AOT, CASES = "tests/test_aot.py -k ", "tests/test_aot_cases.py -k "
MUTANTS = (
    Mutant("shipped under the compiler's key", HIP, "return get_or_compile(key, lambda: _build(compiler, launch, problem.target, entry, options), portable)",
           "return get_or_compile(key, lambda: _build(compiler, launch, problem.target, entry, options), key)", AOT + "takes_what"),
    Mutant("shipped whatever the sources", HIP, "str(launch.shared),\n            *_sources(file)]", "str(launch.shared)]", AOT + "not_with_other_sources"),
    Mutant("backend without asking for its code objects", "jaxnorm/_dispatch.py", "if not usable and not _launch.shipped(plan, p, backend):", "if False:", AOT + "without_a_compiler"),
    Mutant("only few rows", "jaxnorm/_aot/instances.py", "while (step := step * 2) * 16 <= limit // 2:", "while (step := step * 2) < 0:", AOT + "every_number_of_rows"),
    Mutant("hashes not compared", "jaxnorm/_aot/directory.py", 'if hashlib.sha256(data).hexdigest() != entry["sha256"]:', "if False:", AOT + "bit"),
    Mutant("expected codes in the middle of nowhere", "jaxnorm/_aot/oracle.py", "(above == below) & (low % 2 == 1)", "(above == below)", CASES + "oracles"),
    Mutant("a NaN counts as equal to anything", "tools/kernel_case.py", "special = is_nan(got, dtype) != is_nan(want, dtype)", "special = is_nan(got, dtype) & False", CASES + "rules"),
    Mutant("guards not looked at", "tools/run_case.py", "outside[buffer.inside] = False", "outside[:] = False", CASES + "masks"),
    Mutant("buffers kept on the device", "tools/run_case.py", "            if buffer.base:\n                driver.free(buffer.base)", "            pass", CASES + "driver"),
    Mutant("a program left behind by hipRTC", "jaxnorm/_compile/rtc.py", 'self._function("DestroyProgram")(ctypes.byref(program))', "pass", "tests/test_hiprtc.py"),
    Mutant("lanes two apart for lanes one apart", LANES, "constexpr int xor1 = 0xb1,", "constexpr int xor1 = 0x4e,", "tests/test_hip_lanes.py -k distance"),
    Mutant("lanes four apart by a mirror alone", LANES, "return dpp<xor3>(dpp<half_mirror>(i));", "return dpp<half_mirror>(i);", "tests/test_hip_lanes.py -k distance"),
)  # fmt: skip
