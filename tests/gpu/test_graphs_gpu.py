"""Command buffers (CUDA graphs), and the fallback roads: each in a process of its own, since flags are read once."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "hip"])
HERE = Path(__file__).resolve().parent

CHAIN = """
import hashlib, sys
sys.path[:0] = [sys.argv[2]]
import jax, jax.numpy as jnp, numpy as np
import jaxnorm
from registry import OPS
args = tuple(map(jnp.asarray, OPS[1].make((64,), 4096)))
def chain(x, r, w):
    for _ in range(64):
        x, r = jaxnorm.add_rmsnorm(x, r, w, backend=sys.argv[1])
    return x, r
compiled = jax.jit(chain).lower(*args).compile()
for _ in range(3):
    out = compiled(*args)
print("BITS", hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in out)).hexdigest())
print("HLO_COMMAND_BUFFERS", compiled.as_text().count("command_buffer"))
"""


def python(code: str, *argv: str, **env: str) -> str:
    child_env = (
        os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])} | env
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], env=child_env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@backends
def test_calls_are_captured_in_command_buffers(backend, tmp_path):
    """A chain of 64 calls: same bits with graphs and without, and with graphs the calls are inside a command buffer.

    XLA shows a command buffer in the HLO (older) or in the dumped thunk sequence (newer); without graphs neither has one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    seen, bits = {}, {}
    for name, extra in (("on", "--xla_gpu_graph_min_graph_size=1"), ("off", "--xla_gpu_enable_command_buffer=")):
        dump = tmp_path / name
        out = python(
            CHAIN, backend, str(HERE.parent), XLA_FLAGS=f"{flags} {extra} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        )
        bits[name] = re.search(r"BITS (\w+)", out)[1]
        texts = [p.read_text(errors="replace") for p in dump.rglob("*chain*") if "thunk" in p.name and p.is_file()]
        thunks = [line for text in texts for line in text.splitlines()]
        buffers = sum("kCommandBuffer" in line for line in thunks) + int(
            re.search(r"HLO_COMMAND_BUFFERS (\d+)", out)[1]
        )
        seen[name] = buffers, sorted(p.name for p in dump.rglob("*"))[:20]
    assert bits["on"] == bits["off"]
    assert seen["off"][0] == 0, seen["off"]
    assert seen["on"][0] > 0, f"no command buffer is in the program or its thunks: {seen['on']}"


ROAD = """
import sys
sys.path[:0] = [sys.argv[2]]
import jax
import cases, hlo
from registry import OPS, with_gradients
from transforms import data
from workloads import check
for op in OPS:
    args, cts = data(op, 5, 7, features=1000)
    lowered = jax.jit(with_gradients(op.function("triton"))).lower(args, cts)
    print("CALLS", sorted(hlo.custom_calls(lowered.as_text())))
    results, gradients = lowered.compile()(args, cts)
    op.check(args, results)
    op.check_gradients(args, cts, gradients, sys.argv[1])
check(cases.Workload("road", 769, rows=3, weight_dtype=None), "triton")
check(cases.Workload("road", 2880, rows=9, pad_to_multiple=256, cast="before_weight").with_residual("float32"), "triton")
print("DONE")
"""


@pytest.mark.parametrize("road", ["launcher", "jaxlib", "jax-triton"])
def test_triton_roads(road):
    """The launch roads that JAXNORM_TRITON_BRIDGE names: the same kernels, right through each of them."""
    import jaxlib.version

    if road == "jaxlib":
        needs.need(
            "jaxlib_image", tuple(map(int, jaxlib.version.__version__.split(".")[:3])) >= (0, 11, 2), "jaxlib >= 0.11.2"
        )
    if road == "jax-triton":
        needs.need("jax_triton", importlib.util.find_spec("jax_triton") is not None, "jax-triton is not installed")
    out = python(ROAD, road, str(HERE.parent), JAXNORM_TRITON_BRIDGE=road)
    assert "DONE" in out
    assert ("jaxnorm_launch" in out) == (road == "launcher"), out
    assert ("triton_kernel_call" in out) == (road != "launcher"), out
