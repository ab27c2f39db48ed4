"""docs/amd-isa.md and its baseline, docs/amd-isa.json: what the compilers make of the kernels for four AMD targets.

    python tools/make_isa_report.py                 # compile everything (a minute or two), rewrite both files
    python tools/make_isa_report.py --only rope     # the kernels with this in their name; the others keep their figures
    python tools/make_isa_report.py --render        # the page again from the JSON file, nothing compiled

Needs the clang that JAXNORM_HIP_CLANG names and triton; no GPU. Nothing here has run: these are static counts and models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.kernels.configs import ITEMSIZE, Launch, Problem, distributed_hip

from jaxnorm import _launch
from jaxnorm._aot import families_ranks, instances, isa, spec
from jaxnorm._aot.instances import FusedStage
from jaxnorm._compile import hip, triton

ROOT = Path(__file__).resolve().parents[1]
BASELINE, PAGE = ROOT / "docs" / "amd-isa.json", ROOT / "docs" / "amd-isa.md"
TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100")
# Bytes a second, compute units, Hz: the vendor's figures of MI300X and MI355X. For the model, not a measurement.
DEVICES = {"gfx942": (5.3e12, 304, 2.1e9), "gfx950": (8.0e12, 256, 2.4e9)}
BF16, F32 = "bfloat16", "float32"


@dataclass(frozen=True)
class Subject:
    """A call whose kernels are in the report."""

    name: str
    op: str
    args: dict[str, Any]
    options: dict[str, Any]
    rows: int
    backends: tuple[str, ...] = ("hip",)
    grad: bool = False
    """The kernels of the backward instead."""
    ranks: int = 0
    """Of a distributed call, whose fused kernel is meant."""

    @property
    def targets(self) -> tuple[str, ...]:
        """That have a kernel for it."""
        return tuple(t for t in TARGETS if not self.ranks or t.startswith(distributed_hip.TARGETS))


def _norm(rows: int, n: int, residual: bool = False, bias: str = "", **more: Any) -> dict[str, Any]:
    args: dict[str, Any] = {"x": f"{BF16}[..., {n}]", "weight": f"{BF16}[{n}]"}
    if bias:
        args["bias"] = bias
    if residual:
        args["residual"] = args["x"]
    return {"args": args, "rows": rows, "options": {}} | more


BOTH = ("hip", "triton")
_WHERE = {"positions": "int32[...]", "cos_sin": f"{F32}[8192, 128]"}
_QK = {"q": f"{BF16}[..., 32, 128]", "k": f"{BF16}[..., 8, 128]", "q_weight": f"{BF16}[128]", "k_weight": f"{BF16}[128]",
       **_WHERE}  # fmt: skip
_IMAGE = {"weight": f"{BF16}[320]", "bias": f"{BF16}[320]"}
_TWO = {f"{k}{t}": f"{BF16}[..., {s}, {h}, 128]" for t, s in ((0, 512), (1, 3584)) for k, h in (("q", 24), ("k", 24))}
_TWO |= {f"{k}_weight{t}": f"{BF16}[128]" for k in "qk" for t in (0, 1)} | {"cos_sin0": f"{F32}[512, 128]",
                                                                           "cos_sin1": f"{F32}[3584, 128]"}  # fmt: skip
_CACHE = {"KVCache": {"num_pages": 1024, "page_size": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": "int8",
                      "quant": "per_token"}}  # fmt: skip
MX = {"dtype": "fp4", "group_size": 32, "scale_dtype": "e8m0", "scale_layout": "shuffled"}
SUBJECTS: tuple[Subject, ...] = (
    Subject("rmsnorm 8192x4096", "rmsnorm", **_norm(8192, 4096), backends=BOTH),
    Subject("rmsnorm 131072x1024", "rmsnorm", **_norm(131072, 1024)),
    Subject("rmsnorm 262144x128", "rmsnorm", **_norm(262144, 128)),
    Subject("rmsnorm 16x8192", "rmsnorm", **_norm(16, 8192)),
    Subject("add_rmsnorm 8192x8192", "add_rmsnorm", **_norm(8192, 8192, True), backends=BOTH),
    Subject("rmsnorm backward 8192x4096", "rmsnorm", **_norm(8192, 4096), backends=BOTH, grad=True),
    Subject("add_rmsnorm_quant 8192x8192 fp8", "add_rmsnorm_quant", **_norm(8192, 8192, True, options={"spec": {"dtype": "fp8"}}),
            backends=BOTH),
    Subject("rmsnorm_quant 8192x4096 int8/128", "rmsnorm_quant",
            **_norm(8192, 4096, options={"spec": {"dtype": "int8", "group_size": 128}})),
    Subject("rmsnorm_quant 8192x4096 mxfp4", "rmsnorm_quant", **_norm(8192, 4096, options={"spec": MX})),
    Subject("quantize 8192x4096 fp8", "quantize", {"x": f"{BF16}[..., 4096]"}, {"spec": {"dtype": "fp8"}}, 8192),
    Subject("layernorm 8192x4096", "layernorm", **_norm(8192, 4096, bias=f"{BF16}[4096]"), backends=BOTH),
    Subject("layernorm backward 8192x4096", "layernorm", **_norm(8192, 4096, bias=f"{BF16}[4096]"), backends=BOTH, grad=True),
    Subject("layernorm_quant 8192x4096 fp8", "layernorm_quant",
            **_norm(8192, 4096, bias=f"{BF16}[4096]", options={"spec": {"dtype": "fp8"}})),
    Subject("groupnorm 2x64x64x320 silu", "groupnorm", {"x": f"{BF16}[..., 64, 64, 320]"} | _IMAGE,
            {"num_groups": 32, "activation": "silu"}, 2, backends=BOTH),
    Subject("groupnorm 2x8x8x1280 silu", "groupnorm", {"x": f"{BF16}[..., 8, 8, 1280]", "weight": f"{BF16}[1280]",
            "bias": f"{BF16}[1280]"}, {"num_groups": 32, "activation": "silu"}, 2, backends=BOTH),
    Subject("groupnorm backward 2x64x64x320 silu", "groupnorm", {"x": f"{BF16}[..., 64, 64, 320]"} | _IMAGE,
            {"num_groups": 32, "activation": "silu"}, 2, backends=BOTH, grad=True),
    Subject("rope 8192x(32+8)x128", "rope", {"x": [f"{BF16}[..., 32, 128]", f"{BF16}[..., 8, 128]"], **_WHERE}, {}, 8192,
            backends=BOTH),
    Subject("qk_norm_rope 8192x(32+8)x128", "qk_norm_rope", _QK, {}, 8192, backends=BOTH),
    Subject("qk_norm_rope backward 8192x(32+8)x128", "qk_norm_rope", _QK, {}, 8192, backends=BOTH, grad=True),
    Subject("qk_norm_rope_two_stream 1x(512+3584)x24x128", "qk_norm_rope_two_stream", _TWO, {}, 1, backends=BOTH),
    Subject("qk_norm_rope_two_stream backward 1x(512+3584)x24x128", "qk_norm_rope_two_stream", _TWO, {}, 1, backends=BOTH,
            grad=True),
    Subject("qk_norm_rope_cache 8192x(32+8)x128 int8", "qk_norm_rope_cache", {
                "qkv": f"{BF16}[..., {48 * 128}]", "q_weight": f"{BF16}[128]", "k_weight": f"{BF16}[128]", **_WHERE,
                "slots": "int32[...]", "cache": _CACHE}, {"num_q_heads": 32, "num_kv_heads": 8}, 8192, backends=BOTH),
    Subject("KVCache.gather 8192x8x128 int8", "KVCache.gather", {"cache": _CACHE, "slots": "int32[...]"}, {}, 8192,
            backends=BOTH),
    Subject("rmsnorm 256x65536", "rmsnorm", **_norm(256, 65536), backends=BOTH),
    Subject("rmsnorm backward 256x65536", "rmsnorm", **_norm(256, 65536), backends=BOTH, grad=True),
    Subject("layernorm 256x65536", "layernorm", **_norm(256, 65536, bias=f"{BF16}[65536]"), backends=BOTH),
    Subject("layernorm backward 256x65536", "layernorm", **_norm(256, 65536, bias=f"{BF16}[65536]"), backends=BOTH, grad=True),
    Subject("rmsnorm_quant 256x65536 fp8", "rmsnorm_quant", **_norm(256, 65536, options={"spec": {"dtype": "fp8"}}),
            backends=BOTH),
    Subject("allreduce_add_rmsnorm 16x8192, 4 ranks", "allreduce_add_rmsnorm", **_norm(16, 8192, True), ranks=4),
    Subject("allreduce_add_rmsnorm 8192x8192 fp8, 4 ranks", "allreduce_add_rmsnorm",
            **_norm(8192, 8192, True, options={"spec": {"dtype": "fp8"}}), ranks=4),
)  # fmt: skip


def launches(subject: Subject, target: str, backend: str) -> Iterator[tuple[Problem, Launch]]:
    """What a subject launches on a target; nothing where the backend has no kernel for it."""
    if subject.op not in spec.operators():
        return
    (call,) = spec.parse(
        [
            {
                "op": subject.op,
                "args": subject.args,
                "options": subject.options,
                "grad": subject.grad,
                "rows": [subject.rows],
                "ranks": subject.ranks,
            }
        ]
    )
    seen = set()
    for stage in instances.stages(call, target, compilers=False):
        wanted = stage.call.stage.endswith("_bwd") == subject.grad
        plans = {"hip": ""} if subject.ranks else stage.call.definition.plans
        if (
            not wanted
            or backend not in plans
            or stage.call.stage in seen
            or isinstance(stage, FusedStage) != (subject.ranks > 0)
        ):
            continue
        seen.add(stage.call.stage)  # of the gradients with all cotangents and with the first alone, the former
        stage = stage.on(backend)
        problem = stage.problem(subject.rows)
        for launch in stage.plan(subject.rows):
            yield (families_ranks.with_buffers(problem) if subject.ranks else problem), launch


def assembly(problem: Problem, launch: Launch, backend: str) -> str:
    """AMD assembly text of one launch."""
    if backend == "hip":
        return hip.assembly(launch, problem)
    types = triton.signature(launch, problem)
    return triton.run(launch, types, problem.target, triton._options(launch)).asm["amdgcn"]


def measure(problem: Problem, launch: Launch, backend: str) -> dict[str, Any]:
    """The figures of one kernel."""
    text, target = assembly(problem, launch, backend), problem.target
    ((name, found),) = isa.stats(text).items()
    count, issued = isa.counts(text), isa.instructions(text)
    wave = found["wave"]
    threads = launch.threads or launch.num_warps * wave
    lds = found["lds"] + _dynamic(problem, launch, backend)
    waves = launch.grid[0] * launch.grid[1] * launch.grid[2] * threads // wave
    figures: dict[str, Any] = {
        "kernel": name,
        "threads": threads,
        "grid": list(launch.grid),
        "vgpr": found["vgpr"],
        "sgpr": found["sgpr"],
        "lds": lds,
        "occupancy": isa.occupancy(target, found["vgpr"], found["sgpr"], lds, threads),
        "scratch": found["scratch"],
        "spills": found["spills"],
        "loads": {w: count[f"load{w}"] for w in isa.WIDTHS if count[f"load{w}"]},
        "stores": {w: count[f"store{w}"] for w in isa.WIDTHS if count[f"store{w}"]},
        "conversions": isa.conversions(text),
        "barriers": count["barriers"],
        "bytes": _bytes(problem, launch),
    } | issued
    if target in DEVICES:
        figures["model_us"] = _model(target, figures, waves)
    return figures


def _dynamic(problem: Problem, launch: Launch, backend: str) -> int:
    return launch.shared if backend == "hip" else _launch.compile_launch(launch, problem, backend).shared


def _bytes(problem: Problem, launch: Launch) -> int:
    """Each buffer once: what must cross the memory bus."""
    temps = {n: (s, k) for n, s, k in launch.temps}
    total = 0
    for name in (*launch.inputs, *launch.outputs):
        if name in temps or problem.has(name):
            shape, kind = temps.get(name) or (problem.shape(name), problem.dtype(name))
            size = ITEMSIZE.get(kind, 1)
            for d in shape:
                size *= d
            total += size
    return total


def _model(target: str, figures: dict[str, Any], waves: int) -> dict[str, float | None]:
    """Microseconds to move the bytes, and to issue the vector instructions of all waves where no loop hides their number: a
    wave64 instruction takes a SIMD four cycles."""
    bandwidth, units, clock = DEVICES[target]
    issue = None if figures["loops"] else round(waves * figures["valu"] * 4 / (units * isa.SIMDS * clock) * 1e6, 2)
    return {"memory": round(figures["bytes"] / bandwidth * 1e6, 2), "issue": issue}


def measure_all(only: str = "") -> dict[str, Any]:
    """Figures by subject, backend, launch and target: what the baseline holds."""
    found: dict[str, Any] = {}
    for subject in SUBJECTS:
        for backend in subject.backends:
            for target in subject.targets:
                for i, (problem, launch) in enumerate(launches(subject, target, backend)):
                    key = f"{subject.name} | {backend} | {i}"
                    if only in key:
                        found.setdefault(key, {})[target] = measure(problem, launch, backend)
    return found


def compilers() -> dict[str, str]:
    """Versions that the figures belong to."""
    found = hip.find("gfx942")
    return {"hip": hip.describe(found) if found else "", "triton": f"triton {triton.version()}"}


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What got worse: scratch, spills, narrower or fewer wide accesses, lower occupancy, more barriers."""
    worse = [f"{k}: {old[k]} -> {new[k]}" for k in ("scratch", "spills", "barriers") if new[k] > old[k]]
    if new["occupancy"] < old["occupancy"]:
        worse.append(f"occupancy: {old['occupancy']} -> {new['occupancy']} waves a SIMD")
    for kind in ("loads", "stores"):
        before, after = ({int(w): n for w, n in f[kind].items()} for f in (old, new))
        if after and min(after) < min(before, default=16):
            worse.append(f"{kind}: accesses of {min(after)} bytes, the narrowest were {min(before, default=16)}")
        if sum(n for w, n in after.items() if w < 16) > sum(n for w, n in before.items() if w < 16):
            worse.append(f"{kind}: {before} -> {after} by width")
    return worse


# The page

HEAD = """\
# Machine code for AMD

Made by `python tools/make_isa_report.py` ({hip}; {triton}); the raw figures are in [amd-isa.json](amd-isa.json). A test fails
when one gets worse: more scratch or spills, narrower accesses, lower occupancy, more barriers. **Nothing here was run**: these are
static counts, and times are models.

* **VGPR** includes the accumulation registers. **waves** is how many waves a SIMD can hold at a time, by vector and scalar
  registers and by LDS, the dynamic one included.
* **16 B** counts loads / stores of 16 bytes a lane; narrower ones stand beside them as width x count.
* **DPP** counts exchanges between lanes through the ALU, **LDS ops** those through LDS, **waits** `s_waitcnt`, **bar.** barriers.
* **memory** is each buffer once at 5.3 TB/s (gfx942, MI300X) or 8 TB/s (gfx950, MI355X); **issue** is the vector instructions of
  all waves at one in four cycles a SIMD and 2.1 or 2.4 GHz, where the kernel has no loop. Microseconds; the larger of the two
  is the model's time. A kernel over several tensors has the code of each, of which a wave runs one: there it is too high.
* Sizes are rows x features, bfloat16 unless said otherwise; `fp8` is fnuz on gfx942 and fn elsewhere. The second kernel of a
  backward adds up partial sums. Of a distributed call **memory** is what one rank holds, not what crosses the links; gfx1100 has no
  kernel for it.
"""
COLUMNS = ("target", "VGPR", "SGPR", "LDS", "waves", "scratch", "spills", "16 B", "narrower", "DPP", "LDS ops", "waits", "bar.",
           "conversions", "memory", "issue")  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The page of a baseline."""
    lines = [HEAD.format(**data["compilers"])]
    last = ""
    for key, targets in data["kernels"].items():
        name, backend, _ = key.split(" | ")
        if name != last:
            lines.append(f"## {name}\n")
            last = name
        first = next(iter(targets.values()))
        lines.append(f"`{first['kernel']}` ({backend})\n")
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(_row(target, f)) + " |" for target, f in targets.items()]
        lines.append("")
    return "\n".join(lines)


def _row(target: str, f: dict[str, Any]) -> list[str]:
    wide = lambda kind: {int(w): n for w, n in f[kind].items()}  # noqa: E731
    narrow = [f"{kind[:-1]} {w}x{n}" for kind in ("loads", "stores") for w, n in wide(kind).items() if w < 16]
    model = f.get("model_us", {})
    number = lambda v: "-" if v is None else f"{v:g}"  # noqa: E731
    converted = ", ".join(f"{k.removeprefix('v_cvt_')} {n}" for k, n in f["conversions"].items())
    counted = [f[k] for k in ("vgpr", "sgpr", "lds", "occupancy", "scratch", "spills")]
    wide16 = f"{wide('loads').get(16, 0)} / {wide('stores').get(16, 0)}"
    more = [
        wide16,
        ", ".join(narrow) or "-",
        *(f[k] for k in ("dpp", "lds_ops", "waits", "barriers")),
        converted or "-",
    ]
    return [target, *map(str, counted + more), number(model.get("memory")), number(model.get("issue"))]


def dump(data: dict[str, Any]) -> str:
    """JSON with a line for each kernel and target, so that a change can be read."""
    kernels = []
    for key, targets in data["kernels"].items():
        lines = ",\n".join(f"   {json.dumps(t)}: {json.dumps(f)}" for t, f in targets.items())
        kernels.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    body = ",\n".join(kernels)
    return f'{{\n "compilers": {json.dumps(data["compilers"])},\n "kernels": {{\n{body}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    data = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"compilers": {}, "kernels": {}}
    if not options.render:
        new = measure_all(options.only)
        kept = data["kernels"] if options.only else {}
        order = [f"{s.name} | {b}" for s in SUBJECTS for b in s.backends]
        merged = kept | json.loads(json.dumps(new))
        kernels = dict(sorted(merged.items(), key=lambda kv: (order.index(kv[0].rsplit(" | ", 1)[0]), kv[0])))
        data = {"compilers": compilers(), "kernels": kernels}
        BASELINE.write_text(dump(data))
    PAGE.write_text(render(data))


if __name__ == "__main__":
    main()
