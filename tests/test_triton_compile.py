"""Machine code of the Triton kernels for every target, without a GPU: access widths, registers, shared memory, layouts.

What is asserted here is compiled and inspected; nothing of it has run on AMD silicon."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import isa
import pytest

pytest.importorskip("triton", reason="needs triton: not installed")

from jaxnorm.kernels.configs import ITEMSIZE, Problem, rmsnorm_triton, shared_memory, wave_size

from jaxnorm._compile import triton as compiler

pytestmark = pytest.mark.compile

TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "sm_90")
BF16, F16, F32 = "bfloat16", "float16", "float32"
ROWS = 4096
TEMPLATES = {  # one size of each template; bf16 rows, and float32 where the mixed widths matter
    "tile of rows": 1024, "row in a tile": 4096, "ragged row": 2880, "loop": 131072,
}  # fmt: skip


def size(template: str, target: str) -> int:
    """Features of a template: on NVIDIA waves own shorter rows than on AMD."""
    return 512 if template == "tile of rows" and target.startswith("sm") else TEMPLATES[template]


def forward(
    target,
    features,
    x=BF16,
    weight=BF16,
    residual=None,
    out=None,
    padded=None,
    cast="output",
    rounding="float32",
    offset=0.0,
    rstd=True,
) -> Problem:
    shape = (ROWS, features)
    buffers = [
        ("x", shape, x),
        ("residual", shape, residual),
        ("weight", (features,), weight),
        ("y", (ROWS, padded or features), out or x),
        ("residual_out", shape, residual),
        ("rstd", (ROWS,), F32 if rstd else None),
    ]
    options = (("eps", 1e-6), ("weight_offset", offset), ("cast", cast), ("residual_rounding", rounding))
    return _problem("rmsnorm_fwd", features, buffers, options, target)


def backward(
    target, features, n=BF16, weight=BF16, dy=None, extra=None, second=None, padded=None, offset=0.0
) -> Problem:
    shape = (ROWS, features)
    buffers = [
        ("n", shape, n),
        ("weight", (features,), weight),
        ("rstd", (ROWS,), F32),
        ("dy", (ROWS, padded or features), dy or n),
        ("dresidual_out", shape, extra),
        ("dx", shape, n),
        ("dresidual", shape, second),
        ("dweight", (features,), weight),
    ]
    return _problem("rmsnorm_bwd", features, buffers, (("weight_offset", offset),), target)


def _problem(stage, features, buffers, options, target) -> Problem:
    there = [b for b in buffers if b[2]]
    return Problem(
        stage, ROWS, features, tuple((n, s) for n, s, _ in there), tuple((n, d) for n, _, d in there), options, target
    )


def name(launch) -> str:
    return launch.kernel.split(":")[1]


def narrowest(p: Problem, launch) -> int:
    """Bytes of the narrowest access that the row buffers of a launch allow."""
    widths = [16]
    for buffer in (*launch.inputs, *launch.outputs):
        if p.has(buffer) and buffer not in ("rstd", "dweight"):
            item, stride = ITEMSIZE[p.dtype(buffer)], p.shape(buffer)[-1]
            widths.append(min(16, item * (stride & -stride)))
    return min(widths)


# Accesses of one row quantity (rstd), of a column sum, and of what a layout conversion leaves: four bytes, not of the bulk path.
SMALL = {"load4", "store4"}


def check(p: Problem, launch, tmp_path) -> None:
    """What holds for every code object: no scratch, no spills, no float atomics, shared memory in bounds, wide accesses."""
    code = compiler.compile(launch, p)
    counts = isa.counts(code.asm, p.target)
    assert counts["atomics"] == 0
    assert counts["scratch"] == 0
    assert code.shared <= min(64 << 10, shared_memory(p.target))
    assert code.threads == launch.num_warps * wave_size(p.target) <= 1024
    if p.target.startswith("gfx"):
        (stats,) = isa.stats_amd(code.asm).values()
        assert stats["scratch"] == 0
        assert stats["spills"] == 0
        assert stats["wave"] == wave_size(p.target)
    else:
        cubin = tmp_path / "k.cubin"
        cubin.write_bytes(code.image)
        (stats,) = isa.resources(cubin).values()
        assert stats["stack"] == 0
        assert stats["local"] == 0
    if narrowest(p, launch) == 16:
        # float16 and bfloat16 stored out of a tile that float32 buffers laid out may be 8 bytes wide, never less
        sizes = {n: ITEMSIZE[d] for n, d in p.dtypes if n not in ("rstd", "dweight")}
        weight = sizes.pop("weight", 4)
        mixed = len({weight, *sizes.values()}) > 1
        narrow = {
            k: v
            for k, v in counts.items()
            if re.match("load|store", k) and v and not k.endswith("16") and k not in SMALL
        }
        if mixed:
            narrow.pop("store8", None)
        if weight < min(sizes.values()):  # a lane has 16 bytes of each row, hence 8 of a narrower weight
            narrow.pop("load8", None)
        if name(launch).endswith("_reduce"):  # a lane stores one column sum
            narrow.pop("store2", None)
        assert not narrow, f"{name(launch)} for {p.target}: {narrow}"
        assert counts["load16"] > 0
        assert counts["store16"] + counts["store8"] > 0 or name(launch) == "rmsnorm_bwd_reduce"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_forward(target, template, tmp_path):
    p = forward(target, size(template, target))
    for launch in rmsnorm_triton.plan(p):
        check(p, launch, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_backward(target, template, tmp_path):
    p = backward(target, size(template, target))
    for launch in rmsnorm_triton.plan(p):
        check(p, launch, tmp_path)


# A pairwise cover of the dtypes and options: each pair of values of two columns occurs in some line.
FORWARD_PAIRS = [
    {"x": BF16, "weight": F32, "residual": BF16, "cast": "before_weight", "offset": 1.0},
    {"x": BF16, "weight": F16, "residual": F32, "out": F32, "rounding": "input"},
    {"x": BF16, "weight": None, "padded": True, "cast": "before_weight", "out": F16},
    {
        "x": F16,
        "weight": BF16,
        "residual": F16,
        "padded": True,
        "rounding": "input",
        "cast": "before_weight",
        "out": F32,
    },
    {"x": F16, "weight": F32, "residual": BF16, "out": BF16},
    {"x": F32, "weight": BF16, "residual": F32, "padded": True, "offset": 1.0},
    {"x": F32, "weight": F32, "out": BF16, "cast": "before_weight"},
    {"x": F32, "weight": None, "residual": F16, "rounding": "input", "rstd": False},
]
BACKWARD_PAIRS = [
    {"n": BF16, "weight": F32, "extra": BF16, "offset": 1.0},
    {"n": BF16, "weight": None, "dy": F32, "padded": True},
    {"n": F32, "weight": F16, "dy": BF16, "extra": F32, "second": BF16},
    {"n": F16, "weight": BF16, "extra": F32, "second": F32, "padded": True},
    {"n": F32, "weight": F32},
    {"n": BF16, "weight": F32, "dy": F32, "extra": F32, "second": F32, "offset": 1.0},
]


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
@pytest.mark.parametrize("template", ["tile of rows", "row in a tile"])
def test_forward_dtypes_and_options(target, template, tmp_path):
    features = size(template, target)
    for options in FORWARD_PAIRS:
        padded = features + 256 if options.get("padded") else None
        p = forward(target, features, **{**options, "padded": padded})
        for launch in rmsnorm_triton.plan(p):
            check(p, launch, tmp_path)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
@pytest.mark.parametrize("features", [None, 8192])
def test_backward_dtypes_and_options(target, features, tmp_path):
    features = features or size("tile of rows", target)
    for options in BACKWARD_PAIRS:
        padded = features + 256 if options.get("padded") else None
        p = backward(target, features, **{**options, "padded": padded})
        check(p, rmsnorm_triton.plan(p)[0], tmp_path)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_the_longest_tiles_do_not_spill(target, tmp_path):
    """Registers are tightest there; float32 doubles what is on its way."""
    family = "gfx" if target.startswith("gfx") else "sm"
    longest_fwd, longest_bwd = rmsnorm_triton.TILE_FWD[family], rmsnorm_triton.TILE_BWD[family]
    for p in (forward(target, longest_fwd, residual=F32, weight=F32), backward(target, longest_bwd),
              backward(target, longest_bwd, n=F32, weight=F32), backward(target, longest_bwd, extra=BF16, weight=F32)):  # fmt: skip
        check(p, rmsnorm_triton.plan(p)[0], tmp_path)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_odd_rows_are_read_lane_by_lane(target):
    """N = 769: no access of a row may be wider than an element, and neighbouring lanes must read neighbouring elements, though
    the weight alone could be read 16 bytes at a time."""
    p = forward(target, 769)
    launch = rmsnorm_triton.plan(p)[0]
    ir = ttgir(p, launch)
    assert all(layout.per_thread[-1] == 1 for layout in layouts(ir)), layouts(ir)
    counts = isa.counts(compiler.compile(launch, p).asm, target)
    assert not counts["load16"] + counts["load8"] + counts["store16"] + counts["store8"]


@pytest.mark.parametrize("target", TARGETS)
def test_without_alignment_hints_the_accesses_are_narrow(target):
    """The negative control: if this sees no narrow access, the look at widths above is blind."""
    p = forward(target, 4096)
    launch = rmsnorm_triton.plan(p)[0]
    options = {"num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    bare = compiler.run(launch, compiler.signature(launch, p), target, options, aligned=False)
    counts = isa.counts(bare.asm["amdgcn" if target.startswith("gfx") else "ptx"], target)
    assert counts["load2"] >= 16
    assert counts["load16"] == counts["store16"] == 0


def ttgir(p: Problem, launch) -> str:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return compiler.run(launch, compiler.signature(launch, p), p.target, options).asm["ttgir"]


@dataclasses.dataclass(frozen=True)
class Layout:
    per_thread: tuple[int, ...]
    lanes: tuple[int, ...]
    waves: tuple[int, ...]
    order: tuple[int, ...]


def layouts(ir: str) -> list[Layout]:
    """The blocked layouts of most dims in a module: those of tiles, without those of row quantities."""
    fields = ("sizePerThread", "threadsPerWarp", "warpsPerCTA", "order")
    pattern = r"#ttg\.blocked<\{" + ", ".join(rf"{field} = \[(.*?)\]" for field in fields) + r"\}>"
    found = [Layout(*(tuple(map(int, g.split(","))) for g in m)) for m in re.findall(pattern, ir)]
    most = max(len(layout.lanes) for layout in found)
    return [layout for layout in found if len(layout.lanes) == most]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("features", "x", "weight"),
    [(128, BF16, BF16), (512, BF16, F32), (512, F32, F32), (96, F32, BF16), (409, BF16, BF16)],
)
def test_rows_of_a_tile_lie_alike_and_alone_in_their_lanes(target, features, x, weight):
    """Why a row has the same bits at every place of a tile, and in tiles of other heights, on targets nobody could run: its
    lanes and registers along the row are the same, waves are spread over rows, and no lane holds two rows, so that the same
    instructions serve every row."""
    p = forward(target, features, x=x, weight=weight)
    launch = rmsnorm_triton.plan(p)[0]
    constants = dict(launch.constants)
    alone_rows = max(1, constants["ROWS"] // launch.num_warps)
    alone = dataclasses.replace(
        launch, num_warps=1, constants=tuple((k, alone_rows if k == "ROWS" else v) for k, v in launch.constants)
    )
    tiles = [(launch, constants["ROWS"]), (alone, alone_rows)]
    seen = set()
    for step, rows in tiles:
        ir = ttgir(p, step)
        (layout,) = set(layouts(ir))
        assert layout.waves == (step.num_warps, 1, 1)
        assert layout.per_thread[0] == 1
        assert layout.lanes[0] * layout.waves[0] == rows
        assert layout.lanes[2] * layout.per_thread[2] == constants["BLOCK"]
        seen.add((layout.per_thread[1:], layout.lanes[1:], layout.order))
    assert len(seen) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_sum_of_a_row_of_a_tile_needs_no_shared_memory(target):
    p = forward(target, 512)
    code = compiler.compile(rmsnorm_triton.plan(p)[0], p)
    assert code.shared == 0
    assert isa.counts(code.asm, target)["barriers"] == 0


@pytest.mark.parametrize("target", ["gfx942", "gfx90a", "sm_90"])
def test_the_inner_rounding_survives(target):
    """before_weight: the rounding between the two products is in the machine's own IR, once for each element and once more at
    the end; without it there is one rounding."""
    roundings = []
    for cast in ("output", "before_weight"):
        p = forward(target, 4096, x=F16, weight=F32, out=F16, cast=cast)
        launch = rmsnorm_triton.plan(p)[0]
        options = {"num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        asm = compiler.run(launch, compiler.signature(launch, p), target, options).asm
        text = asm["amdgcn"] if target.startswith("gfx") else asm["ptx"]
        roundings.append(len(re.findall(r"v_cvt_(?:f16_f32|pkrtz)|cvt\.rn\.f16x?2?\.f32", text)))
    per_lane = dict(rmsnorm_triton.plan(p)[0].constants)["BLOCK"] // (launch.num_warps * wave_size(target))
    assert roundings[1] - roundings[0] in (per_lane, per_lane // 2)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_a_code_object_names_no_file_of_this_machine(target):
    p = forward(target, 4096)
    code = compiler.compile(rmsnorm_triton.plan(p)[0], p)
    for text in (code.image, code.asm.encode()):
        assert str(Path(__file__).resolve().parents[1]).encode() not in text
        assert b"rmsnorm.py" not in text


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_candidate_asks_for_more_shared_memory_than_there_is(target):
    """Of the loops with the largest pipelines; a candidate that cannot be launched would end a sweep."""
    most = shared_memory(target)
    for p in (forward(target, 65536, x=F32, residual=F32, weight=F32), backward(target, 2048)):
        piped = [c[0] for c in rmsnorm_triton.candidates(p) if dict(c[0].constants).get("STAGES", 1) > 1]
        for launch in piped:
            k = dict(launch.constants)
            buffers = [b for b in launch.inputs if p.has(b) and b != "rstd"]
            need = k["STAGES"] * k["BLOCK"] * (k.get("ROWS") or 1) * (k.get("CHUNKS") or 1)
            assert need * sum(ITEMSIZE[p.dtype(b)] for b in buffers) <= most
    largest = max(piped, key=lambda launch: (dict(launch.constants)["STAGES"], dict(launch.constants)["BLOCK"]))
    assert compiler.compile(largest, p).shared <= most


def test_the_key_of_the_cache_holds_what_matters(monkeypatch):
    keys = []
    monkeypatch.setattr(compiler, "get_or_compile", lambda parts, build, portable: keys.append(tuple(parts)))
    p = forward("gfx942", 1000)
    launch = rmsnorm_triton.plan(p)[0]
    compiler.compile(launch, p)
    variants = [
        dataclasses.replace(launch, num_warps=2), dataclasses.replace(launch, num_stages=2),
        dataclasses.replace(launch, options=(("waves_per_eu", 2),)),
        dataclasses.replace(launch, constants=tuple((k, 1e-5 if k == "EPS" else v) for k, v in launch.constants)),
        dataclasses.replace(launch, constants=tuple((k, 1 if v is True else v) for k, v in launch.constants)),
    ]  # fmt: skip
    for variant in variants:
        compiler.compile(variant, p)
    compiler.compile(launch, forward("gfx950", 1000))
    compiler.compile(launch, forward("gfx942", 1000, weight=F32))
    monkeypatch.setattr(compiler, "version", lambda: "9.9.9")
    compiler.compile(launch, p)
    monkeypatch.setattr(compiler, "sources_digest", lambda: "edited")
    compiler.compile(launch, p)
    assert len(set(keys)) == len(keys)
    rows = dataclasses.replace(p, rows=7)
    again = [keys[-1]]
    monkeypatch.setattr(compiler, "get_or_compile", lambda parts, build, portable: again.append(tuple(parts)))
    compiler.compile(rmsnorm_triton.plan(rows)[0], rows)
    assert again[0] == again[1], "the number of rows must not be part of a code object"


def test_an_unknown_option_is_refused():
    p = forward("gfx942", 1000)
    launch = dataclasses.replace(rmsnorm_triton.plan(p)[0], options=(("waves_per_ue", 2),))
    with pytest.raises(ValueError, match="waves_per_ue"):
        compiler.compile(launch, p)


def test_a_second_process_needs_no_triton(tmp_path):
    """From the disk cache: triton is not even imported."""
    p = forward("gfx942", 1000)
    launch = rmsnorm_triton.plan(p)[0]
    script = (
        "import sys, time\n"
        "from jaxnorm._compile import triton as compiler\n"
        "from jaxnorm.kernels.configs import Launch, Problem\n"
        "start = time.perf_counter()\n"
        f"code = compiler.compile({launch!r}, {p!r})\n"
        "print(code.source_key, 'triton' in sys.modules, time.perf_counter() - start)\n"
    )
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAXNORM_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    )
    assert first[:2] == [second[0], "True"]
    assert second[1] == "False"
    assert float(second[2]) < 0.5  # 0.015 s where this was written; a loaded machine is slower
