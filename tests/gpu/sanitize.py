"""Every kernel of a backend once, on ragged and unaligned sizes, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py --backend hip

The tools are memcheck, racecheck, initcheck and synccheck. XLA's allocator is set to ``platform``, so that each buffer is an
allocation of its own: inside XLA's pool an access past the end of a buffer hits another one and goes unseen.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import cases  # noqa: E402
import cases_cache  # noqa: E402
import cases_groupnorm  # noqa: E402
import cases_layernorm  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import oracle_rope  # noqa: E402
import test_groupnorm  # noqa: E402
import tolerances  # noqa: E402
from oracle_quant import Case  # noqa: E402
from workloads import check  # noqa: E402

import jaxnorm  # noqa: E402
from jaxnorm import QuantSpec  # noqa: E402

MX = {"group_size": 32, "scale_dtype": "e8m0"}


def workloads(full: bool):
    """Odd, tiny, padded and wide rows; with --full every GPU workload that is small enough for the tool's slowdown."""
    base = cases.Workload("sanitize", 769, rows=5, weight_dtype="float32", weight_offset=1.0)
    yield base
    yield base.with_residual("float32")
    yield cases.Workload("sanitize", 1, rows=3).with_residual()
    yield cases.Workload("sanitize", 83, rows=7, x_dtype="float16", pad_to_multiple=96, cast="before_weight")
    yield cases.Workload("sanitize", 4096, rows=33).with_residual()
    yield cases.Workload("sanitize", 5125, rows=3, x_dtype="float32", weight_dtype=None)
    yield cases.Workload("sanitize", 128, rows=1001)
    if full:
        yield from (w for w in cases.gpu_workloads() if w.rows * w.features < 1 << 21)


def quant_cases():
    """Scales a row, a group and static; every layout; fp4 in rows that end inside a word; rows in plenty."""
    yield Case("add_rmsnorm_quant", QuantSpec("int8"), 769, (5,), keep=True)
    yield Case("rmsnorm_quant", QuantSpec("float8_e4m3fn"), 4096, (33,), smooth="float32", weight_dtype="float32")
    yield Case("add_rmsnorm_quant", QuantSpec("float8_e4m3fn", group_size=128, scale_layout="column"), 1024, (7,))
    yield Case("rmsnorm_quant", QuantSpec("fp4", scale_layout="shuffled", **MX), 160, (33,))
    yield Case("quantize", QuantSpec("fp4", **MX), 96, (3,))
    yield Case("quantize", QuantSpec("int8"), 5125, (3,), static=0.01)


def layernorm_cases():
    """Every vector, rows that end inside a chunk, rows of a wave and of several, rows read again."""
    yield cases_layernorm.Case(769, (5,), residual=None, x_bias="float32")
    yield cases_layernorm.Case(384, (33,), options={"pad_to_multiple": 256})
    yield cases_layernorm.Case(128, (1001,), "float32", mean=1e4, std=1.0)
    yield cases_layernorm.Case(4096, (33,), residual="float32", x_bias="bfloat16")
    yield cases_layernorm.Case(31744, (3,), weight="", x_bias="float32")


def heads_cases():
    """Several arrays, parts of a head, both styles, three positions, positions beyond the table, lanes without a part, streams."""
    rope, qk = oracle_rope.ROPE_CASES, oracle_rope.QK_CASES
    return [*(rope[i] for i in (2, 5, 6, 10)), *(qk[i] for i in (2, 3, 4, 7, 11)), oracle_rope.TWO_CASES[1]]


def groupnorm_cases():
    """Both layouts, groups on chip, by clusters and in parts, groups that straddle chunks, one channel at a time, ragged parts."""
    yield cases_groupnorm.Case(2, (5, 7), 40, 4, silu=True)
    yield cases_groupnorm.Case(2, (61, 67), 60, 6, silu=True)
    yield cases_groupnorm.Case(3, (9,), 15, 5, x="float32", weight="float32")
    yield cases_groupnorm.Case(1, (64, 70), 20, 2, last=False, silu=True)
    yield cases_groupnorm.Case(2, (5, 7, 11), 16, 2, last=False, weight="float32")
    yield cases_groupnorm.Case(1, (50, 53), 80, 8, silu=True)
    yield cases_groupnorm.Case(1, (64, 72), 20, 2, last=False, silu=True)
    yield cases_groupnorm.Case(1, (33, 31), 80, 2)
    yield cases_groupnorm.Case(2, (32, 32), 60, 6, last=False, silu=True)  # backward by clusters of both examples


def cache_cases():
    """Each layout and kind of cache, packed or not, with slots of -1 and past the end; a prompt whose v goes through tiles."""
    Case, FN = cases_cache.Case, cases_cache.FN
    for i, layout in enumerate(cases_cache.LAYOUTS):
        yield Case(layout, "bfloat16", packed=i == 0, features=128)
        yield Case(layout, FN, "per_token", packed=i == 1, features=128, return_kv=False)
        yield Case(layout, "int8", "per_tensor", packed=i == 2, features=48, rotary=16)
    yield Case("shuffled", "bfloat16", tokens=301, kv_heads=8, features=64, pages=20, run=5, skip=7, packed=True)
    yield Case("shuffled", FN, "per_token", tokens=301, kv_heads=8, features=128, pages=20, run=16, skip=3)


def rmsnorms(backend: str, full: bool) -> None:
    for work in workloads(full):
        check(work, backend)
        print("ok", work.id, flush=True)


def quants(backend: str, full: bool) -> None:
    for case in quant_cases():
        arrays = case.arrays()
        case.check(arrays, case.run(arrays, backend), backend, exact=False)
        print("ok", case.id, flush=True)


def layernorms(backend: str, full: bool) -> None:
    for case in layernorm_cases():
        case.check(backend)
    for quantised in list(cases_layernorm.quant_cases())[1::5]:
        data = quantised.arrays()
        quantised.check(data, quantised.run(data, backend))


def groupnorms(backend: str, full: bool) -> None:
    for image in groupnorm_cases():
        test_groupnorm.check(image, backend)
        print("ok", image, flush=True)


def held(backend: str, full: bool) -> None:
    """GroupNorm by blocks that wait for one another, of images that fill some 132 units, against xla."""
    for image in (
        cases_groupnorm.Case(160, (64, 64), 16, 2, silu=True),
        cases_groupnorm.Case(320, (64, 64), 16, 2),
        cases_groupnorm.Case(4, (512, 512), 32, 8, last=False),
    ):
        args = image.arrays()
        y, want = (np.asarray(jaxnorm.groupnorm(*args, backend=b, **image.options)) for b in (backend, "xla"))
        assert (tolerances.ulp_distance(y, want) > 1).mean() < 1e-3
        print("ok", image, flush=True)
    image = cases_groupnorm.Case(160, (64, 64), 16, 2)
    dx, want = (_dx(image, b) for b in (backend, "xla"))
    assert (tolerances.ulp_distance(dx, want) > 1).mean() < 1e-3
    print("ok", image, "backward", flush=True)


def _dx(image: cases_groupnorm.Case, backend: str) -> np.ndarray:
    _, back = jax.vjp(lambda *a: jaxnorm.groupnorm(*a, backend=backend, **image.options), *image.arrays())
    return np.asarray(back(jnp.asarray(image.cotangent()))[0])


def walking(backend: str, full: bool) -> None:
    """Rows in such plenty that blocks walk over them, the next rows on their way to shared memory (sizes for some 132 units)."""
    for features, rows in ((8192, 1057), (16384, 930)):
        for work in (
            cases.Workload("walking", features, rows=rows),
            cases.Workload("walking", features, rows=rows).with_residual(),
        ):
            check(work, backend)
            print("ok", work.id, flush=True)
    cases_layernorm.Case(8192, (1190,), mean=40.0).check(backend)
    quant = Case("rmsnorm_quant", QuantSpec("fp4", **MX), 4096, (4300,))
    arrays = quant.arrays()
    quant.check(arrays, quant.run(arrays, backend), backend, exact=False)
    print("ok", quant.id, flush=True)


def heads(backend: str, full: bool) -> None:
    for case in heads_cases():
        given = case.arrays()
        results, gradients = oracle_rope.run(case, given, backend)
        case.check(given, *(results if isinstance(case, oracle_rope.TwoStream) else (results,)))
        case.check_gradients(given, gradients)
        print("ok", case, flush=True)


def caches(backend: str, full: bool) -> None:
    for case in cache_cases():
        a = case.arrays()
        got = case.run_op(a, backend)
        case.check(a, got, backend, exact=False)
        slots = np.array([case.slots - 1, -1, 0, case.slots, *a["slots"][:9]], np.int32)
        read = case.cache(got).gather(jnp.asarray(slots), backend=backend)
        for x, want in zip(read, case.gathered(got, slots.astype(np.int64)), strict=True):
            np.testing.assert_array_equal(np.asarray(x).astype(np.float32), want.astype(np.float32))
        print("ok", case, flush=True)


FAMILIES = {"rmsnorm": rmsnorms, "quant": quants, "layernorm": layernorms, "groupnorm": groupnorms, "heads": heads,
            "cache": caches, "walking": walking, "held": held}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("triton", "hip"), required=True)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma list, all without it")
    parser.add_argument("--without", default="", help="comma list of families to leave out")
    parser.add_argument("--full", action="store_true", help="more shapes; minutes under a tool")
    arguments = parser.parse_args()
    for name in arguments.families.split(","):
        if name in arguments.without.split(","):
            continue
        FAMILIES[name](arguments.backend, arguments.full)
    print("all done", flush=True)


if __name__ == "__main__":
    main()
