"""What an operator costs inside a program: a chain of 64 in one jit, wall clock per operator, with CUDA graphs and without.

    python -m benchmarks.chain --out DIR

Each setting of the flags runs in its own process. Per chain: wall clock of a program execution divided by 64 (a queue of
executions, so that the host's enqueue is hidden where the device is slower), the kernels' own time from CUPTI, and the number of
kernels. An optimization barrier after each operator keeps XLA from joining two. The reference of the launch cost is a chain of
additions to one element. Whether graphs were used is read from XLA's dump (command buffer thunks) and from a profile (calls of
graph launch and kernel launch by the host), the latter in a process of its own, since CUPTI has one user at a time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from . import store

LENGTH = 64
FLAGS = {"default": "", "graphs": "--xla_gpu_graph_min_graph_size=1", "no graphs": "--xla_gpu_enable_command_buffer="}
SHAPES = "1x4096,16x4096,128x4096,1x8192,16x8192,128x8192"
OPS = "jaxnorm,jaxnorm-hip,jaxnorm-triton,xla,one element"
EVIDENCE_SHAPE = "16x4096"
API_CALLS = ("GraphLaunch", "LaunchKernel")


def make_chain(name: str, rows: int, features: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """(jitted chain, arguments): x -> norm(x) -> norm(norm(x)) ..., every one with the same weight."""
    import jax
    import jax.numpy as jnp

    from .cells import EPS
    from .jax_programs import jnp_rmsnorm

    x = jax.random.normal(jax.random.key(0), (rows, features), jnp.bfloat16)
    w = jnp.ones((features,), jnp.bfloat16) * 1.01
    if name == "one element":
        x, w = jnp.ones((1,), jnp.float32), jnp.ones((1,), jnp.float32)
        step = jnp.add
    elif name == "xla":
        step = jnp_rmsnorm
    else:
        import jaxnorm

        backend = name.partition("-")[2] or None

        def step(a: Any, b: Any) -> Any:
            return jaxnorm.rmsnorm(a, b, eps=EPS, backend=backend)

    def chain(a: Any, b: Any) -> Any:
        for _ in range(length):
            a = jax.lax.optimization_barrier(step(a, b))
        return a

    return jax.jit(chain), (x, w)


def wall_us(f: Any, args: tuple[Any, ...], repeats: int = 20, rounds: int = 5) -> list[float]:
    """Microseconds of one execution in a queue of ``repeats``, per round."""
    for _ in range(3):
        f(*args).block_until_ready()
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = [f(*args) for _ in range(repeats)]
        result[-1].block_until_ready()
        out.append((time.perf_counter() - start) * 1e6 / repeats)
    return out


def measure_one(name: str, shape: str, length: int, recorder: Any | None) -> dict[str, Any]:
    rows, features = (int(v) for v in shape.split("x"))
    f, args = make_chain(name, rows, features, length)
    walls = [w / length for w in wall_us(f, args)]
    entry: dict[str, Any] = {
        "wall_us": round(statistics.median(walls), 3),
        "wall_min_us": round(min(walls), 3),
        "wall_max_us": round(max(walls), 3),
    }
    if recorder is not None:
        from jaxnorm._bench import cupti

        records = recorder(lambda: f(*args).block_until_ready())
        entry["device_us"] = round(cupti.busy_us(records) / length, 3)
        entry["kernels"] = round(len(records) / length, 3)
    return entry


def child(args: argparse.Namespace) -> int:
    """Measures all chains under the flags of this process and prints JSON lines."""
    from jaxnorm._bench import cupti

    recorder, why = None, ""
    try:
        recorder = cupti.Recorder()
        recorder(lambda: None)
    except Exception as e:
        recorder, why = None, f"{type(e).__name__}: {e}"
    for shape in args.shapes.split(","):
        for name in args.ops.split(","):
            if name == "one element" and shape != args.shapes.split(",")[0]:
                continue
            try:
                entry = measure_one(name, shape, args.length, recorder)
            except Exception as e:
                entry = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
            if why:
                entry["no device time"] = why[:200]
            print("RESULT " + json.dumps([shape, name, entry]), flush=True)
    return 0


def evidence_child(args: argparse.Namespace) -> int:
    """Counts the launch calls of the host in a profile of one chain each."""
    import jax

    for name in args.ops.split(","):
        try:
            rows, features = (int(v) for v in EVIDENCE_SHAPE.split("x"))
            f, a = make_chain(name, rows, features, args.length)
            for _ in range(4):
                f(*a).block_until_ready()
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    f(*a).block_until_ready()
                counts = count_calls(pathlib.Path(folder))
        except Exception as e:
            counts = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        print("RESULT " + json.dumps([EVIDENCE_SHAPE, name, counts]), flush=True)
    return 0


def count_calls(folder: pathlib.Path) -> dict[str, Any]:
    """Host calls of launching, by name, in the Chrome trace that the JAX profiler wrote."""
    counts: dict[str, Any] = {}
    for path in folder.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes())).get("traceEvents", [])
        for e in events:
            name = str(e.get("name", ""))
            if any(c in name for c in API_CALLS) and re.match(r"(cu|cuda|hip)[A-Z]", name):
                counts[name] = counts.get(name, 0) + 1
    return counts


def count_dump(folder: pathlib.Path) -> dict[str, int]:
    """Mentions of command buffers in XLA's dump, by kind of file."""
    counts: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".txt", ".pb", ".pbtxt") and path.stat().st_size < 1 << 26:
            n = len(
                re.findall(r"(?i)command_?buffer(?!s?_?(?:cmd_)?types?\b)", path.read_bytes().decode("utf-8", "ignore"))
            )
            if n:
                kind = "thunks" if "thunk" in path.name else "hlo" if "optimizations" in path.name else "other"
                counts[kind] = counts.get(kind, 0) + n
    return counts


def spawn(mode: str, flags: str, args: argparse.Namespace, seconds: float) -> tuple[dict[str, dict[str, Any]], str]:
    """Runs one child; (shape -> op -> entry, error text). What it printed before an end by the clock is kept."""
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [
        sys.executable,
        "-m",
        "benchmarks.chain",
        mode,
        "--ops",
        args.ops,
        "--shapes",
        args.shapes,
        "--length",
        str(args.length),
    ]
    error = ""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, cwd=store.ROOT)
        text = done.stdout
        if done.returncode:
            error = f"exit {done.returncode}: {done.stderr[-600:]}"
    except subprocess.TimeoutExpired as e:
        text = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
        error = f"ended after {seconds:.0f} s"
    table: dict[str, dict[str, Any]] = {}
    for row in text.splitlines():
        if row.startswith("RESULT "):
            shape, name, entry = json.loads(row.removeprefix("RESULT "))
            table.setdefault(shape, {})[name] = entry
    return table, error


def show(result: dict[str, Any]) -> str:
    """Wall microseconds per operator (device microseconds, kernels) by flags."""
    lines = [f"per operator in a chain of {result['length']}: wall us (kernels' own us, kernels)"]
    settings = list(result["settings"])
    lines.append(f"{'shape':10s} {'op':16s} " + " ".join(s.rjust(22) for s in settings))
    keys = (
        [(s, n) for s, ops in next(iter(result["settings"].values()))["chains"].items() for n in ops]
        if settings
        else []
    )
    for shape, name in keys:
        fields = []
        for s in settings:
            e = result["settings"][s]["chains"].get(shape, {}).get(name, {})
            text = (
                f"{e['wall_us']:.2f} ({e.get('device_us', float('nan')):.2f}, {e.get('kernels', '?')})"
                if "wall_us" in e
                else e.get("error", "-")[:22]
            )
            fields.append(text.rjust(22))
        lines.append(f"{shape:10s} {name:16s} " + " ".join(fields))
    for s in settings:
        part = result["settings"][s]
        lines.append(
            f"{s}: command buffers in the dump {part['dump']}, host launch calls {part['calls']} {part.get('errors', '')}"
        )
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.chain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("mode", nargs="?", default="", choices=("", "child", "evidence"), help=argparse.SUPPRESS)
    p.add_argument("--ops", default=OPS)
    p.add_argument("--shapes", default=SHAPES)
    p.add_argument("--length", type=int, default=LENGTH)
    p.add_argument("--settings", default=",".join(FLAGS), help="comma list of the flag settings")
    p.add_argument("--budget-seconds", type=float, default=300)
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = p.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.mode:
        return child(args) if args.mode == "child" else evidence_child(args)
    end = time.time() + args.budget_seconds
    result: dict[str, Any] = {"format": "jaxnorm-chain/1", "length": args.length, "settings": {}}
    for name in args.settings.split(","):
        if end - time.time() < 20:
            break
        with tempfile.TemporaryDirectory() as dump:
            chains, error = spawn("child", FLAGS[name], args, end - time.time())
            part: dict[str, Any] = {
                "flags": FLAGS[name],
                "chains": chains,
                "errors": [error] if error else [],
                "calls": {},
                "dump": {},
            }
            result["settings"][name] = part
            if end - time.time() > 20:
                calls, error = spawn("evidence", f"{FLAGS[name]} --xla_dump_to={dump}", args, end - time.time())
                part["calls"] = calls.get(EVIDENCE_SHAPE, {})
                part["dump"] = count_dump(pathlib.Path(dump))
                part["errors"] += [error] if error else []
        store.write_json(args.out / "chain.json", result)
    try:
        result["environment"] = store.environment()
    except Exception as e:
        result["environment"] = {"error": str(e)}
    store.write_json(args.out / "chain.json", result)
    print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
