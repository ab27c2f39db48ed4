"""The fused distributed calls on 2 or 4 GPUs, each part in a process of its own that is killed when its time is up.

    python tests/gpu/distributed_parts.py --out DIR [--budget-seconds 240] [--parts values,soak,...]

Writes ``distributed_parts.json`` after every part and goes on from there when it is started again. One part alone, in this process:
``python tests/gpu/distributed_parts.py --run soak --ranks 2``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
# part -> seconds it may take
PARTS = {
    "values": 100,
    "missing": 60,
    "soak": 100,
    "programs": 60,
    "graphs": 60,
    "groups": 60,
    "threads": 40,
    "processes": 60,
}
FOUR = ("groups", "threads")
"""Parts that need four GPUs."""
CALLS = int(os.environ.get("JAXNORM_TEST_CALLS", "10000"))


def environment(part: str) -> dict[str, str]:
    env = os.environ | {"JAXNORM_REQUIRE": "fused,launcher", "JAXNORM_FUSED_COMM": "1", "NCCL_NVLS_ENABLE": "0",
                        "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # fmt: skip
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    if part == "graphs":
        env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
    return env


def run_part(part: str, ranks: int, seconds: float, devices: str | None = None) -> tuple[bool, str, float]:
    """(passed, tail of the output, seconds). ``devices``: the GPUs to use, as CUDA_VISIBLE_DEVICES takes them."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--run", part, "--ranks", str(ranks)]
    env = environment(part) | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)  # fmt: skip
    try:
        out, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out = (child.communicate()[0] or "") + f"\nKILLED after {seconds:.0f} s"
    return child.returncode == 0 and "PART OK" in out, out[-4000:], time.monotonic() - start


# ---- what the parts are made of


def calls(ranks: int) -> list:
    """One of each kind, with sizes that are not round."""
    from cases_distributed import Call

    from jaxnorm import QuantSpec

    mx = {"group_size": 32, "scale_dtype": "e8m0"}
    fp8, both = QuantSpec("float8_e4m3fn"), {"kind": "allreduce", "ranks": ranks}
    return [
        Call(16, 8192, ranks, spec=fp8, weight="bfloat16"),
        Call(130, 8192, ranks, spec=fp8, weight="bfloat16"),
        Call(33, 7168, ranks, residual="bfloat16", weight="bfloat16"),
        Call(8 * ranks, 2048, ranks, residual="float32", spec=QuantSpec("int8", group_size=128, scale_layout="column"),
             options={"weight_offset": 1.0}),
        Call(4 * ranks, 4096, ranks, residual="float32", spec=QuantSpec("int8"), options={"gather": False}),
        Call(37, 4096, residual="bfloat16", spec=QuantSpec("float8_e4m3fn", scale_layout="shuffled", **mx), **both),
        Call(9, 8192, residual="float32", x="float16", **both),
        Call(5, 2048, ranks, x="float32", spec=QuantSpec("fp4", **mx), options={"cast": "before_weight"}),
        Call(1, 512, ranks, weight=None),
        Call(1500, 8192, ranks, spec=fp8, weight="bfloat16"),  # partial sums travel packed
    ]  # fmt: skip


def setup(call, mesh, axis="tp", seed=0, **more):
    """(jitted function, placed arrays, numpy arrays)"""
    arrays = call.inputs(seed)
    return call.sharded(mesh, axis, **more), call.place(arrays, mesh, axis), arrays


def same(a, b) -> bool:
    import jax
    import numpy as np

    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def chosen(call, arrays) -> str:
    """The reason of the decision, which names the schedule."""
    import jax

    import jaxnorm

    return jaxnorm.explain(jax.jit(call.sharded(line(call.ranks), "tp", impl="fused")), arrays)[0].reason


def line(ranks: int, order=None):
    from cases_distributed import mesh_of

    return mesh_of((ranks,), ("tp",), order)


def part_values(ranks: int) -> None:
    """Every kind against the oracle and beside the composite; all ranks, both schedules, several grids: the same bits."""
    import jax
    from cases_distributed import same_on_all

    from jaxnorm.distributed import check, schedule

    mesh = line(ranks)
    for n, call in enumerate(calls(ranks)):
        f, placed, arrays = setup(call, mesh, impl="fused")
        out = f(placed)
        call.check(arrays, *out, f"call {n}")
        if call.options.get("gather", True):
            jax.tree.map(same_on_all, out[0])
        if call.kind == "allreduce":
            same_on_all(out[1])
        with schedule.force("two-shot" if "one-shot" in chosen(call, arrays) else "one-shot", blocks=3):
            again = setup(call, mesh, impl="fused")[0](placed)
        assert same(out, again), f"call {n}: another schedule and grid give other bits"
        for _ in range(5):
            assert same(f(placed), out), f"call {n} does not repeat"
        check()
        composite = same(out, setup(call, mesh, impl="composite")[0](placed)) if n % 2 == 0 else "not compared"
        print(f"call {n}: right; bits of the composite: {composite}", flush=True)
    call, outs = calls(ranks)[-1], []
    placed = call.place(call.unruly_inputs(), mesh, "tp")
    for packed in (1, 0):
        with schedule.force("two-shot", packed=packed):
            outs.append(jax.block_until_ready(setup(call, mesh, impl="fused")[0](placed)))
    assert same(*outs), "partial sums that do not pack give other bits"
    order = list(range(ranks))[::-1]
    f, placed, arrays = setup(calls(ranks)[1], line(ranks, order), impl="fused")
    calls(ranks)[1].check(arrays, *f(placed), "permuted devices")


def part_soak(ranks: int) -> None:
    """Ten thousand calls of changing kinds and sizes, each compared on its device with the first of its kind."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxnorm.distributed import check, schedule

    mesh, rng, kinds = line(ranks), np.random.default_rng(0), []
    none = jax.device_put(np.zeros(ranks, np.int32), NamedSharding(mesh, P("tp")))
    bits = lambda a: jax.lax.bitcast_convert_type(a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize])  # noqa: E731
    for n, call in enumerate(calls(ranks)):
        for rows in (call.rows, 257) if call.options.get("gather", True) else (call.rows,):
            c = dataclasses.replace(call, rows=rows)
            arrays = c.inputs()
            placed, (ins, outs) = c.place(arrays, mesh, "tp"), c.specs("tp")

            def local(a, want, bad, c=c):
                got = c.local("tp", impl="fused")(a)
                leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
                wrong = jnp.stack([jnp.any(bits(g) != bits(w)) for g, w in leaves]).any()
                return got, bad + wrong.astype(jnp.int32)

            specs = ({k: ins[k] for k in arrays}, outs, P("tp"))
            g = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(outs, P("tp")), check_vma=False))
            with schedule.force("two-shot" if (n + rows) % 2 else "one-shot"):
                whole = jax.shard_map(
                    c.local("tp", impl="fused"), mesh=mesh, in_specs=specs[:1], out_specs=outs, check_vma=False
                )
                empty = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), jax.eval_shape(whole, placed))
                empty = jax.device_put(empty, tuple(NamedSharding(mesh, o) for o in outs))
                g = g.lower(placed, empty, none).compile()  # jit would trace it again outside of `force`
                first, _ = g(placed, empty, none)
            c.check(arrays, *first, f"kind {n}, {rows} rows")
            kinds.append((g, placed, first))
    start, bad = time.monotonic(), none
    for i, k in enumerate(rng.integers(0, len(kinds), CALLS)):
        g, placed, first = kinds[k]
        _, bad = g(placed, first, bad)
        if i % 500 == 499:
            jax.block_until_ready(bad)
    counts = np.asarray(bad)
    check()
    print(
        f"{CALLS} calls of {len(kinds)} kinds in {time.monotonic() - start:.1f} s, wrong per rank: {counts.tolist()}",
        flush=True,
    )
    assert not counts.any()


def noticed(call) -> str:
    """The text of the error that a call must raise."""
    try:
        call()
    except Exception as e:
        return str(e)
    raise AssertionError("nothing was noticed")


def part_missing(ranks: int) -> None:
    """A rank skips the call: in time, by name, no result that could be taken for one; the composite and, after reset, we go on."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from cases_distributed import Call
    from jax.sharding import PartitionSpec as P

    from jaxnorm import QuantSpec, distributed

    mesh = line(ranks)
    for kind, call in (("one-shot", Call(16, 8192, ranks, spec=QuantSpec("float8_e4m3fn"))),
                       ("two-shot", Call(2048, 8192, ranks, spec=QuantSpec("float8_e4m3fn")))):  # fmt: skip
        f, placed, arrays = setup(call, mesh, impl="fused", timeout_s=2)
        call.check(arrays, *f(placed), "before")

        def local(a, who, call=call):
            fused = lambda a: call.local("tp", impl="fused", timeout_s=2)(a)[0].scale  # noqa: E731
            skip = lambda a: jnp.zeros((call.rows, 1), jnp.float32)  # noqa: E731
            return jax.lax.cond(jax.lax.axis_index("tp") == who, skip, fused, a)[None]

        ins, _ = call.specs("tp")
        specs = ({k: ins[k] for k in arrays}, P())
        bad = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("tp"), check_vma=False))
        assert np.isfinite(np.asarray(bad(placed, -1))).all()  # all ranks: their hosts have met
        start = time.monotonic()
        scales = np.asarray(jax.block_until_ready(bad(placed, 1)))
        took = time.monotonic() - start
        assert np.isnan(scales[0]).all(), f"{kind}: {scales[0][:4]} instead of NaN"
        text = noticed(distributed.check)
        assert took < 10 and "rank 1" in text, (took, text)
        assert "an earlier call failed" in noticed(lambda: jax.block_until_ready(f(placed)))  # noqa: B023
        print(f"{kind}: {took:.1f} s: {text[:300]}", flush=True)
        call.check(arrays, *setup(call, mesh, impl="composite")[0](placed), "composite afterwards")
        distributed.reset()
        call.check(arrays, *f(placed), "after reset")
        distributed.check()


def part_programs(ranks: int) -> None:
    """Two meshes over the same devices, programs in turns, a loop, other collectives around, donation, gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from cases_distributed import Call
    from jax.sharding import PartitionSpec as P

    from jaxnorm import QuantSpec
    from jaxnorm.distributed import check

    a = setup(Call(64, 8192, ranks, spec=QuantSpec("int8")), line(ranks), impl="fused")
    b = setup(
        Call(96, 4096, ranks, kind="allreduce", residual="bfloat16"),
        line(ranks, list(range(ranks))[::-1]),
        impl="fused",
    )
    wants = [jax.block_until_ready(f(p)) for f, p, _ in (a, b)]
    outs = [(i % 2, (a, b)[i % 2][0]((a, b)[i % 2][1])) for i in range(200)]
    assert all(same(out, wants[i]) for i, out in outs)

    call = Call(40, 4096, ranks, kind="allreduce", residual="float32")
    ins, _ = call.specs("tp")

    def loop(arrays, impl):
        def body(_, r):
            y, r = call.local("tp", impl=impl)(arrays | {"residual": r})
            return r + jax.lax.psum(y.astype(jnp.float32), "tp") / 1024

        return jax.lax.fori_loop(0, 50, body, arrays["residual"])

    results = []
    specs = {k: ins[k] for k in call.inputs_names()}
    for impl in ("fused", "composite"):
        step = functools.partial(loop, impl=impl)
        f = jax.jit(
            jax.shard_map(step, mesh=line(ranks), check_vma=False, in_specs=(specs,), out_specs=P()), donate_argnums=0
        )
        results.append(np.asarray(f(call.place(call.inputs(), line(ranks), "tp"))))
    assert np.allclose(*results, rtol=2e-2, atol=2e-2), np.abs(results[0] - results[1]).max()
    f, placed, _ = setup(Call(24, 1024, ranks), line(ranks), impl="fused")
    grad = jax.jit(jax.grad(lambda p: f(p)[0].astype(jnp.float32).sum()))(placed)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grad.values())
    check()


def part_graphs(ranks: int) -> None:
    """A chain of calls recorded in graphs and replayed: the epoch goes on, the bits stay."""
    import jax
    from cases_distributed import Call

    from jaxnorm import QuantSpec
    from jaxnorm.distributed import check

    call = Call(48, 8192, ranks, kind="allreduce", residual="bfloat16")
    quant = Call(32, 8192, ranks, spec=QuantSpec("float8_e4m3fn"))
    ins, outs = call.specs("tp")

    def chain(a):
        for _ in range(8):
            y, r = call.local("tp", impl="fused")(a)
            a = a | {"x": y, "residual": r}
        return a["x"], a["residual"]

    mesh = line(ranks)
    f = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=({k: ins[k] for k in call.inputs_names()},), out_specs=outs,
                              check_vma=False))  # fmt: skip
    placed = call.place(call.inputs(), mesh, "tp")
    text = f.lower(placed).compile().as_text()
    want = jax.block_until_ready(f(placed))
    g, other, arrays = setup(quant, mesh, impl="fused")
    for i in range(60):
        assert same(f(placed), want), f"replay {i}"
        if i % 7 == 0:
            quant.check(arrays, *g(other), f"between replays, {i}")
    check()
    print("command buffers in the program:", len(re.findall(r"command_buffer", text)), flush=True)


def part_groups(ranks: int) -> None:
    """Groups of two inside four: along both axes of a 2 x 2 mesh, at once and one after the other."""
    import jax
    import numpy as np
    from cases_distributed import Call, mesh_of
    from jax.sharding import PartitionSpec as P

    from jaxnorm.distributed import check

    call = Call(20, 4096, 2, weight="bfloat16")
    mesh = mesh_of((2, 2), ("dp", "tp"), (2, 0, 3, 1))
    x = np.random.default_rng(1).normal(size=(2, 2, 20, 4096)).astype(call.inputs()["x"].dtype)
    w = call.inputs()["weight"]
    for axis, spec, out in (("tp", P("dp", "tp"), P("dp")), ("dp", P("tp", "dp"), P("tp"))):
        f = jax.jit(jax.shard_map(lambda x, w, axis=axis: call.local(axis, impl="fused")({"x": x[0, 0], "weight": w})[0],
                                  mesh=mesh, in_specs=(spec, P()), out_specs=out))  # fmt: skip
        for _ in range(50):
            y = np.asarray(f(x, w))
        for i in range(2):
            call.check({"x": x[i], "weight": w}, y[20 * i : 20 * i + 20], None, f"group {i} along {axis}")
    four = Call(20, 4096, 4, weight="bfloat16")
    f, placed, arrays = setup(four, mesh, ("dp", "tp"), impl="fused")
    four.check(arrays, *f(placed), "both axes")
    check()


def part_threads(ranks: int) -> None:
    """Two Python threads, each with its own pair of devices."""
    import jax
    import numpy as np
    from cases_distributed import Call
    from jax.sharding import Mesh

    from jaxnorm.distributed import check

    found: list[str] = []

    def work(pair):
        call, mesh = Call(64, 8192, 2), Mesh(np.array(pair), ("tp",))
        f, placed, arrays = setup(call, mesh, impl="fused", seed=pair[0].id)
        want = jax.block_until_ready(f(placed))
        call.check(arrays, *want, f"{pair}")
        if all(same(f(placed), want) for _ in range(300)):
            found.append("ok")

    threads = [threading.Thread(target=work, args=(jax.devices()[i : i + 2],)) for i in (0, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check()
    assert found == ["ok", "ok"]


def part_processes(ranks: int) -> None:
    """One process a GPU: workspaces mapped through IPC handles."""
    if "JAXNORM_TEST_RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = os.environ | {"JAXNORM_TEST_COORDINATOR": f"127.0.0.1:{port}"}
        command = [sys.executable, __file__, "--run", "processes", "--ranks", str(ranks)]
        children = [subprocess.Popen(command, env=env | {"JAXNORM_TEST_RANK": str(r)}) for r in range(ranks)]
        assert [c.wait() for c in children] == [0] * ranks
        return
    import jax

    rank = int(os.environ["JAXNORM_TEST_RANK"])
    jax.distributed.initialize(os.environ["JAXNORM_TEST_COORDINATOR"], ranks, rank, local_device_ids=[rank])
    import jax.numpy as jnp
    import numpy as np
    from cases_distributed import Call
    from jax.sharding import Mesh, NamedSharding

    from jaxnorm import QuantSpec, distributed

    mesh = Mesh(np.array(jax.devices()), ("tp",))
    call = Call(48, 4096, ranks, spec=QuantSpec("float8_e4m3fn"), weight="bfloat16")
    distributed.connect(list(mesh.devices), 8 << 20)
    ins, _ = call.specs("tp")
    arrays = call.inputs()
    placed = {
        n: jax.make_array_from_callback(a.shape, NamedSharding(mesh, ins[n]), lambda i, a=a: a[i])
        for n, a in arrays.items()
    }
    f = call.sharded(mesh, "tp", impl="fused")
    for _ in range(50):
        result, _ = f(placed)
    mine = jax.tree.map(lambda a: jnp.asarray(a.addressable_data(0)), result)
    call.check(arrays, mine, None, f"process {rank}")
    distributed.check()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", choices=PARTS)
    p.add_argument("--ranks", type=int)
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path())
    p.add_argument("--parts", default=",".join(PARTS))
    p.add_argument("--budget-seconds", type=float, default=240)
    args = p.parse_args()
    if args.run:
        globals()[f"part_{args.run}"](args.ranks or 2)
        print("PART OK", flush=True)
        return 0
    gpus = len(subprocess.run([sys.executable, "-c", "import jax; print(len(jax.devices()) * 'x')"], capture_output=True, text=True,
                              env=environment("")).stdout.strip())  # fmt: skip
    path, start = args.out / "distributed_parts.json", time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    lock = threading.Lock()

    def work(todo: list[tuple[str, int]], devices: str | None) -> None:
        """Takes parts from the list until it is empty or the time is up."""
        while True:
            with lock:
                left = args.budget_seconds - (time.monotonic() - start)
                if not todo:
                    return
                part, ranks = todo.pop(0)
            if left < 15:
                print(f"budget: {part} over {ranks} is left; the same command goes on from here", flush=True)
                continue
            passed, out, took = run_part(part, ranks, min(PARTS[part], left), devices)
            with lock:
                results[f"{part} over {ranks}"] = {"passed": passed, "seconds": round(took, 1), "output": out[-1500:]}
                path.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{'ok    ' if passed else 'FAILED'} {part} over {ranks}: {took:.0f} s", flush=True)
                print(out[-600:] if passed else out, flush=True)

    parts = args.parts.split(",")
    for ranks in [args.ranks] if args.ranks else [w for w in (4, 2) if w <= gpus]:
        todo = [(p, ranks) for p in parts if ranks == 4 or p not in FOUR]
        todo = [t for t in todo if not results.get(f"{t[0]} over {ranks}", {}).get("passed")]
        lanes = (
            [f"{2 * i},{2 * i + 1}" for i in range(gpus // 2)] if ranks == 2 and gpus > 2 else [None]
        )  # pairs at once
        threads = [threading.Thread(target=work, args=(todo, devices)) for devices in lanes]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    failed = [k for k, r in results.items() if not r["passed"]]
    print(f"{len(results) - len(failed)} parts passed, failed: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
