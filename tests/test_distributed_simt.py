"""The fused distributed kernels' own source on CPU threads: 2, 4 and 8 ranks, changing calls, delays, missing and wrong ranks."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import oracle_quant
import pytest
import simt_build
import simt_ranks
import tolerances
from cases_distributed import Call
from jaxnorm.kernels.configs import distributed_hip
from simt_ranks import Group, Step

from jaxnorm import QuantSpec

pytestmark = pytest.mark.skipif(bool(simt_build.missing()), reason=f"needs g++: {simt_build.missing()}")
N = 512
MX = QuantSpec("float8_e4m3fn", group_size=32, scale_dtype="e8m0")
FP8, INT8 = QuantSpec("float8_e4m3fn"), QuantSpec("int8", group_size=128)


@dataclasses.dataclass(frozen=True)
class Shot:
    call: Call
    schedule: str = "two-shot"
    gather: bool = True
    packed: bool = False

    def launch(self, target: str):
        if self.schedule == "one-shot":
            return distributed_hip.plan(self.problem(target))[0]
        packed = self.packed and target.startswith("sm_")
        return distributed_hip.tuned(self.problem(target), packed=packed)

    def problem(self, target: str):
        c = self.call
        dtypes = {n: d for n, d in (("x", c.x), ("residual", c.residual), ("weight", c.weight)) if d}
        options = {k: v for k, v in c.options.items() if k in ("eps", "weight_offset", "cast")}
        return simt_ranks.problem(target, c.rows, c.features, dtypes, ranks=c.ranks, schedule=self.schedule, gather=self.gather,
                                  replicated=c.kind == "allreduce", spec=c.spec, **options)  # fmt: skip

    def step(self, target: str, index: int, arrays, **more) -> Step:
        c, p = self.call, self.problem(target)
        operands = []
        for r in range(c.ranks):
            mine = {k: (v[r] if k == "x" else v) for k, v in arrays.items()}
            if c.residual and c.kind == "scatter":
                mine["residual"] = arrays["residual"][r * c.share : (r + 1) * c.share]
            operands.append(mine)
        return Step(p, self.launch(target), index, operands, **more)

    def shapes(self):
        c = self.call
        rows = c.rows if self.gather else c.share
        found = {"values": ((rows, N), c.x)}
        if c.spec:
            found["values"] = ((rows, N // 2 if c.spec.dtype == "fp4" else N), c.spec.value_dtype)
            found["scale"] = ((rows, c.spec.groups(N)), "uint8" if c.spec.scale_dtype == "e8m0" else "float32")
        if c.residual:
            found["residual_out"] = ((c.share if c.kind == "scatter" else c.rows, N), c.residual)
        return found

    def check(self, arrays, results, what: str):
        """Every rank's results against the oracle; gathered ones have the same bits everywhere."""
        c, want = self.call, self.call.forward(arrays)
        for r, got in enumerate(results):
            own = slice(r * c.share, min((r + 1) * c.share, c.rows))
            rows = slice(0, c.rows) if self.gather else own
            here = slice(0, rows.stop - rows.start) if rows.stop > rows.start else slice(0, 0)
            if c.spec:
                codes = oracle_quant.quantize(want.y[rows], c.spec, c.spec.dtype)
                scales = oracle_quant.assert_scales(got["scale"][here], codes, c.spec, what, exact=False)
                apart = np.abs(oracle_quant.steps(oracle_quant.codes_of(got["values"][here], c.spec.dtype), c.spec.dtype)
                               - oracle_quant.steps(codes.codes, c.spec.dtype))  # fmt: skip
                assert apart.max(initial=0) <= 1 and (apart > 0).sum() <= apart.size // 1000 + 2, what
                assert scales.shape[0] == here.stop
            else:
                part = dataclasses.replace(want, y=want.y[rows], n=want.n[rows], rstd=want.rstd[rows])
                tolerances.assert_y(got["values"][here], part, c.options.get("cast", "output"), what)
            if c.residual and c.kind == "scatter":
                tolerances.assert_same_bits(
                    got["residual_out"][: max(0, own.stop - own.start)], want.residual_out[own], what
                )
            elif c.residual:
                tolerances.assert_same_bits(got["residual_out"], want.residual_out, what)
            for name in got if self.gather else ():
                if name != "residual_out" or c.kind == "allreduce":
                    tolerances.assert_same_bits(got[name], results[0][name], f"{what} rank {r}")


def shots(ranks: int) -> list[Shot]:
    allreduce = {"kind": "allreduce", "ranks": ranks}
    return [
        Shot(Call(5, N, ranks, spec=FP8, weight="bfloat16"), "one-shot"),
        Shot(Call(9, N, ranks, spec=FP8, weight="bfloat16")),
        Shot(Call(7, N, residual="float32", options={"weight_offset": 1.0, "eps": 1e-3}, **allreduce), "one-shot"),
        Shot(Call(11, N, residual="bfloat16", x="float16", spec=INT8, **allreduce)),
        Shot(Call(2 * ranks, N, ranks, residual="float32", spec=MX), gather=False),
        Shot(Call(3, N, ranks, residual="bfloat16", x="float32", weight=None)),
        Shot(Call(6, N, ranks, spec=QuantSpec("fp4", 32, "e8m0"), options={"cast": "before_weight"}), "one-shot"),
        Shot(Call(13, N, ranks, spec=FP8, weight="bfloat16"), packed=True),
        Shot(Call(3 * ranks, N, ranks, residual="bfloat16"), gather=False, packed=True),
    ]  # fmt: skip


def prepare(target: str, ranks: int):
    """(library, the shots, a group that has room for them)"""
    found = shots(ranks)
    plans = [s.launch(target) for s in found]
    half = max(distributed_hip.half_bytes(s.problem(target)) for s in found)
    return simt_ranks.build(target, plans), found, Group(ranks, half)


@pytest.mark.parametrize(("target", "ranks"), [("sm_90", 2), ("gfx942", 4), ("sm_90", 8)])
def test_changing_calls(target, ranks):
    """Every kind of call, in changing order, grid and thread order, ranks running ahead of one another by random delays."""
    library, found, group = prepare(target, ranks)
    rng = np.random.default_rng(ranks)
    order = [*range(len(found)), *rng.integers(0, len(found), 8 if ranks == 8 else 12)]
    steps, data = [], []
    for n, index in enumerate(order):
        arrays = found[index].call.inputs(n)
        data.append(arrays)
        steps.append(
            found[index].step(target, int(index), arrays, signature=n, blocks=int(rng.integers(1, 4)), order=n % 3,
                              delays_us=tuple(rng.integers(0, 3000, ranks)))
        )  # fmt: skip
    shapes = {id(s): found[i].shapes() for s, i in zip(steps, order, strict=True)}
    results = group.run(library, steps, lambda step, rank: shapes[id(step)])
    for n, index in enumerate(order):
        found[index].check(data[n], results[n], f"call {n}, kind {index}")
    for r in range(ranks):
        assert group.errors[r].array[0] == 0
        assert list(group.header(r)) == [len(order), 0, 0]


def test_schedules_grids_and_threads_give_the_same_bits():
    """Packed and not; values of every exponent, infinities and NaN among them."""
    target, call = "sm_90", Call(9, N, 2, spec=FP8)
    one, two = Shot(call, "one-shot"), Shot(call)
    candidates = [p for (p,) in distributed_hip.candidates(two.problem(target))]
    plans = list({(p.threads, distributed_hip.packed(p)): p for p in candidates}.values())
    assert {distributed_hip.packed(p) for p in plans} == {False, True}
    plans.append(one.launch(target))
    library = simt_ranks.build(target, plans)
    arrays = call.unruly_inputs(5)
    bits = []
    for i, plan in enumerate(plans):
        shot = one if i == len(plans) - 1 else two
        group = Group(2, distributed_hip.half_bytes(shot.problem(target)))
        step = dataclasses.replace(shot.step(target, i, arrays), launch=plan, blocks=1 + i % 3)
        (result,) = group.run(library, [step], lambda s, r, shot=shot: shot.shapes())
        bits.append(result[0])
    for other in bits[1:]:
        for name in other:
            tolerances.assert_same_bits(other[name], bits[0][name], name)


def is_poison(a: np.ndarray) -> bool:
    return bool((a == 255).all()) if a.dtype == np.uint8 else bool(np.isnan(a.astype(np.float32)).all())


def test_a_missing_rank_is_named_in_time():
    """The others leave when their time is up, say whom they waited for, and leave nothing that looks like a result."""
    target, ranks = "sm_90", 4
    library, found, _ = prepare(target, ranks)
    for index, schedule in ((0, "one-shot"), (1, "two-shot"), (5, "two-shot"), (7, "two-shot")):
        shot = found[index]
        assert shot.schedule == schedule
        group = Group(ranks, max(distributed_hip.half_bytes(s.problem(target)) for s in found))
        arrays = shot.call.inputs(1)
        good = shot.step(target, index, arrays)
        bad = dataclasses.replace(good, absent=(2,))
        start = time.monotonic()
        first, second, third = group.run(
            library, [good, bad, bad], lambda s, r, shot=shot: shot.shapes(), patience_s=0.3, cleared=True
        )
        assert time.monotonic() - start < 10
        shot.check(arrays, first, "before")
        for r in (0, 1, 3):
            code = int(group.errors[r].array[0])
            assert (code & 15 == 1 and code >> 8 == 2) or code & 15 == 3, (
                code
            )  # timed out waiting for rank 2, or told so
            for results in (second, third):
                assert is_poison(results[r]["scale" if shot.call.spec else "values"])
            assert group.header(r)[2] == 1
        assert any(int(group.errors[r].array[0]) & 15 == 1 for r in (0, 1, 3))


def test_another_call_is_noticed():
    """Two ranks that run different calls of one group get an error, not a mixture."""
    target, ranks = "sm_90", 2
    library, found, group = prepare(target, ranks)
    shot = found[1]
    step = shot.step(target, 1, shot.call.inputs(), signatures={1: 99})
    (results,) = group.run(library, [step], lambda s, r: shot.shapes(), patience_s=5, cleared=True)
    codes = [int(group.errors[r].array[0]) for r in range(ranks)]
    assert 2 in {c & 15 for c in codes} and all(codes), codes
    assert all(is_poison(r["scale"]) for r in results)


def test_epochs_wrap_around():
    """The counter is compared as a signed difference: calls go on past 2**32."""
    target, ranks = "sm_90", 2
    library, found, group = prepare(target, ranks)
    for r in range(ranks):
        group.header(r)[0] = 0xFFFFFFFE
        header = group.spaces[r].array[: distributed_hip.HEADER_BYTES]
        header[128:].view(np.uint64)[:] = 0xFFFFFFFE
    shot = found[1]
    arrays = shot.call.inputs()
    late = shot.step(target, 1, arrays, delays_us=(0, 20000))  # who does not wait reads what is not there yet
    for results in group.run(library, [late] * 4, lambda s, r: shot.shapes()):
        shot.check(arrays, results, "around the wrap")
    assert group.header(0)[0] == 2
