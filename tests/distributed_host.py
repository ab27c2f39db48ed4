"""The fused distributed calls from end to end on host devices: JAX, the FFI handler, groups, a fake driver that runs the kernels.

    LD_LIBRARY_PATH=<folder of the fake libcuda.so.1> python tests/distributed_host.py LIBRARY SCENARIO

A process of its own, because the handler opens the driver once. ``LIBRARY`` is the host build of csrc/distributed/fused_call.cc.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from cases_distributed import Call, mesh_of, same_on_all
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P
from jaxnorm.kernels.configs import Launch

from jaxnorm import QuantSpec, _native, distributed
from jaxnorm._compile import hip
from jaxnorm._compile.code_object import CodeObject
from jaxnorm.distributed import fused, processes, schedule

N = 512
FP8 = QuantSpec("float8_e4m3fn", group_size=128, scale_layout="column")
CALLS = {
    "quant": Call(7, N, 4, spec=FP8, weight="bfloat16"),
    "scattered": Call(10, N, 4, residual="float32", weight="bfloat16"),
    "replicated": Call(6, N, 4, kind="allreduce", residual="bfloat16"),
    "pair": Call(8, N, 2, spec=FP8, weight="bfloat16"),
}


def launches() -> list[Launch]:
    """Of every call above, in order: what the fake driver must know."""
    patch_choice()
    found = []
    for call in CALLS.values():
        config = _config(call)
        dtypes = [(n, a.dtype.name) for n, a in call.inputs().items()]
        found.append(fused.decide(config, tuple(dtypes), "fused").launch)
    return found


def _config(call):
    from jaxnorm.distributed._config import Config

    options = call.options
    return Config(
        "op", "tp", call.ranks, call.rows, call.features, call.x, call.spec, "rmsnorm", options.get("eps", 1e-6), 0.0, "output",
        call.kind == "scatter", True, "exact", 30.0,
    )  # fmt: skip


def patch_choice() -> None:
    _native.fused_library = lambda: object()  # type: ignore[assignment]
    hip.available = lambda t: (True, "", "")  # type: ignore[assignment]
    schedule.platform = lambda: "cuda"  # type: ignore[assignment]
    fused.target.in_force = lambda named: ("sm_90",)  # type: ignore[assignment]
    fused.target.resolve = lambda platform, named: "sm_90"  # type: ignore[assignment]
    schedule.FUSED_RANKS["cuda"] = (2, 4)


def install(path: str) -> None:
    """The handler as the CPU's, and instances of the fake driver for code objects."""
    known = {launch.constants: i for i, launch in enumerate(launches())}
    library = ctypes.CDLL(path)
    _native.fused_library = lambda: library  # type: ignore[assignment]
    jax.ffi.register_ffi_target(_native.FUSED_TARGET, jax.ffi.pycapsule(library.JaxnormFusedExecute), platform="cpu")
    hip.compile = lambda launch, p: CodeObject(  # type: ignore[assignment]
        b"SIMT%d" % known[launch.constants], "rank_norm_fwd", "sm_90", launch.threads, launch.shared, source_key=""
    )
    original = fused.groups
    processes.device_id = lambda device: device.id  # type: ignore[assignment]

    class Gpu:
        platform = "gpu"

        def __init__(self, device):
            self.id = device.id

    def groups(mesh, axis):
        gpus = np.vectorize(Gpu, otypes=[object])(mesh.devices)
        return original(type("M", (), {"devices": gpus, "axis_names": mesh.axis_names}), axis)

    fused.groups = groups
    mlir.register_lowering(fused.fused_p, functools.partial(fused._lower, "cuda"), platform="cpu")


def run(name, mesh, axis="tp", seed=0, **more):
    call = CALLS[name]
    arrays = call.inputs(seed)
    return call, arrays, call.sharded(mesh, axis, impl="fused", **more), call.place(arrays, mesh, axis)


def scenario_values() -> None:
    """All kinds in turns on permuted devices; workspaces grow once; pairs of a grid at the same time."""
    four, grid = mesh_of((4,), ("tp",), (2, 0, 3, 1)), mesh_of((2, 2), ("tp", "dp"), (3, 1, 0, 2))
    ready = {name: run(name, four) for name in ("quant", "replicated", "scattered")}
    for _ in range(4):
        for name, (call, arrays, f, placed) in ready.items():
            out = f(placed)
            call.check(arrays, *out, name)
            if name != "scattered":
                jax.tree.map(same_on_all, out)
    call = CALLS["pair"]
    x = np.random.default_rng(1).normal(size=(2, 2, 8, N)).astype(jnp.bfloat16)
    w = call.inputs()["weight"]
    f = jax.jit(jax.shard_map(lambda x, w: call.local("tp", impl="fused")({"x": x[0, 0], "weight": w})[0].values, mesh=grid,
                              in_specs=(P("tp", "dp"), P()), out_specs=P("dp")))  # fmt: skip
    for _ in range(3):
        values = np.asarray(f(x, w))
    alone = call.sharded(mesh_of((2,), ("tp",)), "tp", impl="composite")
    for i in range(2):
        want = alone({"x": jnp.asarray(x[:, i]), "weight": w})[0].values
        assert (values[8 * i : 8 * i + 8].view(np.uint8) == np.asarray(want).view(np.uint8)).mean() > 0.999
    distributed.check()


def _error(call) -> str:
    try:
        jax.block_until_ready(call())
    except Exception as e:
        return str(e)
    raise AssertionError("nothing was noticed")


def scenario_missing() -> None:
    """A rank that skips: before hosts have met, and after; then reset."""
    mesh = mesh_of((4,), ("tp",))
    call, arrays, f, placed = run("quant", mesh, timeout_s=2)
    call.check(arrays, *f(placed), "before")

    def skipping():
        def local(a, who):
            fused_call = lambda a: call.local("tp", impl="fused", timeout_s=2)(a)[0].scale  # noqa: E731
            skip = lambda a: jnp.zeros((4, call.rows), jnp.float32)  # noqa: E731
            return jax.lax.cond(jax.lax.axis_index("tp") == who, skip, fused_call, a)[None]

        ins, _ = call.specs("tp")
        specs = ({k: ins[k] for k in arrays}, P())
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("tp"), check_vma=False))

    start = time.monotonic()
    text = _error(lambda: skipping()(placed, 2))
    late = re.search(r"rank 2 \(device 2\)[^.]* did not come to launch the call within 2\.0 s", text)
    assert late and time.monotonic() - start < 20, text  # others may be late, too, where cores are busy
    g = skipping()
    assert np.isfinite(np.asarray(g(placed, -1))).all()
    scales = np.asarray(g(placed, 2))
    assert np.isnan(scales[[0, 1, 3]]).all() and not scales[2].any()
    text = _error(distributed.check)
    assert "waited for the partial sums of rank 2 (device 2), which did not come in time" in text, text
    text = _error(lambda: f(placed))
    assert "an earlier call failed" in text and "rank 2" in text and "reset" in text, text
    call.check(arrays, *call.sharded(mesh, "tp", impl="composite")(placed), "composite afterwards")
    distributed.reset()
    for _ in range(3):
        call.check(arrays, *f(placed), "after reset")
    distributed.check()


def scenario_no_peer() -> None:
    call, arrays, f, placed = run("quant", mesh_of((4,), ("tp",)))
    text = _error(lambda: f(placed))
    assert "cannot map the memory of" in text and "no peer access" in text and "impl='composite'" in text, text
    assert "no peer access" in _error(lambda: f(placed))
    call.check(arrays, *call.sharded(mesh_of((4,), ("tp",)), "tp", impl="composite")(placed))


def scenario_no_memory() -> None:
    _, _, f, placed = run("quant", mesh_of((4,), ("tp",)))
    text = _error(lambda: f(placed))
    assert "allocating a workspace" in text and "OUT_OF_MEMORY" in text and "MEM_FRACTION" in text, text


if __name__ == "__main__":
    install(sys.argv[1])
    globals()[f"scenario_{sys.argv[2]}"]()
    print("SCENARIO OK")
